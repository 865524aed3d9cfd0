"""STAM: Instance Centering, spectrally normalised projections, and what its residual cannot do."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rewind.pipelines.ei2 import stam
from rewind.pipelines.ei2.stam import TEMPORALS, SpectralLinear, TemporalAttention, centre

WIDTH, HEADS, FRAMES, PLACES = 8, 2, 4, 6
CENTRED = ("STAM", "STAM without spectral normalisation")
UNCENTRED = ("STAM with LayerNorm", "Tune-A-Video")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(clips: int = 1, seed: int = 0, scale: float = 1.0) -> Tensor:
    """[B frames, n, C] with a mean of its own in every channel."""
    x = torch.randn(clips * FRAMES, PLACES, WIDTH, generator=generator(seed))
    return scale * x + torch.linspace(-2, 3, WIDTH)


def module(kind: str = "STAM", axes: str = "frames", heads: int = HEADS, scale: float = 3.0) -> TemporalAttention:
    """One with weights far from its start, the norms of all of them above 1, and u where power iteration ends."""
    made = TemporalAttention(WIDTH, heads, kind, axes, generator())
    with torch.no_grad():
        for i, p in enumerate(made.parameters()):
            p.copy_(scale * torch.randn(p.shape, generator=generator(i)) / math.sqrt(WIDTH))
    return settled(made)


def settled(made: torch.nn.Module) -> torch.nn.Module:
    for layer in made.modules():
        if isinstance(layer, SpectralLinear):
            for _ in range(200):
                layer.iterate()
    return made


def norm(weight: Tensor) -> float:
    return float(torch.linalg.matrix_norm(weight.detach().double(), 2))


def written_out(made: TemporalAttention, x: Tensor) -> Tensor:
    """The residual of one clip, location by location, of weights divided by the norms that an SVD finds."""
    w = {name: layer.weight.detach().double() for name, layer in made.named_children()}
    parts = TEMPORALS[made.kind]
    if parts.spectral:
        w |= {name: w[name] / max(1.0, norm(w[name])) for name in ("to_v", "to_out")}
    x, d = x.double(), WIDTH // made.heads
    if parts.centred:
        h = x - x.mean(0 if made.axes == "frames" else (0, 1))
    else:
        h = (x - x.mean(-1, keepdim=True)) / (x.var(-1, False, keepdim=True) + 1e-5).sqrt()
    out = torch.zeros_like(x)
    for place in range(x.shape[1]):
        q, k, v = (h[:, place] @ w[name].T for name in ("to_q", "to_k", "to_v"))
        mixed = []
        for head in range(made.heads):
            own = slice(head * d, (head + 1) * d)
            mixed.append(torch.softmax(q[:, own] @ k[:, own].T / math.sqrt(d), -1) @ v[:, own])
        out[:, place] = torch.cat(mixed, -1) @ w["to_out"].T
    return out + made.to_out.bias.detach() if parts.bias else out


# --- the formula ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", ["frames", "frames + space"])
@pytest.mark.parametrize("kind", TEMPORALS)
def test_the_residual_is_the_formula(kind, axes):
    made, x = module(kind, axes), tokens()
    assert torch.allclose(made(x, FRAMES).double(), written_out(made, x), atol=1e-5)


@pytest.mark.parametrize("kind", TEMPORALS)
def test_a_new_module_changes_nothing_and_seeds_tell_its_weights(kind):
    made, again, other = (TemporalAttention(WIDTH, HEADS, kind, generator=generator(seed)) for seed in (0, 0, 1))
    assert not made(tokens(), FRAMES).any()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in made.state_dict().items())
    assert not torch.equal(made.to_v.weight, other.to_v.weight)


def test_only_tune_a_videos_has_a_bias_which_begins_at_zero():
    biases = {
        kind: [p for name, p in TemporalAttention(WIDTH, HEADS, kind).named_parameters() if "bias" in name]
        for kind in TEMPORALS
    }
    assert {kind for kind, own in biases.items() if own} == {"Tune-A-Video"}
    assert not biases["Tune-A-Video"][0].any()


def test_centring_takes_the_mean_of_each_channel_of_each_clip():
    x = tokens(clips=2)
    over_frames, over_space = (centre(x, FRAMES, axes).view(2, FRAMES, PLACES, WIDTH) for axes in stam.AXES)
    clips = x.view(2, FRAMES, PLACES, WIDTH)
    assert torch.allclose(over_frames.mean(1), torch.zeros(2, PLACES, WIDTH), atol=1e-6)
    assert torch.allclose(over_space.mean((1, 2)), torch.zeros(2, WIDTH), atol=1e-6)
    for clip, a, b in zip(clips, over_frames, over_space):
        assert torch.allclose(a, clip - clip.mean(0), atol=1e-6)
        assert torch.allclose(b, clip - clip.mean((0, 1)), atol=1e-6)


@pytest.mark.parametrize("axes", ["frames", "frames + space"])
@pytest.mark.parametrize("kind", TEMPORALS)
def test_clips_of_a_batch_do_not_see_each_other(kind, axes):
    made, x = module(kind, axes), tokens(clips=2)
    together = made(x, FRAMES)
    alone = torch.cat([made(clip, FRAMES) for clip in x.split(FRAMES)])
    assert torch.allclose(together, alone, atol=1e-6)


def test_many_locations_are_attended_to_piece_by_piece(monkeypatch):
    made, x = module(), tokens(clips=2)
    whole = made(x, FRAMES)
    monkeypatch.setattr(stam, "LOCATIONS", 5)  # of 12: two whole pieces and a rest
    assert torch.allclose(made(x, FRAMES), whole, atol=1e-6)


def test_it_computes_in_its_own_precision_and_answers_in_the_tokens():
    made, x = module(), tokens().bfloat16()
    got = made(x, FRAMES)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, made(x.float(), FRAMES).bfloat16())


# --- what the residual cannot do --------------------------------------------------------------------------------------


def uniform(made: TemporalAttention) -> TemporalAttention:
    """With Wq = 0 every frame attends to all frames alike."""
    torch.nn.init.zeros_(made.to_q.weight)
    return made


@pytest.mark.parametrize("kind", CENTRED)
def test_under_uniform_attention_the_residual_has_no_mean_over_frames(kind):
    x = tokens(scale=5.0)
    assert uniform(module(kind))(x, FRAMES).mean(0).abs().max() < 1e-5
    over_space = uniform(module(kind, "frames + space"))(x, FRAMES)
    assert over_space.mean((0, 1)).abs().max() < 1e-5
    assert over_space.mean(0).abs().max() > 0.1  # at one location alone it has


@pytest.mark.parametrize("kind", UNCENTRED)
def test_with_layer_norm_it_has(kind):
    assert uniform(module(kind))(tokens(scale=5.0), FRAMES).mean((0, 1)).abs().max() > 0.1


def test_a_static_clip_leaves_stam_the_identity_and_layer_norm_not():
    x = tokens()[:1].expand(FRAMES, -1, -1)
    assert all(module(kind)(x, FRAMES).abs().max() < 1e-5 for kind in CENTRED)
    assert all(module(kind)(x, FRAMES).abs().max() > 0.1 for kind in UNCENTRED)


@pytest.mark.parametrize("heads", [1, 2])
def test_the_residual_is_at_most_how_far_the_location_differs_over_time(heads):
    """Rows of a softmax are convex weights: |r_f| <= sqrt(heads) max_g |x_g - mean|, at every location."""
    for scale in (1e-3, 1.0, 10.0):
        x = tokens(scale=scale)
        most = math.sqrt(heads) * centre(x, FRAMES).norm(dim=-1).amax(0)
        assert (module(heads=heads, scale=30.0)(x, FRAMES).norm(dim=-1) <= most * 1.001 + 1e-6).all()
    for kind, scale in (("STAM with LayerNorm", 1e-3), ("STAM without spectral normalisation", 1.0)):
        x = tokens(scale=scale)
        residual = module(kind, heads=heads, scale=30.0)(x, FRAMES).norm(dim=-1)
        assert (residual > math.sqrt(heads) * centre(x, FRAMES).norm(dim=-1).amax(0)).any()


# --- spectral normalisation -------------------------------------------------------------------------------------------


def spectral(weight: Tensor) -> SpectralLinear:
    layer = SpectralLinear(len(weight), generator())
    with torch.no_grad():
        layer.weight.copy_(weight)
    return settled(layer)


def test_a_weight_of_norm_above_one_is_divided_by_it_and_one_below_is_left():
    large = spectral(torch.diag(torch.tensor([4.0, 2.0, 0.5])))
    assert torch.allclose(large.normalised(), torch.diag(torch.tensor([1.0, 0.5, 0.125])), atol=1e-6)
    small = spectral(torch.diag(torch.tensor([0.9, 0.5, 0.1])))
    assert torch.equal(small.normalised(), small.weight)


def test_power_iteration_finds_the_norm_which_a_new_layer_is_near_to():
    layer = spectral(torch.randn(32, 32, generator=generator(5)))
    assert norm(layer.normalised()) == pytest.approx(1, abs=1e-4)
    new = SpectralLinear(64, generator())
    assert norm(new.weight) > 1.05 and norm(new.normalised()) < 1.05


def test_a_zero_matrix_keeps_its_vector_and_takes_part_as_soon_as_it_is_none():
    layer = SpectralLinear(4, generator(), zero=True)
    before = layer.u.clone()
    assert before.norm() == pytest.approx(1)
    layer.iterate()
    assert torch.equal(layer.u, before) and not layer.normalised().any()
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([1.0, 6.0, 2.0, 3.0])))
    assert norm(settled(layer).normalised()) == pytest.approx(1, abs=1e-5)


def test_half_precision_arithmetic_does_not_reach_the_power_iteration():
    layer, exact = (spectral(3 * torch.randn(32, 32, generator=generator(5))) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        layer.iterate()
        weight = layer.normalised()
    exact.iterate()
    assert torch.equal(layer.u, exact.u) and torch.equal(weight, exact.normalised())


def test_a_pass_leaves_the_vector_so_that_a_second_one_sees_the_same_weight():
    made = TemporalAttention(WIDTH, HEADS, generator=generator()).train()
    with torch.no_grad():
        made.to_v.weight.mul_(5)
    first = made.to_v.normalised()
    made(tokens(), FRAMES)
    assert torch.equal(made.to_v.normalised(), first)
    made.to_v.iterate()
    assert not torch.equal(made.to_v.normalised(), first)


def test_the_gradient_is_that_of_the_weight_over_its_norm():
    layer, x = spectral(2 * torch.randn(6, 6, generator=generator(3))), torch.randn(5, 6, generator=generator(4))
    layer(x).square().sum().backward()
    weight = layer.weight.detach().clone().requires_grad_(True)
    (x @ (weight / torch.linalg.matrix_norm(weight, 2)).T).square().sum().backward()
    assert torch.allclose(layer.weight.grad, weight.grad, atol=1e-4)


@pytest.mark.parametrize("kind", TEMPORALS)
def test_folded_weights_are_the_normalised_module(kind):
    made, x = module(kind), tokens()
    plain = TemporalAttention(WIDTH, HEADS, kind, folded=True)
    plain.load_state_dict(made.folded())
    assert stam.folded_shapes(kind, WIDTH) == {key: tuple(t.shape) for key, t in made.folded().items()}
    assert not any(isinstance(layer, SpectralLinear) for layer in plain.modules())
    assert torch.allclose(plain(x, FRAMES), made(x, FRAMES), atol=1e-5)
    norms = [norm(layer.weight) for layer in (plain.to_v, plain.to_out)]
    assert all(value <= 1 + 1e-5 for value in norms) == TEMPORALS[kind].spectral


def test_bad_kinds_are_told():
    with pytest.raises(ValueError, match='the temporal module is "none"; it must be one of STAM, '):
        TemporalAttention(WIDTH, HEADS, "none")
    with pytest.raises(ValueError, match='the centring is over "space"; it must be one of frames, '):
        TemporalAttention(WIDTH, HEADS, axes="space")
