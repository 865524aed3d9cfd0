"""The headless job on tiny random components of the real classes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny_svd
import torch
from denoisers import relative

from rewind.pipelines.videoshop.inversion import sample_naive_inversion
from rewind.pipelines.videoshop.inversion_file import load_inversion, save_inversion
from rewind.pipelines.videoshop.latents import normalise
from rewind.pipelines.videoshop.pipeline import SVDDenoiser, VideoshopPipeline
from rewind.pipelines.videoshop.settings import NAIVE, PAPER, REFERENCE, VideoshopSettings

PLAIN = VideoshopSettings(
    steps=5,
    strength=1.0,
    sigma_max=20.0,
    guess_above="extrapolation",
    guess_below="random",
    refine=0,
    normalise="off",
    rescale=0.0,
    first_guidance=1.0,
    last_guidance=1.0,
)
VIDEO = tiny_svd.video()
EDITED = tiny_svd.video(4)[0]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pipeline() -> VideoshopPipeline:
    return VideoshopPipeline(*tiny_svd.components())


@pytest.fixture(scope="module")
def calm() -> VideoshopPipeline:
    """One whose network depends little on its input, so that refinement converges."""
    return VideoshopPipeline(*tiny_svd.components(strength=0.1))


# --- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change", [{"normalise": "off"}, {"normalise": "channel"}, {"normalise": "frame"}, {"strength": 0.5}], ids=str
)
def test_an_unedited_clip_comes_back(calm, change):
    settings = replace(PLAIN, refine=20, damping=0.0, tolerance=1e-6, **change)
    source = calm.encode(VIDEO)
    back = calm(VIDEO, VIDEO[0], settings, generator(), progress=False)
    assert relative(back.latents, source) < 1e-4
    assert all(residual < 1e-6 for residual in back.inversion.residuals)
    assert len(back.inversion.residuals) == len(back.inversion.sigmas) - 1
    rough = calm(VIDEO, VIDEO[0], replace(settings, refine=0), generator(), progress=False)
    assert relative(rough.latents, source) > 10 * relative(back.latents, source)
    assert float((back.frames - calm.decode(source)).abs().max()) < 1e-3


def test_an_edited_first_frame_changes_every_frame(pipeline):
    same, edited = (pipeline(VIDEO, frame, PLAIN, generator(), progress=False).latents for frame in (VIDEO[0], EDITED))
    assert all(relative(edited[i], same[i]) > 1e-3 for i in range(len(VIDEO)))


def test_the_result_is_a_clip(pipeline):
    result = pipeline(VIDEO, EDITED, PLAIN, generator(), progress=False)
    assert result.frames.shape == VIDEO.shape and result.frames.dtype == torch.float32
    assert 0 <= result.frames.min() and result.frames.max() <= 1
    torch.testing.assert_close(result.frames, pipeline.decode(result.latents))


def test_rescaling_ends_on_the_edited_frames_statistics(pipeline):
    result = pipeline(VIDEO, EDITED, replace(PLAIN, rescale=1.0), generator(), progress=False)
    target = pipeline.encode(EDITED[None])
    torch.testing.assert_close(result.latents[0].mean((1, 2)), target[0].mean((1, 2)), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(result.latents[0].std((1, 2)), target[0].std((1, 2)), rtol=1e-3, atol=1e-3)


def test_the_normalisation_is_undone_unless_asked_otherwise(pipeline):
    settings = replace(PLAIN, normalise="frame")
    undone, kept = (
        pipeline(VIDEO, EDITED, replace(settings, denormalise=flag), generator(), progress=False)
        for flag in (True, False)
    )
    torch.testing.assert_close(undone.latents, undone.inversion.normalisation.undo(kept.latents))
    assert relative(undone.latents, kept.latents) > 0.01


# --- costs, seeds, callbacks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, inversion, denoising",
    [
        (PLAIN, 5, 5),
        (replace(PLAIN, refine=2, tolerance=0.0), 15, 5),
        (replace(PLAIN, first_guidance=1.0, last_guidance=3.0), 5, 10),
        # of the levels 20, 3.4, 0.42, 0.036, 0.002 two lie inside
        (replace(PLAIN, last_guidance=3.0, guidance_interval=(0.1, 5.0)), 5, 7),
        (replace(PAPER, steps=4), 4, 4),
        (replace(REFERENCE, steps=4), 2, 4),
        (replace(NAIVE, steps=4, strength=0.5), 2, 2),
    ],
    ids=["plain", "refined", "guided", "interval", "paper", "reference", "naive"],
)
def test_the_network_calls_are_counted(pipeline, settings, inversion, denoising):
    calls, told = [], []
    hook = pipeline.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    result = pipeline(VIDEO, EDITED, settings, generator(), progress=False, callback=told.append)
    hook.remove()
    assert result.evaluations == {"inversion": inversion, "denoising": denoising}
    assert len(calls) == inversion + denoising
    steps = len(result.inversion.sigmas) - 1
    assert [step["phase"] for step in told] == ["inversion"] * steps + ["denoising"] * steps
    assert torch.isfinite(result.frames).all()


def test_equal_seeds_give_equal_results_and_other_seeds_others(pipeline):
    torch.manual_seed(1)
    first = pipeline(VIDEO, EDITED, PLAIN, generator(1), progress=False).frames
    torch.manual_seed(2)
    again = pipeline(VIDEO, EDITED, PLAIN, generator(1), progress=False).frames
    other = pipeline(VIDEO, EDITED, PLAIN, generator(2), progress=False).frames
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_inputs_are_left_alone(pipeline):
    video, edited = VIDEO.clone(), EDITED.clone()
    pipeline(video, edited, replace(PLAIN, normalise="channel", rescale=1.0), generator(), progress=False)
    assert torch.equal(video, VIDEO) and torch.equal(edited, EDITED)


def test_bars_show_on_stderr_only_when_asked(pipeline, capsys):
    pipeline(VIDEO, EDITED, PLAIN, generator(), progress=False)
    assert capsys.readouterr() == ("", "")
    pipeline(VIDEO, EDITED, PLAIN, generator(), progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "5/5" in err and err.count("\n") == 2  # one bar a way


# --- the inversion as a value ----------------------------------------------------------------------------------------


def test_an_inversion_holds_what_the_way_back_needs(pipeline):
    settings = replace(PLAIN, normalise="channel")
    inversion = pipeline.invert(VIDEO, settings, generator(), keep_trajectory=True)
    source = pipeline.encode(VIDEO)
    assert inversion.sigmas.shape == (6,) and inversion.sigmas[-1] == 0
    assert float(inversion.sigmas[0]) == pytest.approx(20)
    assert inversion.trajectory.shape == (6, *source.shape)
    assert torch.equal(inversion.source, source)
    assert torch.equal(inversion.trajectory[0], normalise(source, "channel")[0])
    assert torch.equal(inversion.trajectory[-1], inversion.latent)
    assert inversion.evaluations == 5 and inversion.residuals == ()
    assert inversion.settings["normalise"] == "channel"
    assert pipeline.invert(VIDEO, settings, generator()).trajectory is None


def test_one_inversion_serves_several_edits(pipeline):
    inversion = pipeline.invert(VIDEO, PLAIN, generator())
    for frame in (EDITED, 1 - VIDEO[0]):
        at_once = pipeline(VIDEO, frame, PLAIN, generator(), progress=False).latents
        assert torch.equal(pipeline.denoise(inversion, frame, PLAIN), at_once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_inversion_of_a_file_edits_bit_for_bit_as_at_once(pipeline, tmp_path, dtype):
    settings = replace(PLAIN, normalise="channel", rescale=1.0, last_guidance=3.0)
    at_once = pipeline(VIDEO, EDITED, settings, generator(), progress=False)
    inversion = pipeline.invert(VIDEO, settings, generator(), keep_trajectory=True, trajectory_dtype=dtype)
    assert inversion.trajectory.dtype == dtype and torch.equal(inversion.trajectory[-1], inversion.latent.to(dtype))
    save_inversion(tmp_path / "clip.safetensors", inversion)
    loaded = load_inversion(tmp_path / "clip.safetensors")
    assert VideoshopSettings(**loaded.settings) == settings and torch.equal(loaded.sigmas, settings.sigmas())
    calls = []
    hook = pipeline.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    again = pipeline(VIDEO, EDITED, settings, progress=False, inversion=loaded)
    hook.remove()
    assert torch.equal(again.latents, at_once.latents) and torch.equal(again.frames, at_once.frames)
    assert len(calls) == again.evaluations["denoising"] == 10 and again.evaluations["inversion"] == 5


def test_an_inversion_knows_its_model(pipeline):
    inversion = pipeline.invert(VIDEO, PLAIN, generator())
    inversion.model.check(pipeline.fingerprint(), "it")
    with pytest.raises(ValueError, match="it was made with other weights"):
        inversion.model.check(VideoshopPipeline(*tiny_svd.components(seed=1)).fingerprint(), "it")


def test_both_first_frames_get_the_same_augmentation_noise_unless_asked_otherwise(pipeline):
    seen = []

    class Spy(VideoshopPipeline):
        def condition(self, image, settings, noise=None, whiten=False):
            seen.append((image, noise, whiten))
            return super().condition(image, settings, noise, whiten)

    spy = Spy(pipeline.unet, pipeline.vae, pipeline.image_encoder)
    spy(VIDEO, EDITED, PLAIN, generator(), progress=False)
    spy(VIDEO, EDITED, replace(PLAIN, shared_augmentation=False, normalise_condition=True), generator(), progress=False)
    images, noises, whiten = zip(*seen)
    assert [torch.equal(image, EDITED) for image in images] == [False, True] * 2
    assert torch.equal(noises[0], noises[1]) and torch.equal(noises[0], noises[2])
    assert not torch.equal(noises[2], noises[3])
    assert whiten == (False, False, True, False)  # the SOURCE's condition in the inversion only


# --- pixels, latents, conditions -------------------------------------------------------------------------------------


def test_latents_are_the_posteriors_mode_in_model_space(pipeline):
    wanted = pipeline.vae.encode(2 * VIDEO - 1).latent_dist.mode() * 0.18215
    torch.testing.assert_close(pipeline.encode(VIDEO), wanted)
    decoded = pipeline.vae.decode(wanted / 0.18215, num_frames=4).sample
    torch.testing.assert_close(pipeline.decode(wanted), (decoded / 2 + 0.5).clamp(0, 1))


def test_chunks_bound_what_the_vae_takes_at_once(pipeline):
    small = VideoshopPipeline(pipeline.unet, pipeline.vae, pipeline.image_encoder, chunk=3)
    latents = pipeline.encode(VIDEO)
    torch.testing.assert_close(small.encode(VIDEO), latents, rtol=1e-4, atol=1e-5)
    first, second = pipeline.decode(latents[:2]), pipeline.decode(latents[1:])  # the decoder sees a chunk as a clip
    assert not torch.allclose(first[1], second[0], atol=1e-3), "so neighbours do not agree on the frame they share"
    wanted = torch.cat([first[:1], (first[1:] + second[:1]) / 2, second[1:]])
    torch.testing.assert_close(small.decode(latents), wanted, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="chunk is 0"):
        VideoshopPipeline(pipeline.unet, pipeline.vae, pipeline.image_encoder, chunk=0)


@torch.no_grad()
def test_the_condition_is_svds(pipeline):
    noise = torch.randn(3, 32, 48, generator=generator())
    settings = replace(PLAIN, augmentation=0.1, fps=9, motion_bucket=40)
    condition = pipeline.condition(EDITED, settings, noise)
    pixels = 2 * EDITED[None] - 1 + 0.1 * noise
    torch.testing.assert_close(condition.image_latents, pipeline.vae.encode(pixels).latent_dist.mode())  # unscaled
    torch.testing.assert_close(condition.added_ids, torch.tensor([[8.0, 40.0, 0.1]]))
    assert condition.embedding.shape == (1, 1, 32)
    negative = pipeline.unconditional(condition)
    assert not negative.image_latents.any() and not negative.embedding.any()
    assert torch.equal(negative.added_ids, condition.added_ids)
    quiet = replace(settings, augmentation=0.0)
    assert torch.equal(pipeline.condition(EDITED, quiet).embedding, condition.embedding)
    with pytest.raises(ValueError, match="augmentation 0.1 needs noise"):
        pipeline.condition(EDITED, settings)


@torch.no_grad()
@pytest.mark.parametrize("sigma", [0.002, 2.5, 700.0])
def test_the_denoiser_is_svds_preconditioning(pipeline, sigma):
    x = sigma * torch.randn(4, 4, 4, 6, generator=generator())
    image, embedding = torch.randn(1, 4, 4, 6, generator=generator(1)), torch.ones(1, 1, 32)
    model = SVDDenoiser(pipeline.unet, image, embedding, torch.tensor([[6.0, 127, 0.02]]))
    scale = (sigma**2 + 1) ** 0.5
    stacked = torch.cat([x / scale, image.expand(4, -1, -1, -1)], 1)[None]
    f = pipeline.unet(stacked, 0.25 * torch.tensor([sigma]).log(), embedding, model.added_ids).sample[0]
    torch.testing.assert_close(model(x, torch.full((4,), sigma)), x / scale**2 - sigma / scale * f)
    assert model.evaluations == 1


def test_the_hosts_naive_way_runs_on_the_same_denoiser(pipeline):
    condition = pipeline.condition(VIDEO[0], replace(PLAIN, augmentation=0.0))
    x = sample_naive_inversion(condition, pipeline.encode(VIDEO), torch.tensor([0.0, 1.0, 20.0]), disable=True)
    assert torch.isfinite(x).all() and condition.evaluations == 2


def test_generating_from_noise_needs_no_source(pipeline):
    latents = pipeline.image_to_video(EDITED, PLAIN, generator(), frames=3)
    assert latents.shape == (3, 4, 4, 6) and torch.isfinite(latents).all()
    assert pipeline.image_to_video(EDITED, PLAIN, generator()).shape[0] == tiny_svd.FRAMES
    assert torch.equal(latents, pipeline.image_to_video(EDITED, PLAIN, generator(), frames=3))
    assert relative(pipeline.image_to_video(EDITED, PLAIN, generator(1), frames=3), latents) > 0.1


@torch.no_grad()
def test_generation_starts_from_noise_of_the_top_levels_variance(pipeline):
    """In one step the result is the denoised start, n sqrt(sigma^2 + 1) (diffusers' and the host's own scale)."""
    settings = replace(PLAIN, steps=1, sigma_max=3.0, augmentation=0.0)
    draws = generator()
    torch.randn(EDITED.shape, generator=draws)  # the augmentation's
    start = torch.randn(3, 4, 4, 6, generator=draws) * 10**0.5
    wanted = pipeline.condition(EDITED, settings)(start, torch.full((3,), 3.0))
    torch.testing.assert_close(pipeline.image_to_video(EDITED, settings, generator(), frames=3), wanted)


# --- other numbers of frames, sizes and types ------------------------------------------------------------------------


def test_any_number_of_frames_and_size_that_the_model_takes(pipeline):
    video = torch.rand(3, 3, 48, 16, generator=generator())
    result = pipeline(video, video[1], replace(PLAIN, steps=2), generator(), progress=False)
    assert result.frames.shape == video.shape


def test_it_loads_a_folder_in_diffusers_layout(pipeline, tmp_path):
    for name in ("unet", "vae", "image_encoder"):
        getattr(pipeline, name).save_pretrained(tmp_path / name)
    loaded = VideoshopPipeline.from_pretrained(tmp_path)
    assert loaded.scaling_factor == 0.18215
    assert not any(p.requires_grad for p in loaded.unet.parameters()) and not loaded.vae.training
    ours, theirs = (p(VIDEO, EDITED, PLAIN, generator(), progress=False).frames for p in (pipeline, loaded))
    torch.testing.assert_close(ours, theirs)

    half = VideoshopPipeline.from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert half.unet.dtype == torch.float16
    torch.testing.assert_close(half.encode(VIDEO), pipeline.encode(VIDEO), rtol=2e-3, atol=2e-4)
    assert half.vae.decoder.conv_in.weight.dtype == torch.float16  # only the encoder overflows
    settings = replace(PLAIN, steps=2, sigma_max=5.0)
    frames = half(VIDEO, EDITED, settings, generator(), progress=False).frames
    whole = pipeline(VIDEO, EDITED, settings, generator(), progress=False).frames
    assert frames.dtype == torch.float32 and float((frames - whole).abs().max()) < 0.02


def test_a_folder_of_another_kind_of_model_is_refused_before_its_weights_are_read(pipeline, tmp_path):
    pipeline.vae.save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match="holds a AutoencoderKLTemporalDecoder; Videoshop takes"):
        VideoshopPipeline.from_pretrained(tmp_path)


def test_a_generator_elsewhere_is_refused(pipeline):
    class Elsewhere:
        device = torch.device("cuda")

    with pytest.raises(ValueError, match="the generator is on cuda; one on the CPU"):
        pipeline(VIDEO, EDITED, PLAIN, Elsewhere(), progress=False)


# --- bad input -------------------------------------------------------------------------------------------------------

BAD = {
    "one frame": (lambda v, e: (v[:1], e), "got 1 frames; a clip has at least 2"),
    "two channels": (lambda v, e: (v[:, :2], e), r"\(4, 2, 32, 48\); it must be \[frames, 3, height, width\]"),
    "channels last": (lambda v, e: (v.movedim(1, -1), e), r"it must be \[frames, 3"),
    "one picture": (lambda v, e: (v[0], e), r"it must be \[frames, 3"),
    "no multiple": (lambda v, e: (v[..., :40], e[..., :40]), "40x32; both sides must be multiples of 16.*32x32"),
    "other size": (lambda v, e: (v, e[:, :16]), r"shape \(3, 16, 48\) for a clip.*must be \(3, 32, 48\)"),
    "a batch of edits": (lambda v, e: (v, e[None]), r"edited frame of shape \(1, 3, 32, 48\)"),
    "bytes' range": (lambda v, e: (v * 255, e), "the clip has values from .* to 255; pixels must be 0 to 1"),
    "bytes": (lambda v, e: ((v * 255).byte(), e), "the clip is of torch.uint8.*divide bytes by 255"),
    "-1 to 1": (lambda v, e: (v, 2 * e - 1), "the edited frame has values from -"),
    "NaN": (lambda v, e: (v * torch.nan, e), "the clip holds NaN or infinite"),
    "infinite": (lambda v, e: (v, e / 0), "the edited frame holds NaN or infinite"),
}


@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD)
def test_bad_clips_are_refused_before_any_work(pipeline, change, message, monkeypatch):
    monkeypatch.setattr(pipeline.vae, "encode", lambda *_: pytest.fail("work was begun"))
    video, edited = change(VIDEO, EDITED)
    with pytest.raises(ValueError, match=message):
        pipeline(video, edited, PLAIN, generator(), progress=False)


def test_the_steps_on_their_own_refuse_too(pipeline):
    with pytest.raises(ValueError, match="got 1 frames"):
        pipeline.invert(VIDEO[:1], PLAIN, generator())
    inversion = pipeline.invert(VIDEO, replace(PLAIN, steps=1), generator())
    with pytest.raises(ValueError, match=r"\(3, 16, 48\); the clip needs one of \(3, 32, 48\)"):
        pipeline.denoise(inversion, EDITED[:, :16], PLAIN)
    with pytest.raises(ValueError, match="the edited frame has values"):
        pipeline.denoise(inversion, 255 * EDITED, PLAIN)
    with pytest.raises(ValueError, match="multiples of 16"):
        pipeline.image_to_video(EDITED[..., :40], PLAIN, generator())
