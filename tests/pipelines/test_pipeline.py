"""The headless job on tiny random components of the real classes."""

from dataclasses import replace

import pytest
import torch

from rewind.demo.models import build_image_encoder, build_unet, build_vae
from rewind.pipelines.videoshop.pipeline import SVDDenoiser, VideoshopPipeline
from rewind.pipelines.videoshop.settings import DEFAULT, NAIVE, PAPER, REFERENCE, VideoshopSettings

SHORT = replace(DEFAULT, steps=6, sigma_max=20.0, strength=1.0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pipeline():
    torch.manual_seed(0)
    modules = [module.eval().requires_grad_(False) for module in (build_unet(), build_vae(), build_image_encoder())]
    return VideoshopPipeline(*modules)


@pytest.fixture(scope="module")
def video():
    return torch.rand(4, 3, 32, 48, generator=generator(3))


def test_an_unedited_clip_comes_back_with_refinement(pipeline, video):
    settings = replace(SHORT, guess_above="last_direction", guess_below="current", refine=30, tolerance=1e-7)
    result = pipeline(video, video[0], settings, generator(), progress=False)
    source = pipeline.encode(video)
    assert (result.latents - source).norm() / source.norm() < 1e-4
    rough = pipeline(video, video[0], replace(settings, refine=0), generator(), progress=False)
    assert (rough.latents - source).norm() > 3 * (result.latents - source).norm()


def test_an_edited_first_frame_changes_the_result(pipeline, video):
    same, edited = (pipeline(video, f, SHORT, generator(), progress=False).frames for f in (video[0], 1 - video[0]))
    assert same.shape == video.shape and 0 <= same.min() and same.max() <= 1
    assert (same - edited).abs().mean() > 1e-4


@pytest.mark.parametrize(
    ("settings", "inversion", "denoising"),
    [
        (SHORT, 6, 6),
        (replace(SHORT, refine=2, tolerance=0.0), 18, 6),
        (replace(SHORT, first_guidance=1.0, last_guidance=3.0), 6, 12),
        (replace(SHORT, first_guidance=2.0, last_guidance=2.0, guidance_interval=(1.0, 3.0)), 6, 7),
        (replace(PAPER, steps=6), 6, 6),
        (replace(REFERENCE, steps=6), 3, 6),
        (replace(NAIVE, steps=6, strength=0.5), 3, 3),
    ],
    ids=["plain", "refined", "guided", "interval", "paper", "reference", "naive"],
)
def test_the_network_calls_are_counted(pipeline, video, settings, inversion, denoising):
    seen = []
    result = pipeline(video, video[0], settings, generator(), progress=False, callback=seen.append)
    assert result.evaluations == {"inversion": inversion, "denoising": denoising}
    assert [step["phase"] for step in seen][0] == "inversion" and seen[-1]["phase"] == "denoising"
    assert torch.isfinite(result.frames).all()


def test_equal_seeds_give_equal_results_and_other_seeds_others(pipeline, video):
    first, again, other = (pipeline(video, video[0], SHORT, generator(s), progress=False).latents for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_an_inversion_serves_several_edits_and_keeps_its_trajectory(pipeline, video):
    inversion = pipeline.invert(video, SHORT, generator(), keep_trajectory=True)
    assert inversion.trajectory.shape == (7, 4, 4, 4, 6)
    assert torch.equal(inversion.trajectory[0], pipeline.encode(video))
    assert torch.equal(inversion.trajectory[-1], inversion.latent)
    at_once = pipeline(video, 1 - video[0], SHORT, generator(), progress=False).latents
    assert torch.equal(pipeline.denoise(inversion, 1 - video[0], SHORT), at_once)


def test_both_first_frames_get_the_same_augmentation_noise_unless_asked_otherwise(pipeline, video):
    shared, fresh = (
        pipeline.invert(video, replace(SHORT, shared_augmentation=same), generator()).augmentation_noise
        for same in (True, False)
    )
    assert torch.equal(shared, torch.randn(2, 3, 32, 48, generator=generator())[0]) and not torch.equal(shared, fresh)


def test_the_denoiser_is_svds_preconditioning(pipeline):
    condition = SVDDenoiser(
        pipeline.unet, torch.zeros(1, 4, 4, 6), torch.zeros(1, 1, 64), torch.tensor([[6.0, 127, 0.02]])
    )
    x, s = torch.randn(4, 4, 4, 6, generator=generator()), 2.5
    stacked = torch.cat([x / (s**2 + 1) ** 0.5, torch.zeros(4, 4, 4, 6)], 1)[None]
    with torch.no_grad():
        f = pipeline.unet(
            stacked, torch.tensor([0.25]) * torch.tensor(s).log(), torch.zeros(1, 1, 64), condition.added_ids
        )
        expected = x / (s**2 + 1) - s / (s**2 + 1) ** 0.5 * f.sample[0]
        assert torch.allclose(condition(x, torch.full((4,), s)), expected, atol=1e-5)


def test_the_whole_clip_is_generated_from_noise_without_a_source(pipeline, video):
    latents = pipeline.image_to_video(video[0], SHORT, generator(), frames=5)
    assert latents.shape == (5, 4, 4, 6) and torch.isfinite(latents).all()


def test_it_loads_a_folder_in_diffusers_layout(pipeline, video, tmp_path):
    from diffusers import AutoencoderKLTemporalDecoder

    torch.manual_seed(0)
    vae = AutoencoderKLTemporalDecoder(block_out_channels=(64,), down_block_types=("DownEncoderBlock2D",))
    pipeline.unet.save_pretrained(tmp_path / "unet")
    vae.save_pretrained(tmp_path / "vae")
    pipeline.image_encoder.save_pretrained(tmp_path / "image_encoder")
    loaded = VideoshopPipeline.from_pretrained(tmp_path)
    one, two = (p.condition(video[0], SHORT, torch.zeros(3, 32, 48)) for p in (pipeline, loaded))
    assert torch.equal(one.embedding, two.embedding)
    assert all(torch.equal(a, b) for a, b in zip(pipeline.unet.parameters(), loaded.unet.parameters()))
    assert loaded.scaling_factor == 0.18215


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: (v[:1], v[0]), "1 frames"),
        (lambda v: (v[:, :2], v[0]), r"\[frames, 3, height, width\]"),
        (lambda v: (v[..., :40], v[0, ..., :40]), "40x32.*multiples of 16.*32x32"),
        (lambda v: (v, v[0, :, :16]), r"\(3, 16, 48\)"),
        (lambda v: (v * 255, v[0]), "0 to 1"),
        (lambda v: (v, v[0] / 0), "NaN or infinite"),
    ],
)
def test_bad_clips_are_refused_before_any_work(pipeline, video, change, message, monkeypatch):
    monkeypatch.setattr(pipeline.vae, "encode", lambda *_: pytest.fail("work was begun"))
    clip, edited = change(video)
    with pytest.raises(ValueError, match=message):
        pipeline(clip, edited, SHORT, generator(), progress=False)


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0},
        {"strength": 0.0},
        {"sigma_min": 5.0, "sigma_max": 1.0},
        {"guess_above": "luck"},
        {"refine": -1},
        {"normalise": "all"},
        {"rescale": 2.0},
        {"last_guidance": -1.0},
        {"guidance_interval": (2.0, 1.0)},
        {"fps": 0},
    ],
    ids=lambda bad: next(iter(bad)),
)
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        VideoshopSettings(**bad)
