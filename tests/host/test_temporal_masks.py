"""Dreamix's temporal masks on the host's own class of Stable Video Diffusion, against what the host itself has."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import tiny_models
import torch
from torch import Tensor, nn

FRAMES = 4


@pytest.fixture(scope="module")
def network(host) -> nn.Module:
    """The host's UNet with another share of the temporal path in every block, and norms and biases that count."""
    network = copy.deepcopy(tiny_models.svd(host).model.diffusion_model)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in network.named_parameters():
        if name.endswith("mix_factor"):
            parameter.data = torch.randn(1, generator=generator)
        elif parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return network.requires_grad_(False)


@pytest.fixture(scope="module")
def masked(host) -> Callable:
    return host.module("pipelines.dreamix.temporal").masked


def call(network: nn.Module, **options: int | Tensor) -> Tensor:
    """Its output for FRAMES frames that differ in everything they are given."""
    generator = torch.Generator().manual_seed(2)
    x, context = torch.randn(FRAMES, 8, 8, 8, generator=generator), torch.randn(FRAMES, 1, 64, generator=generator)
    y = torch.randn(FRAMES, network.label_emb[0][0].in_features, generator=generator)
    levels = torch.linspace(-1, 1, FRAMES)
    with torch.no_grad():
        return network(x, levels, context=context, y=y, transformer_options={}, **options)


def alone(network: nn.Module) -> Tensor:
    """Every frame as a clip of its own, as the frames' loss asks."""
    return call(network, num_video_frames=1)


def under(masked: Callable, network: nn.Module, mask: str) -> Tensor:
    with masked(network, mask):
        return alone(network)


def blocks(network: nn.Module, kind: str) -> list[nn.Module]:
    """The host's video blocks with this kind of a part beside their temporal path."""
    return [module for module in network.modules() if hasattr(module, "time_mixer") and hasattr(module, kind)]


@pytest.mark.parametrize("frames", [1, FRAMES])
def test_bypass_is_the_hosts_own_switch_for_pictures(network, masked, frames):
    switch = torch.ones(FRAMES // frames, frames)
    torch.testing.assert_close(
        under(masked, network, "bypass"), call(network, num_video_frames=frames, image_only_indicator=switch)
    )


def test_identity_keeps_the_attention_of_one_frame_and_drops_the_convolutions(network, masked):
    """The same network whose convolutions have no share, by their own blend: sigmoid(100) is 1."""
    spatial = copy.deepcopy(network)
    for block in blocks(spatial, "in_layers"):
        block.time_mixer.mix_factor.data = torch.full((1,), 100.0)
    torch.testing.assert_close(under(masked, network, "identity"), alone(spatial))
    for block in blocks(spatial, "transformer_blocks"):
        block.time_mixer.mix_factor.data = torch.full((1,), 100.0)
    torch.testing.assert_close(under(masked, network, "bypass"), alone(spatial))


def temporal_path(block: nn.Module, x: Tensor, context: Tensor) -> Tensor:
    """A temporal block of the host's on one frame, written out: a softmax over one frame, or one token, is 1."""
    x = x + block.ff_in(block.norm_in(x))
    x = x + block.attn1.to_out(block.attn1.to_v(block.norm1(x)))
    x = x + block.attn2.to_out(block.attn2.to_v(context))
    return x + block.ff(block.norm3(x))


def seen(masked: Callable, network: nn.Module, mask: str) -> dict[nn.Module, tuple[dict[str, Tensor], Tensor]]:
    """What entered every AlphaBlender under a mask, and what its block went on with."""
    found: dict[nn.Module, tuple[dict[str, Tensor], Tensor]] = {}

    def look(module: nn.Module, args: tuple, given: dict[str, Tensor], output: Tensor) -> None:
        found[module] = (given, output)

    with masked(network, mask):
        mixers = [module.time_mixer for module in network.modules() if hasattr(module, "time_mixer")]
        handles = [mixer.register_forward_hook(look, with_kwargs=True) for mixer in mixers]  # after the mask's own
        try:
            alone(network)
        finally:
            for handle in handles:
                handle.remove()
    return found


def test_identity_is_the_blend_written_out(network, masked):
    entered: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def enter(module: nn.Module, args: tuple, given: dict[str, Tensor]) -> None:
        entered[module] = (args[0].clone(), given["context"].clone())

    attending, convolving = blocks(network, "transformer_blocks"), blocks(network, "in_layers")
    handles = [b.time_stack[0].register_forward_pre_hook(enter, with_kwargs=True) for b in attending]
    try:
        found = seen(masked, network, "identity")
    finally:
        for handle in handles:
            handle.remove()
    assert len(found) == len(attending) + len(convolving) and attending and convolving
    for block in attending:
        given, output = found[block.time_mixer]
        share = torch.sigmoid(block.time_mixer.mix_factor)
        x, context = entered[block.time_stack[0]]
        with torch.no_grad():
            mixed = temporal_path(block.time_stack[0], x, context).reshape(given["x_spatial"].shape)
        torch.testing.assert_close(output, share * given["x_spatial"] + (1 - share) * mixed, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(output, given["x_spatial"], atol=1e-2)
    for block in convolving:
        given, output = found[block.time_mixer]
        assert torch.equal(output, given["x_spatial"])
        assert not torch.allclose(output, given["x_temporal"], atol=1e-2)


def test_under_bypass_every_block_goes_on_with_its_spatial_path(network, masked):
    found = seen(masked, network, "bypass")
    assert len(found) == len(blocks(network, "transformer_blocks")) + len(blocks(network, "in_layers"))
    for given, output in found.values():
        assert torch.equal(output, given["x_spatial"]) and not torch.allclose(output, given["x_temporal"], atol=1e-2)


def test_the_masks_differ_from_each_other_and_from_the_network_without_one(network, masked):
    together, plain = call(network, num_video_frames=FRAMES), alone(network)
    results = [plain, together, *(under(masked, network, mask) for mask in ("identity", "bypass"))]
    for index, result in enumerate(results):
        for other in results[:index]:
            assert (result - other).abs().max() > 0.02 * together.abs().max()
    assert torch.equal(alone(network), plain), "nothing of a mask stays"
