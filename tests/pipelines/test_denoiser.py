"""Noise paths, Stable Video Diffusion's scalings, and the schedule."""

from __future__ import annotations

import math

import pytest
import torch

from rewind.pipelines.denoiser import COSMOS, DDPM, EDM, EPS, FLOW, V, edm_scalings, karras_sigmas, truncate_sigmas

# 25 Karras steps of Stable Video Diffusion, as printed by the authors' scheduler, lowest first.
SVD_LEVELS = (0.002, 0.0079, 0.0248, 0.0664, 0.157, 0.339, 0.678, 1.273, 2.269, 3.870, 6.354, 10.10, 15.59, 23.5, 34.5)


@pytest.mark.parametrize("path, at_03, ratio", [(EPS, 1.0, 0.3), (V, 1.0, 0.3), (FLOW, 0.7, 0.3 / 0.7)])
def test_signal_and_noise(path, at_03, ratio):
    assert path.signal(0.3) == pytest.approx(at_03)
    assert path.noise_to_signal(0.3) == pytest.approx(ratio)
    assert path.noise_to_signal(0.0) == 0


def test_a_flow_at_level_1_is_all_noise():
    assert FLOW.signal(1.0) == 0 and FLOW.noise_to_signal(1.0) == math.inf


def test_c_skip():
    assert EPS.c_skip(3.0) == FLOW.c_skip(0.3) == 1
    assert V.c_skip(3.0) == pytest.approx(0.1)
    assert EDM(0.5).c_skip(1.5) == pytest.approx(0.1)
    assert COSMOS.c_skip(3.0) == pytest.approx(0.25) and COSMOS.signal(3.0) == 1


def test_in_vp_coordinates_a_denoiser_is_shown_the_clip_scaled_down():
    """x = alpha x0 + sqrt(1 - alpha^2) n, the form of DDPM, is VE's x0 + sigma n times alpha; others see x itself."""
    generator = torch.Generator().manual_seed(0)
    x0, n = (torch.randn(2, 3, 4, 5, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    alpha = torch.tensor([0.9, 1e-3], dtype=torch.float64)
    sigma, wide = torch.sqrt(1 - alpha**2) / alpha, alpha.view(-1, 1, 1, 1, 1)
    x = x0 + sigma.view_as(wide) * n
    torch.testing.assert_close(DDPM.shown(x, sigma), wide * x0 + torch.sqrt(1 - wide**2) * n)
    assert all(path.shown(x, sigma) is x for path in (EPS, V, FLOW, COSMOS))
    assert DDPM.c_skip(3.0) == V.c_skip(3.0) and DDPM.signal(3.0) == 1


def test_the_scalings_keep_unit_variance():
    """EDM's own requirements at sigma_data 1 (its appendix B.6): the network's input and target have variance 1."""
    sigma = torch.tensor([0.002, 0.3, 1.0, 15.0, 700.0], dtype=torch.float64)
    c_skip, c_out, c_in, c_noise = edm_scalings(sigma)
    one = torch.ones_like(sigma)
    torch.testing.assert_close(c_in**2 * (1 + sigma**2), one)  # input c_in (x0 + sigma n)
    # target F = (x0 - c_skip (x0 + sigma n)) / c_out
    torch.testing.assert_close(((1 - c_skip) ** 2 + c_skip**2 * sigma**2) / c_out**2, one)
    torch.testing.assert_close(c_skip, torch.tensor([V.c_skip(float(s)) for s in sigma], dtype=torch.float64))
    assert (c_out < 0).all()  # v-prediction: F is v, not -v
    torch.testing.assert_close(torch.exp(4 * c_noise), sigma)


def test_the_schedule_is_svds():
    sigmas = karras_sigmas(25)
    assert sigmas.shape == (26,) and sigmas[0] == pytest.approx(700) and sigmas[-1] == 0
    rising = sigmas.flip(0)[1 : 1 + len(SVD_LEVELS)].tolist()
    assert rising == pytest.approx(SVD_LEVELS, rel=5e-3)


def test_the_schedule_is_diffusers():
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(
        prediction_type="v_prediction",
        timestep_type="continuous",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
        timestep_spacing="leading",
    )
    scheduler.set_timesteps(12)
    torch.testing.assert_close(karras_sigmas(12).float(), scheduler.sigmas, rtol=1e-5, atol=0)


@pytest.mark.parametrize("strength, steps, start", [(0.4, 10, 3.87), (0.55, 13, 15.59), (0.7, 17, 70.5), (1, 25, 700)])
def test_strength_is_the_authors_rule(strength, steps, start):
    sigmas = truncate_sigmas(karras_sigmas(25), strength)
    assert len(sigmas) == steps + 1 and sigmas[-1] == 0
    assert float(sigmas[0]) == pytest.approx(start, rel=2e-3)


def test_some_step_always_remains():
    assert len(truncate_sigmas(karras_sigmas(4), 0.1)) == 2


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: karras_sigmas(0), "got 0 steps"),
        (lambda: karras_sigmas(5, sigma_min=0), "sigma_min 0 and sigma_max 700"),
        (lambda: karras_sigmas(5, sigma_max=0.001), "0 < min < max"),
        (lambda: truncate_sigmas(karras_sigmas(5), 0.0), "strength is 0.0; it must be above 0"),
        (lambda: truncate_sigmas(karras_sigmas(5), 1.2), "strength is 1.2"),
        (lambda: truncate_sigmas(karras_sigmas(5), math.nan), "strength is nan"),
    ],
)
def test_bad_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()
