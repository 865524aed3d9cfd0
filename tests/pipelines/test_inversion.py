"""EDM inversion against denoisers whose exact inversion is known in closed form (see support/denoisers.py)."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from denoisers import Gaussian, clip, relative

from rewind.pipelines.denoiser import EDM, EPS, FLOW, V, karras_sigmas
from rewind.pipelines.videoshop.denoising import sample_euler
from rewind.pipelines.videoshop.inversion import GUESSES, sample_edm_inversion, sample_naive_inversion, solve_step

FAMILIES = {"eps": EPS, "v": V, "edm": EDM(0.5), "flow": FLOW}
families = pytest.mark.parametrize("path", FAMILIES.values(), ids=FAMILIES.keys())
VE_LEVELS, FLOW_LEVELS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0), (0.0, 0.2, 1 / 3, 0.5, 2 / 3, 0.8)  # of the same SNR


def levels(path, steps=5):
    """Levels whose noise-to-signal ratio is evenly spaced, up to 4."""
    ratio = torch.linspace(0, 4, steps + 1, dtype=torch.float64)
    return ratio / (1 + ratio) if path.kind == "flow" else ratio


def invert(model, x, sigmas, guess="extrapolation", **options):
    options = {"path": model.path, "guess_above": guess, "guess_below": guess, "disable": True} | options
    return sample_edm_inversion(model, x, sigmas, **options)


# --- one step --------------------------------------------------------------------------------------------------------

STEPS = ((0.0, 0.002), (0.5, 0.7), (2.0, 3.5), (546.0, 700.0))


@pytest.mark.parametrize("low, high", STEPS)
def test_the_step_of_v_prediction_is_the_papers_closed_form(low, high):
    x, guess, denoised = (clip(seed=seed) for seed in range(3))
    wanted = ((1 + high**2) * x - (high - low) / high * ((1 + high**2) * denoised - guess)) / (1 + low * high)
    torch.testing.assert_close(solve_step(x, denoised, guess, low, high, V.c_skip(high)), wanted)


@pytest.mark.parametrize("low, high", STEPS)
@pytest.mark.parametrize("path", (EPS, FLOW))
def test_without_a_skip_connection_the_direction_is_held(path, low, high):
    x, guess, denoised = (clip(seed=seed) for seed in range(3))
    wanted = x + (high - low) * (guess - denoised) / high
    torch.testing.assert_close(solve_step(x, denoised, guess, low, high, path.c_skip(high)), wanted)


@pytest.mark.parametrize("low, high", STEPS)
@pytest.mark.parametrize("sigma_data", (0.1, 0.5, 1.0, 3.0))
def test_the_step_solves_the_euler_step_with_f_held(low, high, sigma_data):
    x, guess, denoised = (clip(seed=seed) for seed in range(3))
    c_skip = EDM(sigma_data).c_skip(high)
    solved = solve_step(x, denoised, guess, low, high, c_skip)
    again = c_skip * solved + (denoised - c_skip * guess)  # D at the solution, with the guess's F
    torch.testing.assert_close(solved + (low - high) * (solved - again) / high, x)


# --- the whole way ---------------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("guess", ("extrapolation", "current", "last_direction"))
def test_it_converges_to_the_exact_inversion_at_first_order(path, guess):
    x, errors = clip(), []
    for steps in (40, 80, 160):
        model, sigmas = Gaussian(path, s=0.7, mu=0.3), levels(path, steps)
        errors.append(relative(invert(model, x, sigmas, guess), model.solution(x, float(sigmas[-1]))))
    assert errors[-1] < 0.03
    for coarse, fine in zip(errors, errors[1:]):
        assert 1.7 < coarse / fine < 2.3, errors


@families
@pytest.mark.parametrize("guess, order", [("current", 1), ("last_direction", 2)])
def test_the_round_trip_converges_at_the_order_of_the_guess(path, guess, order):
    """The current latent is wrong by O(h), the last direction carried on by O(h^2), one order more each."""
    x, errors = clip(), []
    for steps in (80, 160, 320):
        model, sigmas = Gaussian(path, s=0.7, mu=0.3), levels(path, steps)
        errors.append(relative(sample_euler(model, invert(model, x, sigmas, guess), sigmas.flip(0), disable=True), x))
    for coarse, fine in zip(errors, errors[1:]):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2), errors


@pytest.mark.parametrize("path, s", [(V, 1.0), (EDM(0.5), 0.5), (EDM(3.0), 3.0)])
@pytest.mark.parametrize("guess", GUESSES)
def test_data_of_the_models_own_variance_come_back_exactly_whatever_the_guess(path, s, guess):
    """F does not depend on x for data N(mu, sigma_data^2): why the paper normalises (closed form, no paper figure)."""
    x, sigmas, model = clip(), karras_sigmas(6), Gaussian(path, s, mu=0.3)
    inverted = invert(model, x, sigmas.flip(0), guess, noise=clip(seed=9))
    assert relative(inverted, invert(model, x, sigmas.flip(0), "current")) < 1e-10
    assert relative(sample_euler(model, inverted, sigmas, disable=True), x) < 1e-9


@pytest.mark.parametrize("guess", GUESSES)
def test_data_of_another_variance_do_not(guess):
    x, sigmas, model = clip(), karras_sigmas(6), Gaussian(V, s=0.4)
    inverted = invert(model, x, sigmas.flip(0), guess, noise=clip(seed=9))
    assert relative(sample_euler(model, inverted, sigmas, disable=True), x) > 1e-2


@families
@pytest.mark.parametrize("guess", GUESSES)
def test_with_refinement_the_way_back_is_the_inverse(path, guess):
    model, x, sigmas = Gaussian(path, s=0.7, mu=0.3), clip(), levels(path)
    refined = invert(model, x, sigmas, guess, noise=clip(seed=9), refine=200, tolerance=1e-13)
    assert relative(sample_euler(model, refined, sigmas.flip(0), disable=True), x) < 1e-10


@families
def test_each_refinement_brings_the_round_trip_nearer(path):
    model, x, sigmas = Gaussian(path, s=0.7, mu=0.3), clip(), levels(path)
    errors = []
    for refine in (0, 1, 3, 8):
        inverted = invert(model, x, sigmas, "current", refine=refine, tolerance=0.0)
        errors.append(relative(sample_euler(model, inverted, sigmas.flip(0), disable=True), x))
    assert all(more < 0.8 * less for less, more in zip(errors, errors[1:])), errors


# --- the guesses -----------------------------------------------------------------------------------------------------


def test_the_guesses_are_the_papers():
    """What the network is called at, level by level, on data for which all guesses find the same solution."""
    x, n, sigmas = clip(), clip(seed=9), torch.tensor(VE_LEVELS, dtype=torch.float64)
    states = [x]
    invert(Gaussian(V), x, sigmas, "current", callback=lambda step: states.append(step["x"]))
    guesses = {}
    for guess in GUESSES:
        model = Gaussian(V)
        invert(model, x, sigmas, guess, noise=n)
        guesses[guess] = [seen for seen, _ in model.seen]
    for i, (low, high) in enumerate(zip(VE_LEVELS, VE_LEVELS[1:])):
        torch.testing.assert_close(guesses["current"][i], states[i])
        torch.testing.assert_close(guesses["random"][i], x + high * n)
        noise = (states[i] - x) / low if i else torch.zeros_like(x)
        torch.testing.assert_close(guesses["extrapolation"][i], x + high * noise)
        slope = (states[i] - states[i - 1]) / (low - VE_LEVELS[i - 1]) if i else torch.zeros_like(x)
        torch.testing.assert_close(guesses["last_direction"][i], states[i] + (high - low) * slope)


def test_on_a_flow_the_guesses_scale_the_signal():
    x, n, sigmas = clip(), clip(seed=9), torch.tensor((*FLOW_LEVELS, 1.0), dtype=torch.float64)
    model, states = Gaussian(FLOW), [x]
    invert(model, x, sigmas, "extrapolation", callback=lambda step: states.append(step["x"]))
    for i, (low, high) in enumerate(zip(FLOW_LEVELS[1:], (*FLOW_LEVELS[2:], 1.0)), 1):
        noise = (states[i] - (1 - low) * x) / low
        torch.testing.assert_close(model.seen[i][0], (1 - high) * x + high * noise)
    model = Gaussian(FLOW)
    invert(model, x, sigmas, "random", noise=n)
    for high, (seen, _) in zip((*FLOW_LEVELS[1:], 1.0), model.seen):
        torch.testing.assert_close(seen, (1 - high) * x + high * n)


@pytest.mark.parametrize("path, values", [(EPS, VE_LEVELS), (V, VE_LEVELS), (EDM(0.5), VE_LEVELS), (FLOW, FLOW_LEVELS)])
@pytest.mark.parametrize("threshold, random_steps", [(0.0, 1), (0.3, 2), (1.0, 4), (2.0, 5)])
def test_the_threshold_means_the_same_for_each_family(path, values, threshold, random_steps):
    """It is compared with the LOWER level's noise-to-signal ratio, strictly (the authors' code)."""
    x, n, model = clip(), clip(seed=9), Gaussian(path, s=0.7)
    options = {"guess_above": "current", "guess_below": "random", "threshold": threshold, "noise": n}
    invert(model, x, torch.tensor(values, dtype=torch.float64), **options)
    is_random = [
        torch.allclose(seen, path.signal(high) * x + high * n) for (seen, _), high in zip(model.seen, values[1:])
    ]
    assert is_random == [i < random_steps for i in range(5)]


# --- calls, callback, refinement's report ----------------------------------------------------------------------------


@families
@pytest.mark.parametrize("guess", GUESSES)
def test_one_network_call_a_step_at_the_higher_level(path, guess):
    model, sigmas = Gaussian(path), levels(path)  # the denoiser itself refuses level 0
    invert(model, clip(), sigmas, guess, noise=clip(seed=9))
    assert model.sigmas == pytest.approx(sigmas[1:].tolist())


def test_refinement_costs_what_it_says():
    model, sigmas, told = Gaussian(EPS, s=0.7), levels(EPS), []
    invert(model, clip(), sigmas, refine=3, tolerance=0.0, callback=told.append)
    assert len(model.seen) == told[-1]["evaluations"] == 5 * 4
    assert model.sigmas == pytest.approx([s for s in sigmas[1:].tolist() for _ in range(4)])


def test_refinement_stops_where_nothing_is_left_to_do():
    model, told = Gaussian(V), []  # any guess is exact: one iteration to see it
    invert(model, clip(), levels(V), "current", refine=9, callback=told.append)
    assert told[-1]["evaluations"] == 5 * 2 and all(step["residual"] < 1e-12 for step in told)


def test_the_residual_is_that_of_the_fixed_point():
    """One undamped iteration by hand: |again - solved| / |solved|."""
    model, x, told = Gaussian(EPS, s=0.7), clip(), []
    sigma = torch.tensor([2.0], dtype=torch.float64).expand(4)
    solved = solve_step(x, model(x, sigma), x, 0.0, 2.0, 1.0)
    again = solve_step(x, model(solved, sigma), solved, 0.0, 2.0, 1.0)
    two = torch.tensor([0.0, 2.0])
    result = invert(model, x, two, "current", refine=1, damping=0.25, tolerance=0.0, callback=told.append)
    assert told[0]["residual"] == pytest.approx(relative(again, solved))
    torch.testing.assert_close(result, 0.25 * solved + 0.75 * again)


def test_the_callback_is_told_each_step():
    model, sigmas, told = Gaussian(EPS, s=0.7), levels(EPS), []
    result = invert(model, clip(), sigmas, callback=told.append)
    assert [step["i"] for step in told] == list(range(5))
    assert [step["sigma"] for step in told] == sigmas[1:].tolist()
    assert [step["sigma_low"] for step in told] == sigmas[:-1].tolist()
    assert [step["evaluations"] for step in told] == [1, 2, 3, 4, 5]
    assert all(step["residual"] is None for step in told)
    torch.testing.assert_close(told[-1]["x"], result)
    for step, (seen, sigma) in zip(told, model.seen):
        torch.testing.assert_close(step["denoised"], Gaussian(EPS, s=0.7)(seen, sigma))


def test_extra_arguments_reach_the_network():
    calls = []

    def model(x, sigma, **extra):
        calls.append(extra)
        return 0.5 * x

    sample_edm_inversion(model, clip(), levels(V), {"seed": 3}, guess_below="current", disable=True)
    assert calls == [{"seed": 3}] * 5


# --- kinds of input --------------------------------------------------------------------------------------------------

SHAPES = ((4, 4, 3, 5), (2, 4, 3, 5, 6))
DTYPES = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-6}


@pytest.mark.parametrize("shape, dtype", list(product(SHAPES, DTYPES)))
@families
def test_dtypes_and_shapes(path, shape, dtype):
    """The result is as near the float64 one as the dtype can tell."""
    x, noise = clip(*shape, dtype=dtype), clip(*shape, seed=9, dtype=dtype)
    options = {"guess_below": "random", "refine": 1, "tolerance": 0.0}
    model = Gaussian(path, s=0.7)
    result = invert(model, x, levels(path), noise=noise, **options)
    assert result.dtype == dtype and result.shape == x.shape
    assert all(seen.dtype == dtype and seen.shape == x.shape for seen, _ in model.seen)
    wanted = invert(Gaussian(path, s=0.7), x.double(), levels(path), noise=noise.double(), **options)
    assert relative(result, wanted) < DTYPES[dtype]


def test_a_batch_of_clips_is_each_clip_alone():
    x, noise = clip(2, 4, 3, 5, 6), clip(2, 4, 3, 5, 6, seed=9)
    both = invert(Gaussian(EPS, s=0.7), x, levels(EPS), guess_below="random", noise=noise)
    for i in range(2):
        alone = invert(Gaussian(EPS, s=0.7), x[i : i + 1], levels(EPS), guess_below="random", noise=noise[i : i + 1])
        torch.testing.assert_close(both[i : i + 1], alone)


def test_half_precision_does_not_pile_up_over_steps():
    """The state is kept in float32: 400 steps of bfloat16 lose no more than a few of them do."""
    x = clip(dtype=torch.bfloat16)
    sigmas, zero = torch.linspace(0, 2, 401, dtype=torch.float64), lambda x, sigma: torch.zeros_like(x)
    told = []
    sample_edm_inversion(zero, x, sigmas, path=EPS, guess_below="current", disable=True, callback=told.append)
    exact = x.double()
    for low, high in zip(sigmas.tolist(), sigmas.tolist()[1:]):
        exact = exact + (1 - low / high) * exact.to(torch.bfloat16).double()
    assert all(step["x"].dtype == torch.float32 for step in told)
    assert relative(told[-1]["x"], exact) < 5e-3


@pytest.mark.parametrize("refine", (0, 2))
def test_it_is_deterministic_and_leaves_its_inputs_alone(refine):
    x, noise, sigmas = clip(dtype=torch.float32), clip(seed=9, dtype=torch.float32), levels(V)
    before = [v.clone() for v in (x, noise, sigmas)]
    torch.manual_seed(1)
    first = invert(Gaussian(V, s=0.7), x, sigmas, "extrapolation", guess_below="random", noise=noise, refine=refine)
    torch.manual_seed(2)
    second = invert(Gaussian(V, s=0.7), x, sigmas, "extrapolation", guess_below="random", noise=noise, refine=refine)
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, noise, sigmas)))


# --- the host's own naive way ----------------------------------------------------------------------------------------


@families
def test_naive_inversion_is_forward_euler_at_the_lower_level(path):
    model, x, sigmas, told = Gaussian(path, s=0.7, mu=0.3), clip(), levels(path), []
    result = sample_naive_inversion(model, x, sigmas, callback=told.append, disable=True)
    flipped = [1e-4, *sigmas.tolist()[1:]]
    assert model.sigmas == pytest.approx(flipped[:-1])
    wanted, euler = x, Gaussian(path, s=0.7, mu=0.3)
    for low, high in zip(flipped, flipped[1:]):
        d = (wanted - euler(wanted, torch.full((4,), low, dtype=torch.float64))) / low
        wanted = wanted + d * (high - low)
    torch.testing.assert_close(result, wanted)
    assert len(told) == 5 and torch.equal(told[-1]["x"], result)


@families
def test_naive_inversion_converges_to_the_exact_one(path):
    x, errors = clip(), []
    for steps in (40, 80, 160):
        model, sigmas = Gaussian(path, s=0.7, mu=0.3), levels(path, steps)
        result = sample_naive_inversion(model, x, sigmas, disable=True)
        errors.append(relative(result, model.solution(x, float(sigmas[-1]))))
    assert all(1.6 < coarse / fine < 2.4 for coarse, fine in zip(errors, errors[1:])), errors


# --- bad input -------------------------------------------------------------------------------------------------------

RISING = torch.tensor([0.0, 1.0, 2.0])
BAD = {
    "descending": ({"sigmas": RISING.flip(0)}, r"must rise from 0, got 3 from \[2.0\] to \[0.0\]: flip"),
    "not from 0": ({"sigmas": RISING[1:]}, "must rise from 0, got 2 from"),
    "repeated": ({"sigmas": torch.tensor([0.0, 1.0, 1.0])}, "must rise from 0"),
    "one level": ({"sigmas": torch.zeros(1)}, "must rise from 0, got 1 from"),
    "no levels": ({"sigmas": torch.zeros(0)}, "must rise from 0, got 0 from"),
    "NaN level": ({"sigmas": torch.tensor([0.0, math.nan])}, "must rise from 0"),
    "infinite level": ({"sigmas": torch.tensor([0.0, math.inf])}, "must rise from 0"),
    "3-D": ({"x": torch.zeros(4, 3, 5)}, r"shape \(4, 3, 5\); a clip is \[T, C, h, w\]"),
    "empty": ({"x": torch.zeros(0, 4, 3, 5)}, "empty latent of shape"),
    "NaN": ({"x": torch.full((4, 4, 3, 5), math.nan)}, "NaN or infinite"),
}
BAD_OPTIONS = {
    "guess": ({"guess_above": "best"}, '"best"; it must be one of extrapolation, random, current, last_direction'),
    "no noise": ({"guess_below": "random"}, r"needs noise of the clip's shape \(4, 4, 3, 5\), got None"),
    "noise": ({"guess_below": "random", "noise": clip(4, 4, 3, 4)}, r"got \(4, 4, 3, 4\)"),
    "NaN noise": ({"guess_below": "random", "noise": clip() * math.nan}, "the noise of the guess"),
    "refine": ({"refine": -1}, "-1 refinements with damping 0.5"),
    "damping": ({"damping": 1.0}, "0 <= damping < 1"),
    "flow above 1": ({"path": FLOW}, "go up to 2; a flow's end at 1"),
}


@pytest.mark.parametrize("change, message", (BAD | BAD_OPTIONS).values(), ids=(BAD | BAD_OPTIONS).keys())
def test_bad_input(change, message):
    model = Gaussian(V)
    given = {"x": clip(), "sigmas": RISING, "guess_below": "current", "path": V, "disable": True} | change
    with pytest.raises(ValueError, match=message):
        sample_edm_inversion(model, **given)
    assert not model.seen, "before any work"


@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD.keys())
def test_bad_input_of_the_naive_way(change, message):
    with pytest.raises(ValueError, match=message):
        sample_naive_inversion(Gaussian(V), **{"x": clip(), "sigmas": RISING, "disable": True} | change)


def test_the_naive_way_needs_a_first_level_below_the_next():
    with pytest.raises(ValueError, match="replaces 0 is 0.0001; it must lie between 0 and the next, 5e-05"):
        sample_naive_inversion(Gaussian(V), clip(), torch.tensor([0.0, 5e-5, 1.0]), disable=True)
