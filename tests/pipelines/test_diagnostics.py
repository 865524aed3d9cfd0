"""The measures of an inversion, on trajectories and noise that are known."""

import pytest
import torch

from rewind.pipelines.videoshop.diagnostics import frame_errors, inverted_noise, noise_statistics, step_cosines


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_step_cosines_of_a_line_a_corner_and_a_stop():
    east, north = torch.zeros(2, 1, 1, 1, 2)
    east[..., 0], north[..., 1] = 1, 1
    corners = torch.stack([0 * east, east, 3 * east, 3 * east + north, 3 * east + north])
    wanted = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.float64)
    assert torch.equal(step_cosines(corners), wanted)


@pytest.mark.parametrize("shape", [(5, 4, 32, 32), (1, 4, 5, 32, 32)], ids=str)
@pytest.mark.parametrize("sigma, signal", [(7.0, 1.0), (0.6, 0.4)])
def test_the_noise_of_a_mixture_is_found_and_measured(shape, sigma, signal):
    clean, noise = randn(*shape), 0.5 * randn(*shape, seed=1)
    found = inverted_noise(signal * clean + sigma * noise, clean, sigma, signal)
    torch.testing.assert_close(found, noise, rtol=0, atol=1e-5)
    deviation, correlation = noise_statistics(found, clean)
    assert deviation.shape == correlation.shape == (5,)
    torch.testing.assert_close(deviation, torch.full((5,), 0.5, dtype=torch.float64), rtol=0, atol=0.03)
    assert float(correlation.abs().max()) < 0.06
    _, correlation = noise_statistics(found + clean, clean)
    torch.testing.assert_close(correlation, torch.full((5,), 0.894, dtype=torch.float64), rtol=0, atol=0.02)


@pytest.mark.parametrize("axis, shape", [(0, (3, 4, 8, 8)), (2, (1, 4, 3, 8, 8))])
def test_frame_errors_are_those_of_each_frame(axis, shape):
    reference = randn(*shape)
    factors = torch.tensor([1.0, 1.1, 2.0]).view([3 if i == axis else 1 for i in range(len(shape))])
    wanted = torch.tensor([0.0, 0.1, 1.0], dtype=torch.float64)
    torch.testing.assert_close(frame_errors(reference * factors, reference), wanted, rtol=0, atol=1e-6)
