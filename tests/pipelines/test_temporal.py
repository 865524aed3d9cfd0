"""Masked temporal layers: each mask is its own function of a frame, whatever the other frames are."""

import pytest
import tiny_text_video as tiny
import torch

from rewind.pipelines.dreamix.temporal import MASKS, architecture, is_temporal, masked
from rewind.pipelines.training import checkpointed


@pytest.fixture(scope="module", params=tiny.NAMES)
def family(request):
    return tiny.family(request.param)


@pytest.fixture(scope="module")
def pictures(family):
    return family.encode_pictures(tiny.video())


def denoise(family, pictures, level=0.7):
    return family.denoise(pictures, torch.full((len(pictures),), level), family.embed(["sks"]), as_pictures=True)


def test_the_families_are_told_apart(family):
    assert architecture(family.network) == ("joint" if type(family).__name__ == "Wan" else "separate")


def test_a_network_without_temporal_layers_is_refused():
    with pytest.raises(ValueError, match="cannot be tuned on clips"):
        architecture(torch.nn.Sequential(torch.nn.Linear(3, 3)))
    with pytest.raises(ValueError, match='the mask is "none"'), masked(torch.nn.Linear(1, 1), "none"):
        pass


@pytest.mark.parametrize("mask", MASKS)
def test_a_masked_network_sees_one_frame_at_a_time_in_any_order(family, pictures, mask):
    order = torch.tensor([3, 0, 4, 1, 2])
    with masked(family.network, mask):
        together = denoise(family, pictures)
        shuffled = denoise(family, pictures[order])
        alone = torch.cat([denoise(family, picture[None]) for picture in pictures])
    assert torch.allclose(shuffled, together[order], atol=3e-5)
    assert torch.allclose(alone, together, atol=3e-5)


def test_masks_differ_from_each_other_and_from_no_mask_where_there_are_temporal_layers(family, pictures):
    plain = denoise(family, pictures)
    results = []
    for mask in MASKS:
        with masked(family.network, mask):
            results.append(denoise(family, pictures))
    if architecture(family.network) == "joint":
        assert all(torch.equal(result, plain) for result in results)
    else:
        assert all((result - plain).abs().max() > 1e-2 for result in results)
        assert (results[0] - results[1]).abs().max() > 1e-2
    assert torch.equal(denoise(family, pictures), plain)  # nothing of a mask stays


def test_bypass_does_not_depend_on_temporal_weights_and_identity_on_attention_alone():
    family = tiny.family("TextSVD")
    pictures = family.encode_pictures(tiny.video())

    def results(change):
        changed = tiny.family("TextSVD")
        for name, p in changed.network.named_parameters():
            if change(name):
                p.data += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        given = []
        for mask in MASKS:
            with masked(changed.network, mask):
                given.append(denoise(changed, pictures))
        return given

    identity, bypass = results(lambda name: False)
    convolutions = results(lambda name: "temporal_res_block" in name)
    assert torch.equal(convolutions[0], identity) and torch.equal(convolutions[1], bypass)
    attention = results(lambda name: "temporal_transformer_blocks" in name)
    assert torch.equal(attention[1], bypass) and (attention[0] - identity).abs().max() > 1e-3
    values = results(
        lambda name: "temporal_transformer_blocks" in name and ("attn1.to_q" in name or "attn1.to_k" in name)
    )
    assert torch.allclose(values[0], identity, atol=1e-5)  # a softmax over one frame is 1: only V and O count


def test_identity_is_the_paper_formula_of_one_frame():
    """W_o W_v h, written out for one temporal block."""
    from diffusers.models.attention import TemporalBasicTransformerBlock

    family = tiny.family("TextSVD")
    block = next(m for m in family.network.modules() if isinstance(m, TemporalBasicTransformerBlock))
    width = block.attn1.to_q.in_features
    h = torch.randn(6, 1, width, generator=torch.Generator().manual_seed(0))  # one frame at six places
    expected = block.attn1.to_out[0](block.attn1.to_v(h))
    assert torch.allclose(block.attn1(h), expected, atol=1e-5)


def test_names_of_temporal_layers():
    temporal = (
        "input_blocks.1.1.time_stack.0.attn1.to_q",
        "down_blocks.0.attentions.0.temporal_transformer_blocks.0.ff",
    )
    temporal += ("down_blocks.0.temp_attentions.0.transformer_blocks.0.attn1.to_q", "transformer_in.proj_in")
    assert all(is_temporal(name) for name in temporal)
    assert not is_temporal("input_blocks.1.1.transformer_blocks.0.attn1.to_q")
    assert not is_temporal("blocks.0.attn1.to_q")


def test_recomputed_blocks_give_the_same_numbers_and_copy_the_dictionaries_that_are_changed_later(family, pictures):
    plain = denoise(family, pictures)
    with checkpointed(family.network):
        x = pictures.clone().requires_grad_(True)
        result = family.denoise(x, torch.full((len(x),), 0.7), family.embed(["sks"]), as_pictures=True)
        assert torch.equal(result, plain)
        result.square().sum().backward()
    y = pictures.clone().requires_grad_(True)
    family.denoise(y, torch.full((len(y),), 0.7), family.embed(["sks"]), as_pictures=True).square().sum().backward()
    assert torch.allclose(x.grad, y.grad, rtol=1e-4, atol=1e-5 * float(y.grad.abs().max()))
    assert "forward" not in {key for module in family.network.modules() for key in vars(module)}


class Scaled(torch.nn.Module):
    """A block that reads a number from a dictionary which its caller changes afterwards, as the host's do."""

    def __init__(self):
        super().__init__()
        self.attn1 = torch.nn.Linear(2, 2, bias=False)

    def forward(self, x, options):
        return self.attn1(x) ** 2 * options["scale"]


def test_a_second_computation_sees_what_the_first_saw():
    net = torch.nn.ModuleDict({"block": Scaled()})
    grads = []
    for enabled in (False, True):
        x, options = torch.ones(1, 2, requires_grad=True), {"scale": 2.0}
        with checkpointed(net, enabled):
            y = net["block"](x, options)
            options["scale"] = 50.0
            y.sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)
