"""The way back, guidance by frame and interval, schedules and scalings."""

import math

import pytest
import torch
from denoisers import Gaussian, Network, clip

from rewind.pipelines.denoiser import EDM, EPS, FLOW, V, edm_scalings, karras_sigmas, truncate_sigmas
from rewind.pipelines.videoshop.denoising import GuidedDenoiser, frame_guidance, guided, sample_euler


def test_euler_converges_to_the_exact_ode_solution_with_first_order():
    model, x0 = Gaussian(0.7), clip()
    errors = []
    for steps in (40, 80, 160):
        found = sample_euler(model, model.exact(x0, 20.0), karras_sigmas(steps, 0.01, 20.0), disable=True)
        errors.append(float((found - x0).norm() / x0.norm()))
    assert all(0.8 < math.log2(a / b) < 1.3 for a, b in zip(errors, errors[1:])), errors
    assert 0 not in model.levels and len(model.levels) == 40 + 80 + 160


def test_euler_refuses_a_rising_schedule_before_calling_the_network():
    model = Network()
    with pytest.raises(ValueError, match="fall to 0"):
        sample_euler(model, clip(), torch.tensor([0.0, 1.0]), disable=True)
    assert not model.levels


@pytest.mark.parametrize("shape", [(5, 4, 2, 2), (2, 4, 5, 2, 2)], ids=["4d", "5d"])
def test_guidance_is_linear_over_the_frames(shape):
    denoised, unconditional = torch.full(shape, 3.0), torch.full(shape, 1.0)
    mixed = guided(denoised, unconditional, frame_guidance(1.0, 3.0, 5))
    frames = mixed.movedim(0 if len(shape) == 4 else 2, 0).flatten(1)
    expected = 1 + 2 * torch.tensor([1.0, 1.5, 2.0, 2.5, 3.0])
    assert torch.allclose(frames, expected[:, None].expand_as(frames))
    with pytest.raises(ValueError, match="4"):
        guided(denoised, unconditional, frame_guidance(1, 1, 4))


def test_the_unconditional_side_is_called_only_where_it_matters():
    def run(first, last, interval=(0.0, math.inf)):
        positive, negative = Network(seed=1), Network(seed=2)
        model = GuidedDenoiser(positive, negative, first, last, interval)
        result = sample_euler(model, clip() * 20, karras_sigmas(10, 0.01, 20.0), disable=True)
        assert model.evaluations == len(positive.levels) + len(negative.levels)
        return result, negative.levels

    plain = sample_euler(Network(seed=1), clip() * 20, karras_sigmas(10, 0.01, 20.0), disable=True)
    result, called = run(1.0, 1.0)
    assert torch.equal(result, plain) and not called
    result, called = run(2.0, 2.0)
    assert not torch.allclose(result, plain) and len(called) == 10
    _, called = run(1.0, 3.0, (0.5, 5.0))
    assert called and all(0.5 <= level <= 5.0 for level in called) and len(called) < 10
    assert torch.equal(run(2.0, 2.0, (30.0, 40.0))[0], plain)


def test_guidance_without_a_negative_side_is_refused():
    with pytest.raises(ValueError, match="unconditional"):
        GuidedDenoiser(Network(), None, 1.0, 2.0)


def test_the_schedule_is_stable_video_diffusions():
    sigmas = karras_sigmas(25)
    assert len(sigmas) == 26 and sigmas[-1] == 0
    assert sigmas[[0, 1, 12, 15, 24]].tolist() == pytest.approx([700, 546, 15.59, 3.87, 0.002], rel=1e-3)
    assert torch.equal(truncate_sigmas(sigmas, 1.0), sigmas)
    assert len(truncate_sigmas(sigmas, 0.55)) == 14 and len(truncate_sigmas(sigmas, 1e-6)) == 2
    for strength in (0.0, 1.5):
        with pytest.raises(ValueError, match="strength"):
            truncate_sigmas(sigmas, strength)
    with pytest.raises(ValueError, match="0 steps"):
        karras_sigmas(0)
    with pytest.raises(ValueError, match="min"):
        karras_sigmas(5, 10.0, 1.0)


def test_the_scalings_and_skips_are_edms():
    sigma = torch.tensor([0.5, 3.0], dtype=torch.float64)
    c_skip, c_out, c_in, c_noise = edm_scalings(sigma)
    assert torch.allclose(c_skip + c_out**2, torch.ones(2, dtype=torch.float64))
    assert torch.allclose(c_in**2, c_skip) and torch.allclose(c_noise, sigma.log() / 4)
    assert V.c_skip(3.0) == pytest.approx(float(c_skip[1])) and EPS.c_skip(3.0) == FLOW.c_skip(0.3) == 1.0
    assert EDM(0.5).c_skip(3.0) == pytest.approx(0.25 / 9.25)
    assert FLOW.signal(0.25) == 0.75 and EPS.signal(700.0) == 1.0 and FLOW.noise_to_signal(1.0) == math.inf
