"""Clips longer than the model, in parts: which frames are in one, what it is told of, and that all come back."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny_svd
import torch
from denoisers import relative

from rewind.pipelines.videoshop.inversion import Inversion
from rewind.pipelines.videoshop.inversion_file import load_inversion, save_inversion
from rewind.pipelines.videoshop.latents import normalise
from rewind.pipelines.videoshop.parts import Recorder, guidance_of, own, part_of, parts, parts_of
from rewind.pipelines.videoshop.pipeline import VideoshopPipeline
from rewind.pipelines.videoshop.settings import VideoshopSettings
from rewind.pipelines.videoshop.svd import SVDDenoiser

FRAMES = 10
PLAIN = VideoshopSettings(steps=3, strength=1.0, sigma_max=20.0, augmentation=0.0, frames_at_once=4)
VIDEO = torch.cat([tiny_svd.video(seed) for seed in range(3)])[:FRAMES]
EDITED = tiny_svd.video(9)[0]
SPANS = [(0, 4), (3, 7), (6, 10)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pipeline() -> VideoshopPipeline:
    return VideoshopPipeline(*tiny_svd.components())


# --- which frames -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", range(2, 9))
@pytest.mark.parametrize("frames", [2, 3, 8, 9, 31, 32])
def test_parts_cover_a_clip_share_one_frame_and_are_clips_themselves(frames, at_once):
    found = parts(frames, at_once)
    assert [i for part in found for i in range(frames)[own(part)]] == list(range(frames))
    sizes = [stop - start for start, stop in found]
    assert 2 <= min(sizes) and max(sizes) <= at_once and max(sizes) - min(sizes) <= 1
    assert all(after[0] == before[1] - 1 for before, after in zip(found, found[1:]))
    assert len(found) == max(1, -(-(frames - 1) // (at_once - 1))), "as few as can be"


def test_without_a_number_the_clip_is_one_part():
    assert parts(100, 0) == [(0, 100)]


@pytest.mark.parametrize("at_once", [1, -4])
def test_numbers_of_frames_that_make_no_parts_are_refused(at_once):
    with pytest.raises(ValueError, match=f"frames_at_once is {at_once}; it must be at least 2, or 0"):
        VideoshopSettings(frames_at_once=at_once)


def test_guidance_runs_over_the_whole_clip():
    whole = torch.linspace(1, 3, FRAMES)
    for start, stop in SPANS:
        assert torch.allclose(
            torch.linspace(*guidance_of(1, 3, (start, stop), FRAMES), stop - start), whole[start:stop]
        )


@pytest.mark.parametrize("kind", ["channel", "frame"])
def test_a_part_of_an_inversion_holds_its_own_frames(kind):
    source = torch.randn(FRAMES, 4, 2, 3)
    clean, normalisation = normalise(source, kind)
    states, sigmas = torch.randn(4, FRAMES, 4, 2, 3), torch.tensor([3.0, 2.0, 1.0, 0.0])
    joins = Recorder(clean, sigmas, SPANS, None).joins
    joins[1:] = torch.randn(3, 2, 4, 2, 3)
    settings = {"frames_at_once": 4}
    whole = Inversion(
        states[-1], sigmas, normalisation, states, settings=settings, source=source, original=2 * source, joins=joins
    )
    assert parts_of(whole) == SPANS
    for number, (start, stop) in enumerate(SPANS):
        part = part_of(whole, number)
        expected = states[:, start:stop].clone()
        if number:
            expected[:, 0] = joins[:, number - 1]
            torch.testing.assert_close(joins[0, number - 1], clean[start])
        assert torch.equal(part.trajectory, expected) and torch.equal(part.latent, expected[-1])
        assert torch.equal(part.original, 2 * part.source) and torch.equal(part.source, source[start:stop])
        torch.testing.assert_close(part.normalisation.undo(clean[start:stop]), part.source)
        assert part_of(part, 0) is part
    alone = replace(whole, settings={}, joins=None)
    assert part_of(alone, 0) is alone and Recorder(clean, sigmas, [(0, FRAMES)], None).joins is None


def test_an_inversion_of_another_kind_of_latents_is_one_part():
    video = Inversion(torch.zeros(1, 16, 9, 2, 2), torch.tensor([1.0, 0.0]), settings={"frames_at_once": 4})
    assert parts_of(video) == [(0, 1)]


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """What the network was called with."""
    made, call = [], SVDDenoiser.__call__

    def kept(denoiser, x, sigma):
        made.append(SimpleNamespace(x=x, frame=denoiser.image_latents, embedding=denoiser.embedding))
        return call(denoiser, x, sigma)

    monkeypatch.setattr(SVDDenoiser, "__call__", kept)
    return made


def test_each_part_is_told_of_the_frame_that_it_shares(pipeline, calls):
    inversion = pipeline.invert(VIDEO, PLAIN, generator())
    steps = len(inversion.sigmas) - 1
    assert [len(call.x) for call in calls] == 3 * steps * [4]
    source, first = pipeline.encode(VIDEO) / pipeline.scaling_factor, calls[0]
    for call, (start, _) in zip(calls[::steps], SPANS, strict=True):
        torch.testing.assert_close(call.frame[0], source[start])
        assert torch.equal(call.embedding, first.embedding)

    calls.clear()
    edited = pipeline.denoise(inversion, EDITED, PLAIN) / pipeline.scaling_factor
    torch.testing.assert_close(calls[0].frame, pipeline.encode(EDITED[None]) / pipeline.scaling_factor)
    for call, (start, _) in zip(calls[steps::steps], SPANS[1:], strict=True):
        torch.testing.assert_close(call.frame[0], edited[start])
    assert torch.equal(calls[0].embedding, calls[-1].embedding)


def test_parts_of_the_same_frames_find_the_same_noise(pipeline):
    """They share one random direction."""
    still = VIDEO[:1].expand(7, -1, -1, -1)
    both = pipeline.invert(still, PLAIN, generator())
    first, second = (part_of(both, number).latent for number in (0, 1))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)
    apart = pipeline.invert(still, replace(PLAIN, frames_at_once=0), generator()).latent
    assert relative(apart[3:], apart[:4]) > 0.1
    assert both.evaluations == 6


@pytest.mark.parametrize("kind", ["off", "frame"])
def test_an_unedited_clip_comes_back(kind):
    """The frame that a part is told of is the source's then, up to what was lost before."""
    gentle = VideoshopPipeline(*tiny_svd.components(strength=0.1))
    settings = replace(PLAIN, refine=20, damping=0.0, tolerance=1e-7, normalise=kind)
    result = gentle(VIDEO, VIDEO[0], settings, generator(), progress=False)
    assert relative(result.latents, gentle.encode(VIDEO)) < 2e-3
    assert result.frames.shape == VIDEO.shape


def test_an_edit_reaches_the_last_part(pipeline):
    first, other = (pipeline(VIDEO, frame, PLAIN, generator(), progress=False).latents for frame in (EDITED, VIDEO[0]))
    for start, stop in SPANS:
        assert relative(first[start:stop], other[start:stop]) > 1e-3


def test_one_statistic_serves_all_parts(pipeline):
    """Rescaling is one map a channel for the whole clip, so that no part has other colours than the first."""
    settings, inversion = replace(PLAIN, rescale=1.0), pipeline.invert(VIDEO, PLAIN, generator())
    ends, last = [], len(inversion.sigmas) - 2
    result = pipeline.denoise(
        inversion, EDITED, settings, callback=lambda step: ends.append(step["x"]) if step["i"] == last else None
    )
    played = torch.cat([x[1:] if number else x for number, x in enumerate(ends)])
    wanted = pipeline.encode(EDITED[None])
    (mean, spread), (mean_0, spread_0) = (
        (x[:1].mean((2, 3), keepdim=True), x[:1].std((2, 3), keepdim=True)) for x in (wanted, played)
    )
    torch.testing.assert_close(result, (played - mean_0) / spread_0 * spread + mean, rtol=1e-3, atol=1e-4)
    for start, _ in SPANS[1:]:
        own_mean = played[start].mean((1, 2))
        assert relative(own_mean, mean_0[0, :, 0, 0]) > 0.05, "its own statistics would be another map"


def test_outside_a_mask_the_source_comes_back_in_every_part(pipeline):
    mask = torch.zeros(1, *VIDEO.shape[2:])
    mask[:, :8, :8] = 1
    result = pipeline(VIDEO, EDITED, replace(PLAIN, rescale=1.0), generator(), progress=False, mask=mask)
    source = pipeline.encode(VIDEO)
    assert torch.equal(result.latents[:, :, 1:], source[:, :, 1:])
    assert all(relative(result.latents[i, :, :1, :1], source[i, :, :1, :1]) > 1e-3 for i in range(FRAMES))


def test_a_kept_inversion_knows_its_parts(pipeline, tmp_path):
    inversion = pipeline.invert(VIDEO, PLAIN, generator(), keep_trajectory=True)
    save_inversion(tmp_path / "long.safetensors", inversion)
    back = load_inversion(tmp_path / "long.safetensors")
    assert parts_of(back) == SPANS and torch.equal(back.trajectory[-1], inversion.latent)
    assert torch.equal(back.joins, inversion.joins)
    assert torch.equal(pipeline.denoise(back, EDITED, PLAIN), pipeline.denoise(inversion, EDITED, PLAIN))


@pytest.mark.parametrize("change", [{"joins": None}, {"settings": {}}, {"settings": {"frames_at_once": 7}}])
def test_a_file_whose_parts_do_not_fit_is_refused(pipeline, tmp_path, change):
    inversion = pipeline.invert(VIDEO, PLAIN, generator())
    save_inversion(tmp_path / "long.safetensors", replace(inversion, **change))
    with pytest.raises(ValueError, match="the frames that its parts share are not those of its parts"):
        load_inversion(tmp_path / "long.safetensors")
