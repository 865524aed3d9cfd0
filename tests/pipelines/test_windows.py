"""Clips longer than the model, in overlapping windows: which frames are in one, and what becomes of what they share."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny_svd
import torch
from denoisers import relative

from rewind.pipelines.videoshop.pipeline import VideoshopPipeline
from rewind.pipelines.videoshop.settings import VideoshopSettings
from rewind.pipelines.videoshop.windows import in_windows, pyramid, windows

FRAMES = 10
PLAIN = VideoshopSettings(steps=3, strength=1.0, sigma_max=20.0, augmentation=0.0, context_length=4, context_overlap=1)
VIDEO = torch.cat([tiny_svd.video(seed) for seed in range(3)])[:FRAMES]
EDITED = tiny_svd.video(9)[0]


@pytest.fixture(scope="module")
def pipeline() -> VideoshopPipeline:
    return VideoshopPipeline(*tiny_svd.components())


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- which frames -----------------------------------------------------------------------------------------------------


def test_windows_are_static_and_of_one_length():
    assert windows(32, 8) == [(start, start + 8) for start in range(0, 25, 4)]
    assert windows(10, 8) == [(0, 8), (2, 10)] and windows(8, 8) == windows(8, 9) == windows(8, 0) == [(0, 8)]
    assert windows(10, 4, 0) == [(0, 4), (4, 8), (6, 10)] and windows(10, 4, 1) == [(0, 4), (3, 7), (6, 10)]
    assert windows(10, 4, 9) == windows(10, 4, 2), "at most half of a window"
    assert pyramid(8).tolist() == [1, 2, 3, 4, 4, 3, 2, 1] and pyramid(5).tolist() == [1, 2, 3, 2, 1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"context_length": 1}, "context_length is 1; it must be at least 2, or 0 for the whole clip"),
        ({"context_length": -4}, "context_length is -4"),
        ({"context_overlap": -1}, "context_overlap is -1; it must be at least 0"),
        ({"context_length": 8, "frames_at_once": 8}, "a clip goes in parts or in windows, set one of them to 0"),
    ],
)
def test_windows_that_cannot_be_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        VideoshopSettings(**values)


# --- what becomes of them ---------------------------------------------------------------------------------------------


def test_windows_average_what_the_model_makes_of_each():
    asked = []

    def denoiser(x, sigma, gain):
        asked.append((len(x), sigma.tolist()))
        return gain * x + len(asked)

    x, sigma = torch.randn(6, 4, 2, 3, generator=generator()), torch.arange(6.0)
    averaged = in_windows(denoiser, 4)(x, sigma, gain=2.0)
    assert asked == [(4, [0.0, 1.0, 2.0, 3.0]), (4, [2.0, 3.0, 4.0, 5.0])]
    share = torch.tensor([1, 1, (2 * 1 + 1 * 2) / 3, (1 * 1 + 2 * 2) / 3, 2, 2])[:, None, None, None]
    torch.testing.assert_close(averaged, 2 * x + share)
    assert in_windows(denoiser, 0) is denoiser
    asked.clear()
    assert torch.equal(in_windows(denoiser, 6)(x, sigma, gain=2.0), 2 * x + 1), "a single one is the denoiser itself"


def test_a_clip_that_fits_one_window_is_edited_as_without(pipeline):
    results = [
        pipeline(VIDEO[:4], EDITED, replace(PLAIN, context_length=length), generator(), progress=False)
        for length in (0, 4)
    ]
    assert torch.equal(results[0].latents, results[1].latents)
    assert results[0].evaluations == results[1].evaluations == {"inversion": 3, "denoising": 3}


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_no_window_is_longer_than_asked_and_all_are_counted(pipeline, guidance):
    """There and back, on both sides of the guidance; what the callback is told is what was paid."""
    shapes, told = [], []
    hook = pipeline.unet.register_forward_hook(lambda module, given, _: shapes.append(given[0].shape[1]))
    settings = replace(PLAIN, last_guidance=guidance)
    result = pipeline(VIDEO, EDITED, settings, generator(), progress=False, callback=told.append)
    hook.remove()
    assert set(shapes) == {4} and result.frames.shape == VIDEO.shape
    back = 9 if guidance == 1 else 18
    assert result.evaluations == {"inversion": 9, "denoising": back} and len(shapes) == 9 + back
    assert [step["evaluations"] for step in told] == [3, 6, 9, *(range(3, 10, 3) if guidance == 1 else range(6, 19, 6))]
    whole = pipeline(VIDEO, EDITED, replace(settings, context_length=0), generator(), progress=False)
    assert relative(result.latents, whole.latents) > 1e-3


def test_guidance_runs_over_the_clip_and_not_over_each_window(pipeline):
    """The middle of a clip gets the middle of the guidance, whichever windows it lies in."""
    inversion = pipeline.invert(VIDEO, PLAIN, generator())
    one_step = replace(PLAIN, steps=1, first_guidance=1.0, last_guidance=4.0)
    single = replace(inversion, sigmas=inversion.sigmas[[0, -1]])
    plain, guided = (pipeline.denoise(single, EDITED, s) for s in (replace(one_step, last_guidance=1.0), one_step))
    flat = pipeline.denoise(single, EDITED, replace(one_step, first_guidance=2.0, last_guidance=2.0))
    weights = torch.linspace(1, 4, FRAMES)[:, None, None, None]
    torch.testing.assert_close(guided - plain, (weights - 1) * (flat - plain), rtol=1e-3, atol=1e-4)


def test_an_unedited_clip_comes_back():
    """By a network that depends little on its input, so that refinement converges."""
    calm = VideoshopPipeline(*tiny_svd.components(strength=0.1))
    settings = replace(PLAIN, refine=20, damping=0.0, tolerance=1e-6)
    back = calm(VIDEO, VIDEO[0], settings, generator(), progress=False)
    assert relative(back.latents, calm.encode(VIDEO)) < 1e-4


def test_outside_a_mask_the_source_comes_back_in_windows_too(pipeline):
    mask = torch.zeros(1, *VIDEO.shape[2:])
    mask[:, :8, :8] = 1
    result = pipeline(VIDEO, EDITED, PLAIN, generator(), progress=False, mask=mask)
    outside = torch.ones_like(result.latents, dtype=torch.bool)
    outside[:, :, :1, :1] = False
    assert torch.equal(result.latents[outside], result.inversion.source[outside])
    assert not torch.equal(result.latents[~outside], result.inversion.source[~outside])
