"""The inflation of a text-to-image UNet: which blocks, what is put in where, and that it can be taken out again."""

from __future__ import annotations

import pytest
import tiny_text_image as tiny
import tiny_text_video
import torch
from torch import Tensor, nn

from rewind.pipelines.ei2.ffam import ATTENTIONS, frame_attention
from rewind.pipelines.ei2.inflation import (
    Inflation,
    InflationSettings,
    architecture,
    chosen_blocks,
    fresh_temporal,
    inflated,
    transformer_blocks,
)
from rewind.pipelines.ei2.stam import TEMPORALS

FRAMES = tiny.FRAMES
OWN = InflationSettings("own frame")
SIZES = [(4, 6), (9, 5)]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def latents(size: tuple[int, int] = (4, 6), frames: int = FRAMES) -> Tensor:
    return noise(frames, 4, *size)


@torch.no_grad()
def run(network: nn.Module, x: Tensor) -> Tensor:
    context = noise(1, 5, tiny.TEXT, seed=1).expand(len(x), -1, -1)
    return network(x, torch.tensor([500.0]), context, return_dict=False)[0]


def run_inflated(network: nn.Module, x: Tensor, inflation: Inflation, frames: int | None = None) -> Tensor:
    with inflated(network, inflation, frames or len(x)):
        return run(network, x)


@pytest.fixture(scope="module")
def network():
    return tiny.unet()


@pytest.fixture
def lively(network):
    """FFAM and STAM with weights that do something."""
    settings = InflationSettings()
    return Inflation(settings, tiny.BLOCKS, tiny.temporal(network, settings))


# --- blocks -----------------------------------------------------------------------------------------------------------


def test_blocks_go_by_the_hosts_names_in_the_order_in_which_they_are_passed(network):
    blocks = transformer_blocks(network)
    assert list(blocks) == tiny.BLOCKS
    passed = []
    hooks = [
        block.register_forward_hook(lambda *args, name=name: passed.append(name)) for name, block in blocks.items()
    ]
    run(network, latents())
    for hook in hooks:
        hook.remove()
    assert passed == tiny.BLOCKS


def test_the_names_and_widths_of_sd_15():
    network = tiny.structure("SD 1.5")
    places = [f"input_blocks.{i}" for i in (1, 2, 4, 5, 7, 8)] + ["middle_block"]
    places += [f"output_blocks.{i}" for i in range(3, 12)]
    assert list(transformer_blocks(network)) == [f"{place}.1.transformer_blocks.0" for place in places]
    widths = [320] * 2 + [640] * 2 + [1280] * 6 + [640] * 3 + [320] * 3
    told = architecture(network)
    assert told.startswith("context 768; input_blocks.1.1.transformer_blocks.0:320 ")
    assert [int(block.rpartition(":")[2]) for block in told.split()[2:]] == widths


def test_the_names_of_sdxl():
    depths = {4: 2, 5: 2, 7: 10, 8: 10}
    names = [f"input_blocks.{i}.1.transformer_blocks.{j}" for i, depth in depths.items() for j in range(depth)]
    names += [f"middle_block.1.transformer_blocks.{j}" for j in range(10)]
    depths = dict.fromkeys((0, 1, 2), 10) | dict.fromkeys((3, 4, 5), 2)
    names += [f"output_blocks.{i}.1.transformer_blocks.{j}" for i, depth in depths.items() for j in range(depth)]
    assert list(transformer_blocks(tiny.structure("SDXL"))) == names


class Named(nn.Module):
    """Transformer blocks under names of the host's: modules with attn1, in a tree."""

    def __init__(self, *names: str):
        super().__init__()
        for name in names:
            parent = self
            for part in name.split("."):
                if part not in dict(parent.named_children()):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module("attn1", nn.Identity())


def test_the_hosts_own_names_are_taken_as_they_are_and_ordered_by_number():
    names = [f"output_blocks.{i}.1.transformer_blocks.0" for i in (10, 2, 3)] + ["middle_block.1.transformer_blocks.0"]
    names += ["input_blocks.1.1.transformer_blocks.0"]
    assert list(transformer_blocks(Named(*names))) == [names[i] for i in (4, 3, 1, 2, 0)]


@pytest.mark.parametrize("video", [*tiny_text_video.NAMES, "the host's SVD", "a transformer", "AnimateDiff", "none"])
def test_networks_that_are_no_text_to_image_unets_are_refused(video):
    stand_ins = {
        "the host's SVD": ["input_blocks.1.1.transformer_blocks.0", "input_blocks.1.1.time_stack.0"],
        "a transformer": ["transformer_blocks.0"],
        "AnimateDiff": [
            "down_blocks.0.attentions.0.transformer_blocks.0",
            "down_blocks.0.motion_modules.0.transformer_blocks.0",
        ],
        "none": [],
    }
    network = Named(*stand_ins[video]) if video in stand_ins else tiny_text_video.family(video).network
    with pytest.raises(ValueError, match=f"a {type(network).__name__} cannot be inflated: EI² takes the UNets of text"):
        transformer_blocks(network)


def test_parts_of_a_unet_are_chosen_by_their_place():
    assert chosen_blocks(tiny.BLOCKS, "all") == tiny.BLOCKS
    assert [chosen_blocks(tiny.BLOCKS, place) for place in ("input", "middle", "output")] == [
        tiny.BLOCKS[:1],
        tiny.BLOCKS[1:2],
        tiny.BLOCKS[2:],
    ]
    with pytest.raises(ValueError, match='the blocks are "up"; they must be one of all, input, middle, output'):
        chosen_blocks(tiny.BLOCKS, "up")


# --- what changes nothing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", TEMPORALS)
def test_fresh_modules_and_the_own_frames_attention_change_nothing(network, kind, size):
    settings = InflationSettings("own frame", temporal=kind)
    inflation = Inflation(settings, tiny.BLOCKS, fresh_temporal(network, settings, 0))
    x = latents(size)
    assert torch.allclose(run_inflated(network, x, inflation), run(network, x), atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_of_one_frame_every_attention_is_the_models_own_and_stam_has_nothing_to_do(network, attention, size):
    settings = InflationSettings(attention)
    inflation = Inflation(settings, tiny.BLOCKS, tiny.temporal(network, settings))
    x = latents(size, frames=1)
    assert torch.allclose(run_inflated(network, x, inflation), run(network, x), atol=1e-6)


def test_strength_0_is_bit_for_bit_the_model_and_strengths_between_lie_between(network, lively):
    plain, full = run(network, latents()), run_inflated(network, latents(), lively)
    lively.strength = 0.0
    assert torch.equal(run_inflated(network, latents(), lively), plain)
    moved = []
    for lively.strength in (0.25, 0.5, 1.0):
        moved.append(float((run_inflated(network, latents(), lively) - plain).norm()))
    assert 0 < moved[0] < moved[1] < moved[2] == float((full - plain).norm())


def test_strength_mixes_each_attention_and_scales_each_residual(network, lively):
    q, k, v = (noise(FRAMES, 24, 16, seed=seed) for seed in range(3))
    own, mixed = (frame_attention(q, k, v, FRAMES, (4, 6), 2, kind) for kind in ("own frame", "FFAM"))
    x, name = noise(FRAMES, 24, 16, seed=4), tiny.BLOCKS[0]
    residual = lively.residual(name, x, FRAMES)
    assert torch.equal(residual, lively.temporal[name](x, FRAMES)) and residual.abs().max() > 0.1
    lively.strength = 0.25
    assert torch.allclose(lively.attention(q, k, v, FRAMES, (4, 6), 2), 0.75 * own + 0.25 * mixed, atol=1e-6)
    assert torch.allclose(lively.residual(name, x, FRAMES), 0.25 * residual, atol=1e-6)
    assert lively.residual("input_blocks.9.1.transformer_blocks.0", x, FRAMES) is None


# --- what is put in ---------------------------------------------------------------------------------------------------


def written_out(block: nn.Module, x: Tensor, context: Tensor, inflation: Inflation, name: str, grid) -> Tensor:
    """x + FFAM, + STAM, + cross-attention, + feed-forward, by the block's own layers."""
    h = block.norm1(x)
    q, k, v = (layer(h) for layer in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v))
    s = inflation.settings
    x = x + block.attn1.to_out[0](frame_attention(q, k, v, FRAMES, grid, block.attn1.heads, s.attention, s.factor))
    x = x + inflation.temporal[name](x, FRAMES)
    x = x + block.attn2(block.norm2(x), context)
    return x + block.ff(block.norm3(x))


@pytest.mark.parametrize("size", SIZES)
def test_every_block_computes_ffam_then_stam_then_the_rest(network, lively, size):
    seen = {}

    def look(name):
        def hook(block, args, kwargs, output):
            seen[name] = (args[0], kwargs["encoder_hidden_states"], output)

        return hook

    blocks = transformer_blocks(network)
    hooks = [block.register_forward_hook(look(name), with_kwargs=True) for name, block in blocks.items()]
    run_inflated(network, latents(size), lively)
    for hook in hooks:
        hook.remove()
    assert list(seen) == tiny.BLOCKS
    for name, (x, context, output) in seen.items():
        grid = tuple((side + 1) // 2 for side in size) if name.startswith("middle") else size
        with torch.no_grad():
            expected = written_out(blocks[name], x, context, lively, name, grid)
        assert torch.allclose(output, expected, atol=1e-5)


def test_the_observer_is_shown_what_enters_and_leaves_each_module_in_order(network, lively):
    shown = []
    lively.observer = lambda name, x, y: shown.append((name, x, y))
    run_inflated(network, latents(), lively)
    assert [name for name, _, _ in shown] == tiny.BLOCKS
    for name, x, y in shown:
        assert torch.allclose(y - x, lively.temporal[name](x, FRAMES), atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_clips_of_a_batch_and_windows_of_a_clip_are_as_if_alone(network, lively, size):
    """Conditional and unconditional clips stand in one batch; a context window is a call with fewer frames."""
    x = latents(size, frames=2 * FRAMES)
    together = run_inflated(network, x, lively, FRAMES)
    alone = torch.cat([run_inflated(network, part, lively) for part in x.split(FRAMES)])
    assert torch.allclose(together, alone, atol=1e-5)
    assert not torch.allclose(run_inflated(network, x, lively), together, atol=1e-3)  # as one clip of six it differs


def test_other_frames_matter_to_a_frame_only_through_the_inflation(network, lively):
    x = latents()
    other = torch.cat([x[:-1], x[-1:] + 1])
    assert torch.allclose(run(network, x)[0], run(network, other)[0], atol=1e-6)
    for inflation in (
        lively,
        Inflation(InflationSettings(), tiny.BLOCKS),
        Inflation(OWN, tiny.BLOCKS, lively.temporal),
    ):
        a, b = (run_inflated(network, clip, inflation)[0] for clip in (x, other))
        assert not torch.allclose(a, b, atol=1e-4)


def test_only_chosen_blocks_are_inflated(network, lively):
    own = transformer_blocks(network)
    before = {name: block.attn1.processor for name, block in own.items()}
    chosen = tiny.BLOCKS[1:2]
    with inflated(network, Inflation(lively.settings, chosen, lively.temporal), FRAMES):
        assert [name for name in own if own[name].attn1.processor is not before[name]] == chosen
        assert [name for name in own if own[name].attn1._forward_hooks] == chosen


def test_a_batch_that_is_no_number_of_clips_is_told(network, lively):
    with pytest.raises(ValueError, match="got a batch of 4 for clips of 3 frames"):
        run_inflated(network, latents(frames=4), lively, FRAMES)
    assert tiny.untouched(network)


# --- taken out --------------------------------------------------------------------------------------------------------


def test_nothing_stays_after_the_context_and_a_second_time_gives_the_same(network, lively):
    processors = network.attn_processors
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    plain = run(network, latents())
    first = run_inflated(network, latents(), lively)
    assert not torch.allclose(first, plain, atol=1e-3)
    assert tiny.untouched(network) and all(network.attn_processors[name] is p for name, p in processors.items())
    assert torch.equal(run(network, latents()), plain)
    assert torch.equal(run_inflated(network, latents(), lively), first)
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())


def test_an_error_inside_takes_everything_out_too(network, lively):
    with pytest.raises(KeyboardInterrupt), inflated(network, lively, FRAMES):
        assert not tiny.untouched(network)
        raise KeyboardInterrupt
    assert tiny.untouched(network)


def test_one_inflation_inside_another_is_refused(network, lively):
    with inflated(network, lively, FRAMES):
        once = run(network, latents())
        with pytest.raises(ValueError, match="this UNet is inflated already"):
            run_inflated(network, latents(), lively)
        assert torch.equal(run(network, latents()), once)
    assert tiny.untouched(network)


# --- settings ---------------------------------------------------------------------------------------------------------


def test_equal_seeds_make_equal_modules_one_a_block_with_the_blocks_width_and_heads(network):
    first, again, other = (fresh_temporal(network, InflationSettings(), seed) for seed in (0, 0, 1))
    assert list(first) == tiny.BLOCKS
    for name, block in transformer_blocks(network).items():
        weight = first[name].to_q.weight
        assert weight.shape == block.attn1.to_q.weight.shape and first[name].heads == block.attn1.heads == 2
        assert torch.equal(weight, again[name].to_q.weight) and not torch.equal(weight, other[name].to_q.weight)
    assert fresh_temporal(network, InflationSettings(temporal="none"), 0) == {}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"attention": "dense"}, 'the attention is "dense"; it must be one of FFAM, sparse-causal'),
        ({"factor": 0}, "the coarse factor is 0; it must be 1"),
        ({"temporal": "LSTM"}, 'the temporal module is "LSTM"; it must be one of STAM, .*, none'),
        ({"axes": "time"}, 'the centring is over "time"; it must be one of frames, frames'),
    ],
)
def test_settings_out_of_range_are_told(given, told):
    with pytest.raises(ValueError, match=told):
        InflationSettings(**given)
