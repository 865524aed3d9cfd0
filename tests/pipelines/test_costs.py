"""What is told of costs is what they turn out to be."""

from __future__ import annotations

import math
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from mask_memory import MASKS, taken_by

from rewind.pipelines.denoiser import karras_sigmas
from rewind.pipelines.evaluation.memory import in_words
from rewind.pipelines.videoshop.costs import (
    FLOAT,
    denoising_evaluations,
    evaluations_in_words,
    flow_bytes,
    inversion_evaluations,
    mask_bytes,
)
from rewind.pipelines.videoshop.denoising import GuidedDenoiser, sample_euler
from rewind.pipelines.videoshop.inversion import sample_edm_inversion
from rewind.pipelines.videoshop.trajectory import empty_trajectory, trajectory_bytes

CLIP = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("refine", [0, 1, 3])
@pytest.mark.parametrize("tolerance", [0.0, math.inf])
def test_an_inversion_takes_as_many_evaluations_as_are_told(refine, tolerance):
    calls = []

    def model(x, sigma):
        calls.append(1)
        return 0.5 * x

    sigmas = karras_sigmas(6, 0.1, 10.0).flip(0)
    sample_edm_inversion(
        model, CLIP, sigmas, disable=True, noise=torch.randn_like(CLIP), refine=refine, tolerance=tolerance
    )
    fewest, most = inversion_evaluations(6, refine)
    assert len(calls) == (most if tolerance == 0 else fewest)
    assert inversion_evaluations(6, refine, sides=2) == (2 * fewest, 2 * most)


@pytest.mark.parametrize(
    ("first", "last", "interval"),
    [(1, 1, (0, math.inf)), (1, 3, (0, math.inf)), (2, 2, (0.5, 4.0)), (4, 1, (20.0, 30.0)), (1, 1, (0.5, 4.0))],
)
def test_the_way_back_takes_as_many_evaluations_as_are_told(first, last, interval):
    sigmas = karras_sigmas(7, 0.1, 10.0)
    model = GuidedDenoiser(lambda x, s: 0.5 * x, lambda x, s: 0.4 * x, first, last, interval)
    sample_euler(model, CLIP, sigmas, disable=True)
    assert denoising_evaluations(sigmas, first, last, interval) == model.evaluations


def test_numbers_are_told_in_words():
    assert evaluations_in_words(1) == "1 network evaluation"
    assert evaluations_in_words(13) == evaluations_in_words(13, 13) == "13 network evaluations"
    assert evaluations_in_words(26, 52) == "26 to 52 network evaluations"
    told = [in_words(size) for size in (0, 1023, 2048, 30_408_704, 1.5 * 2**30, 200 * 2**30)]
    assert told == ["0 bytes", "1023 bytes", "2 KiB", "29 MiB", "1.5 GiB", "200 GiB"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_trajectory_takes_the_memory_that_is_told(dtype):
    sigmas = karras_sigmas(5)
    states = empty_trajectory(CLIP, sigmas, dtype)
    assert states.shape == (6, *CLIP.shape) and states.dtype == dtype and states.device.type == "cpu"
    assert states.untyped_storage().nbytes() == trajectory_bytes(CLIP.shape, 5, dtype)
    assert torch.equal(states[0], CLIP.to(dtype))


def test_noise_that_half_precision_cannot_hold_is_refused_before_any_work():
    assert empty_trajectory(CLIP, torch.tensor([700.0, 0.0]), torch.float16) is not None
    with pytest.raises(ValueError, match="go up to 6000, which float16 may not hold: .* bfloat16 or float32"):
        empty_trajectory(CLIP, torch.tensor([6000.0, 0.0]), torch.float16)
    assert empty_trajectory(CLIP, torch.tensor([6000.0, 0.0]), torch.bfloat16) is not None


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells what a process holds")
@pytest.mark.parametrize("name", MASKS)
def test_a_mask_takes_the_memory_that_is_told(name, monkeypatch):
    """No more, and at least half of it; without the clip's copy, which is the node's."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**16))  # GNU's allocator then gives back what is free
    work = MASKS[name]
    frames, _, height, width = work["size"]
    told = flow_bytes(height, width, work["learned"])
    if not work["learned"]:
        told += mask_bytes(frames, height, width, work["feather"]) - 3 * FLOAT * frames * height * width
    with get_context("spawn").Pool(1) as pool:
        taken = pool.apply(taken_by, (name,))
    assert told / 2 < taken < told, (in_words(taken), in_words(told))
