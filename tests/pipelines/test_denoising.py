"""The way back: Euler against closed forms, guidance by frame and by interval."""

from __future__ import annotations

import math

import pytest
import torch
from denoisers import Gaussian, Network, clip, relative

from rewind.pipelines.denoiser import EDM, EPS, FLOW, V, karras_sigmas
from rewind.pipelines.videoshop.denoising import GuidedDenoiser, frame_guidance, guided, sample_euler

FAMILIES = {"eps": EPS, "v": V, "edm": EDM(0.5), "flow": FLOW}


def falling(path, steps):
    ratio = torch.linspace(4, 0, steps + 1, dtype=torch.float64)
    return ratio / (1 + ratio) if path.kind == "flow" else ratio


# --- Euler -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FAMILIES.values(), ids=FAMILIES)
def test_euler_converges_to_the_clean_clip_at_first_order(path):
    x, errors = clip(), []
    for steps in (40, 80, 160):
        model, sigmas = Gaussian(path, s=0.7, mu=0.3), falling(path, steps)
        found = sample_euler(model, model.solution(x, float(sigmas[0])), sigmas, disable=True)
        assert model.sigmas == pytest.approx(sigmas[:-1].tolist())  # once a level, never at 0
        errors.append(relative(found, x))
    assert all(1.7 < coarse / fine < 2.3 for coarse, fine in zip(errors, errors[1:])), errors


def test_one_step_is_the_papers():
    """Equation 3, in v-prediction's own terms."""
    model, x, (high, low) = Network(), clip(), (3.0, 1.25)
    f = model.raw(x / math.sqrt(10), high)
    denoised = x / 10 - high / math.sqrt(10) * f
    wanted = x + (low - high) * (x - denoised) / high
    torch.testing.assert_close(sample_euler(model, x, torch.tensor([high, low]), disable=True), wanted)


def test_the_last_step_to_0_is_the_denoised_clip():
    model, x = Network(), clip()
    result = sample_euler(model, x, torch.tensor([2.0, 0.0]), disable=True)
    torch.testing.assert_close(result, model(x, torch.tensor([2.0])))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float32, 1e-6)])
@pytest.mark.parametrize("shape", [(4, 4, 3, 5), (2, 4, 3, 5, 6)], ids=["4-D", "5-D"])
def test_dtypes_shapes_and_inputs(shape, dtype, tolerance):
    x, sigmas = clip(*shape, dtype=dtype), falling(EPS, 6)
    before, model = x.clone(), Gaussian(EPS, s=0.7)
    result = sample_euler(model, x, sigmas, disable=True)
    assert result.dtype == dtype and torch.equal(x, before)
    assert all(seen.dtype == dtype for seen, _ in model.seen)
    wanted = sample_euler(Gaussian(EPS, s=0.7), x.double(), sigmas, disable=True)
    assert relative(result, wanted) < tolerance
    assert torch.equal(result, sample_euler(Gaussian(EPS, s=0.7), x, sigmas, disable=True))


def test_the_callback_is_told_each_step_and_extra_arguments_reach_the_network():
    told, calls = [], []

    def model(x, sigma, **extra):
        calls.append(extra)
        return 0.5 * x

    result = sample_euler(model, clip(), torch.tensor([4.0, 2.0, 0.0]), {"seed": 3}, told.append, disable=True)
    assert calls == [{"seed": 3}] * 2
    assert [(step["i"], step["sigma_high"], step["sigma"], step["evaluations"]) for step in told] == [
        (0, 4.0, 2.0, 1),
        (1, 2.0, 0.0, 2),
    ]
    torch.testing.assert_close(told[0]["denoised"], 0.5 * clip())
    assert torch.equal(told[-1]["x"], result)


@pytest.mark.parametrize(
    "x, sigmas, message",
    [
        (clip(), [0.0, 1.0], r"must fall to 0, got \[0.0\] to \[1.0\]"),
        (clip(), [1.0, 1.0], "must fall to 0"),
        (clip(), [1.0], "must fall to 0"),
        (clip(), [1.0, -0.5], "must fall to 0"),
        (clip(), [math.nan, 0.0], "must fall to 0"),
        (clip(), [math.inf, 0.0], "must fall to 0"),
        (clip() * math.nan, [1.0, 0.0], "NaN or infinite"),
        (clip()[0], [1.0, 0.0], r"shape \(4, 3, 5\)"),
    ],
)
def test_bad_input_before_any_work(x, sigmas, message):
    model = Gaussian(V)
    with pytest.raises(ValueError, match=message):
        sample_euler(model, x, torch.tensor(sigmas), disable=True)
    assert not model.seen


# --- guidance --------------------------------------------------------------------------------------------------------


def test_guidance_is_linear_from_the_first_frame_to_the_last():
    assert frame_guidance(1.0, 3.0, 5).tolist() == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert frame_guidance(4.0, 4.0, 3).tolist() == [4.0, 4.0, 4.0]  # the authors' code: flat
    assert frame_guidance(2.0, 3.0, 1).tolist() == [2.0]


@pytest.mark.parametrize("shape, axis", [((5, 4, 2, 3), 0), ((2, 4, 5, 2, 3), 2)], ids=["4-D", "5-D"])
def test_each_frame_gets_its_own_weight(shape, axis):
    denoised, unconditional = clip(*shape), clip(*shape, seed=1)
    weights = frame_guidance(1.0, 3.0, 5)
    mixed = guided(denoised, unconditional, weights)
    for i, w in enumerate(weights.tolist()):
        d, u = denoised.select(axis, i), unconditional.select(axis, i)
        torch.testing.assert_close(mixed.select(axis, i), u + w * (d - u))
    with pytest.raises(ValueError, match=r"got \(4,\) guidance weights for 5 frames"):
        guided(denoised, unconditional, frame_guidance(1, 1, 4))


def play(first, last, interval=(0.0, math.inf)):
    positive, negative = Network(seed=1), Network(seed=2)
    model = GuidedDenoiser(positive, negative, first, last, interval)
    result = sample_euler(model, clip() * 20, karras_sigmas(10, 0.01, 20.0), disable=True)
    assert model.evaluations == len(positive.sigmas) + len(negative.sigmas)
    assert len(positive.sigmas) == 10
    return result, negative.sigmas


def test_the_unconditional_side_is_called_only_where_it_matters():
    plain = sample_euler(Network(seed=1), clip() * 20, karras_sigmas(10, 0.01, 20.0), disable=True)
    result, called = play(1.0, 1.0)
    assert torch.equal(result, plain) and not called
    result, called = play(2.0, 2.0)
    assert len(called) == 10 and relative(result, plain) > 0.01
    result, called = play(2.0, 2.0, (30.0, 40.0))
    assert torch.equal(result, plain) and not called


def test_guidance_applies_inside_the_interval_and_at_its_ends():
    levels = karras_sigmas(10, 0.01, 20.0)[:-1].tolist()
    inner = levels[3:7]
    _, called = play(1.0, 3.0, (inner[-1] * 0.999, inner[0] * 1.001))
    assert called == pytest.approx(inner)
    model = GuidedDenoiser(Network(seed=1), Network(seed=2), 2.0, 2.0, (1.0, 4.0))
    for sigma, evaluations in ((1.0, 2), (4.0, 4), (4.5, 5), (0.5, 6)):
        model(clip(), torch.full((4,), sigma))
        assert model.evaluations == evaluations


@pytest.mark.parametrize("shape", [(4, 4, 3, 5), (2, 4, 3, 5, 6)], ids=["4-D", "5-D"])
def test_the_guided_denoiser_weighs_frames(shape):
    def half(x, sigma):
        return 0.5 * x

    x, frames = clip(*shape), shape[0] if len(shape) == 4 else shape[2]
    model = GuidedDenoiser(lambda x, sigma: x, half, 1.0, 3.0)
    wanted = guided(x, 0.5 * x, frame_guidance(1.0, 3.0, frames))
    torch.testing.assert_close(model(x, torch.ones(shape[0])), wanted)


def test_guidance_without_a_negative_side_is_refused():
    with pytest.raises(ValueError, match="guidance 1.0 to 2.0 needs an unconditional model"):
        GuidedDenoiser(Network(), None, 1.0, 2.0)
    assert GuidedDenoiser(Network(), None)(clip(), torch.ones(4)).shape == clip().shape
