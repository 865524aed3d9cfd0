"""Every node runs, and does what its formula says; the chain of nodes is the headless pipeline."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from context_windows import windowed

SIZE = 96
FRAMES = 4


@pytest.fixture(scope="module")
def models(host):
    """(MODEL, CLIP_VISION, VAE) with random weights."""
    config, keys = host.module("demo.models").ImageToVideoConfig(), host.module("demo.keys")
    builders, parts = host.module("nodes.host.models"), keys.split_checkpoint(tiny_models.checkpoint(host))
    return (
        builders.build_model(parts["unet"], config),
        builders.build_clip_vision(parts["image_encoder"], config),
        builders.build_vae(parts["vae"], config),
    )


@pytest.fixture(scope="module")
def clip(host):
    chosen = host.module("demo.clip").example(5, "recolour")
    return tuple(frames[:FRAMES].movedim(1, -1).contiguous() for frames in (chosen.source, chosen.target))


@pytest.fixture(scope="module")
def conditions(host, models, clip):
    return condition(host, models, clip)


def condition(host, models, clip, **inputs):
    """The six outputs of Videoshop Conditioning."""
    source, target = clip
    values = {"clip": source, "edited_frame": target[:1], "width": SIZE, "height": SIZE, **inputs}
    return host.run_node("RewindVideoshopConditioning", clip_vision=models[1], vae=models[2], **values)


def invert(host, models, conditions, steps=4, **inputs):
    model = models[0]
    values = {"latent": conditions[4], "strength": 1.0, **inputs}
    return host.run_node(
        "RewindEDMInversion",
        model=model,
        positive=conditions[0],
        sigmas=tiny_models.sigmas(model, steps, "karras"),
        **values,
    )


def image_of(conditioning):
    return conditioning[0][1]["concat_latent_image"]


# --- Videoshop Conditioning ------------------------------------------------------------------------------------------


def test_without_noise_the_pairs_are_the_hosts_own(host, models, clip):
    source, target = clip
    outputs = condition(host, models, clip, augmentation_level=0.0, fps=9, motion_bucket_id=40)
    for image, (positive, negative) in ((source, outputs[:2]), (target, outputs[2:4])):
        wanted = host.run_node(
            "SVD_img2vid_Conditioning",
            clip_vision=models[1],
            init_image=image[:1],
            vae=models[2],
            width=SIZE,
            height=SIZE,
            video_frames=FRAMES,
            motion_bucket_id=40,
            fps=9,
            augmentation_level=0.0,
        )
        for ours, theirs in zip((positive, negative), wanted[:2]):
            assert torch.equal(ours[0][0], theirs[0][0])
            torch.testing.assert_close(image_of(ours), image_of(theirs), rtol=0, atol=1e-5)
            assert ours[0][1].keys() == theirs[0][1].keys()
            assert all(
                ours[0][1][key] == theirs[0][1][key] for key in ("fps", "motion_bucket_id", "augmentation_level")
            )
    (encoded,) = host.run_node("VAEEncode", pixels=source, vae=models[2])
    assert torch.equal(outputs[4]["samples"], encoded["samples"])
    (encoded,) = host.run_node("VAEEncode", pixels=target[:1], vae=models[2])
    assert torch.equal(outputs[5]["samples"], encoded["samples"])


def test_both_pairs_get_the_same_seeded_noise_on_the_models_range(host, models, clip):
    source, _ = clip
    same = (source, source)
    first, again = (condition(host, models, same, augmentation_level=0.3, seed=4) for _ in range(2))
    assert torch.equal(image_of(first[0]), image_of(first[2])), "one picture as source and edit: one condition"
    assert torch.equal(image_of(first[0]), image_of(again[0]))
    other = condition(host, models, same, augmentation_level=0.3, seed=5)
    assert not torch.allclose(image_of(first[0]), image_of(other[0]), atol=1e-3)
    noise = torch.randn(1, SIZE, SIZE, 3, generator=torch.Generator().manual_seed(4))
    by_hand = models[2].encode(source[:1] + 0.15 * noise)  # 0.3 in -1..1 is 0.15 in 0..1
    torch.testing.assert_close(image_of(first[0]), by_hand, rtol=0, atol=1e-5)
    assert torch.equal(source, clip[0])


def test_alpha_is_dropped_and_images_are_resized_as_the_host_does(host, models, clip):
    source, target = clip
    alpha = torch.rand(FRAMES, SIZE, SIZE, 1)
    plain = condition(host, models, clip)
    with_alpha = condition(host, models, (torch.cat([source, alpha], -1), torch.cat([target, alpha], -1)))
    assert torch.equal(image_of(plain[0]), image_of(with_alpha[0]))
    assert torch.equal(plain[4]["samples"], with_alpha[4]["samples"])
    import comfy.utils

    small = condition(host, models, clip, width=64, height=48)
    pixels = comfy.utils.common_upscale(source.movedim(-1, 1), 64, 48, "bilinear", "center").movedim(1, -1)
    assert torch.equal(small[4]["samples"], models[2].encode(pixels))
    assert small[4]["samples"].shape == (FRAMES, 4, 6, 8)


def test_the_reference_whitens_the_source_condition_alone(host, models, clip):
    plain, white = condition(host, models, clip), condition(host, models, clip, whitened_condition=True)
    assert torch.equal(image_of(plain[2]), image_of(white[2]))
    latent = image_of(plain[0])
    torch.testing.assert_close(
        image_of(white[0]), (latent - latent.mean()) / latent.std() / 0.18215, rtol=1e-3, atol=1e-3
    )


BAD_CLIPS = {
    "one frame": (lambda s, t: (s[:1], t), "1 frame"),
    "no frames": (lambda s, t: (s[:0], t), "at least one RGB image"),
    "grey": (lambda s, t: (s[..., :1], t), "at least one RGB image"),
    "NaN": (lambda s, t: (s * float("nan"), t), "NaN"),
    "another shape": (lambda s, t: (s, t[:, :48]), "proportions differ"),
}


@pytest.mark.parametrize("case", BAD_CLIPS)
def test_clips_that_cannot_be_are_refused(host, models, clip, case):
    change, message = BAD_CLIPS[case]
    with pytest.raises(ValueError, match=message):
        condition(host, models, change(*clip))


def test_several_edited_frames_are_refused(host, models, clip):
    with pytest.raises(ValueError, match="has 4 images"):
        condition(host, models, clip, edited_frame=clip[1])


# --- Latent Normalize, Latent Rescale --------------------------------------------------------------------------------


def test_latent_normalize_works_in_the_models_space(host, models, conditions):
    latent = {**conditions[4], "batch_index": [0, 1, 2, 3]}
    (result,) = host.run_node("RewindLatentNormalize", model=models[0], latent=latent, kind="frame", strength=1.0)
    seen = result["samples"] * 0.18215
    torch.testing.assert_close(seen.mean((1, 2, 3)), torch.zeros(FRAMES), rtol=0, atol=1e-4)
    torch.testing.assert_close(seen.std((1, 2, 3)), torch.ones(FRAMES), rtol=0, atol=1e-3)
    assert result["batch_index"] == [0, 1, 2, 3]
    for unchanged in ({"kind": "off", "strength": 1.0}, {"kind": "channel", "strength": 0.0}):
        (result,) = host.run_node("RewindLatentNormalize", model=models[0], latent=latent, **unchanged)
        assert torch.equal(result["samples"], latent["samples"]) and result.keys() == latent.keys()


def test_normalising_twice_is_refused(host, models, conditions):
    (once,) = host.run_node("RewindLatentNormalize", model=models[0], latent=conditions[4], kind="channel")
    with pytest.raises(ValueError, match="normalised already"):
        host.run_node("RewindLatentNormalize", model=models[0], latent=once, kind="channel")


def test_latent_rescale_gives_the_first_frame_the_references_statistics(host, conditions):
    latent, reference = conditions[4], {"samples": 3 * conditions[5]["samples"] + 1}
    (result,) = host.run_node("RewindLatentRescale", latent=latent, reference=reference, strength=1.0)
    for statistic in (lambda x: x[0].mean((1, 2)), lambda x: x[0].std((1, 2))):
        torch.testing.assert_close(statistic(result["samples"]), statistic(reference["samples"]), rtol=1e-3, atol=1e-3)
    # The same map on every frame: differences between frames are scaled, not lost.
    step, scaled = latent["samples"].diff(dim=0), result["samples"].diff(dim=0)
    gain = (reference["samples"][0].std((1, 2)) / latent["samples"][0].std((1, 2)))[:, None, None]
    torch.testing.assert_close(scaled, step * gain, rtol=1e-3, atol=1e-3)
    (result,) = host.run_node("RewindLatentRescale", latent=latent, reference=reference, strength=0.0)
    assert torch.equal(result["samples"], latent["samples"])
    with pytest.raises(ValueError, match="same VAE"):
        host.run_node("RewindLatentRescale", latent=latent, reference={"samples": torch.ones(1, 16, 1, 12, 12)})


# --- the whole chain -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "normalise, denormalise, rescale, length",
    [("off", True, 1.0, 0), ("channel", True, 0.0, 0), ("frame", False, 0.5, 0), ("off", True, 0.0, 3)],
)
def test_the_chain_of_nodes_is_the_headless_pipeline(host, models, clip, normalise, denormalise, rescale, length):
    """The host's classes through the nodes and diffusers' through the pipeline, on the same weights and clip.

    length: of context windows, which are the host's in one and ours in the other; 0 for none.
    """
    demo, keys = host.module("demo.models"), host.module("demo.keys")
    parts = keys.from_checkpoint(tiny_models.checkpoint(host))
    modules = demo.build_unet(), demo.build_vae(), demo.build_image_encoder()
    for module, part in zip(modules, ("unet", "vae", "image_encoder")):
        module.load_state_dict(parts[part])
        module.eval()
    pipeline = host.module("pipelines.videoshop.pipeline").VideoshopPipeline(*modules)
    settings = host.module("pipelines.videoshop.settings").VideoshopSettings(
        steps=4,
        strength=1.0,
        guess_below="current",
        normalise=normalise,
        denormalise=denormalise,
        rescale=rescale,
        first_guidance=1.0,
        last_guidance=3.0,
        augmentation=0.0,
        context_length=length,
        context_overlap=1,
    )
    if length:
        models = (windowed(host, models[0], context_length=length), *models[1:])
    source, target = clip
    wanted = pipeline(source.movedim(-1, 1), target[0].movedim(-1, 0), settings, torch.Generator(), progress=False)

    outputs = condition(host, models, clip, augmentation_level=0.0)
    (latent,) = host.run_node("RewindLatentNormalize", model=models[0], latent=outputs[4], kind=normalise)
    guesses = {"guess_above": "extrapolation", "guess_below": "current", "refine": 0}
    *_, inversion = invert(host, models, outputs, latent=latent, **guesses)
    (denoised,) = host.run_node(
        "RewindSVDDenoise",
        model=models[0],
        positive=outputs[2],
        negative=outputs[3],
        inversion=inversion,
        first_guidance=1.0,
        last_guidance=3.0,
        denormalize=denormalise,
    )
    (rescaled,) = host.run_node("RewindLatentRescale", latent=denoised, reference=outputs[5], strength=rescale)
    (images,) = host.run_node("VAEDecode", samples=rescaled, vae=models[2])
    torch.testing.assert_close(images, wanted.frames.movedim(1, -1), rtol=0, atol=2e-3)
    assert float((images - source).abs().mean()) > 5e-3, "the pictures say something"


# --- the checks ------------------------------------------------------------------------------------------------------


def test_round_trip_check_tells_the_vaes_share_from_the_inversions(host, models, clip, conditions):
    check = {"model": models[0], "positive": conditions[0], "vae": models[2], "clip": clip[0]}
    figures = {}
    for refine in (0, 15):
        *_, inversion = invert(host, models, conditions, refine=refine, guess_above="current", guess_below="current")
        figures[refine] = host.run_node("RewindRoundTripCheck", inversion=inversion, **check)
    report, picture, whole, vae, own, error = figures[15]
    with torch.inference_mode():
        copy = models[2].decode(conditions[4]["samples"])
    by_hand = -10 * torch.log10((copy - clip[0]).square().mean())
    assert vae == pytest.approx(float(by_hand), abs=0.01)
    assert own > figures[0][4] + 10 and error < figures[0][5] / 10, "refinement shows in the inversion's share"
    assert figures[0][3] == vae and whole == pytest.approx(vae, abs=0.1)
    assert f"{vae:.2f} dB" in report and report.count("latent frame") == FRAMES
    assert picture.ndim == 4 and picture.shape[0] == 1 and 0 <= picture.min() and picture.max() <= 1


def test_round_trip_check_refuses_before_it_samples(host, models, clip, conditions):
    counting, calls = tiny_models.counted(models[0])
    check = {"model": counting, "positive": conditions[0], "vae": models[2], "clip": clip[0]}
    *_, inversion = invert(host, models, conditions)
    with pytest.raises(ValueError, match="has 3 frames, the inversion 4"):
        host.run_node("RewindRoundTripCheck", inversion=inversion, **{**check, "clip": clip[0][:3]})
    *_, guided = invert(host, models, conditions, negative=conditions[1], cfg=2.0)
    with pytest.raises(ValueError, match="made with cfg 2"):
        host.run_node("RewindRoundTripCheck", inversion=guided, **check)
    assert calls == []


def test_round_trip_check_sees_a_normalised_clip_as_it_was(host, models, clip, conditions):
    (latent,) = host.run_node("RewindLatentNormalize", model=models[0], latent=conditions[4], kind="channel")
    *_, inversion = invert(host, models, conditions, latent=latent, refine=40)
    _, _, _, vae, own, error = host.run_node(
        "RewindRoundTripCheck",
        model=models[0],
        positive=conditions[0],
        inversion=inversion,
        vae=models[2],
        clip=clip[0],
    )
    assert error < 1e-2 and own > vae


def test_trajectory_plot_measures_a_known_trajectory(host):
    """A straight line from a clip to known noise: every pair of steps alike, the noise's own spread, no correlation."""
    import dataclasses

    inversion = host.module("pipelines.videoshop.inversion").Inversion
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(6, 4, 16, 16, generator=generator) for _ in range(2))
    sigmas = torch.tensor([10.0, 4.0, 1.0, 0.0])
    trajectory = torch.stack([clean + sigma * 0.7 * noise for sigma in sigmas.flip(0)])
    straight = inversion(latent=trajectory[-1], sigmas=sigmas, trajectory=trajectory)
    plot, cosine, spread = host.run_node("RewindTrajectoryPlot", inversion=straight)
    assert cosine == pytest.approx(1.0, abs=1e-5) and spread == pytest.approx(0.7, abs=0.02)
    assert plot.ndim == 4 and plot.shape[-1] == 3 and float(plot.std()) > 0.05
    bent = trajectory.clone()
    bent[1] += 4 * torch.randn(clean.shape, generator=generator)
    other, cosine, _ = host.run_node("RewindTrajectoryPlot", inversion=dataclasses.replace(straight, trajectory=bent))
    assert cosine < 0.5 and not torch.equal(plot, other)
    with pytest.raises(ValueError, match="no trajectory"):
        host.run_node("RewindTrajectoryPlot", inversion=dataclasses.replace(straight, trajectory=None))


# --- Rewind Demo Clip ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["recolour", "reshape", "resize", "add", "remove", "background"])
def test_the_demo_clip_changes_inside_its_mask_alone(host, kind):
    video, edited, target, mask = host.run_node("RewindDemoClip", edit=kind, seed=3)
    components = video.get_components()
    source = components.images
    assert source.shape == target.shape == (8, 96, 96, 3) and mask.shape == (8, 96, 96)
    assert float(components.frame_rate) == 7
    assert torch.equal(edited, target[:1])
    changed = (source - target).abs().amax(-1)
    assert float(changed.max()) > 0.1
    assert float((changed * (1 - mask)).max()) < 1e-6
    again = host.run_node("RewindDemoClip", edit=kind, seed=3)[2]
    assert torch.equal(target, again)
    assert not torch.equal(target, host.run_node("RewindDemoClip", edit=kind, seed=4)[2])


def test_a_video_of_the_demo_clip_can_be_saved(host, tmp_path):
    video, *_ = host.run_node("RewindDemoClip")
    video.save_to(str(tmp_path / "clip.mp4"))
    assert (tmp_path / "clip.mp4").stat().st_size > 1000


# --- Rewind Demo Clip (text edit) -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["motion", "style", "object", "background"])
def test_the_text_edits_answer_is_what_its_prompt_asks_for(host, kind):
    edits = host.module("demo.text_edits")
    video, prompt, caption, answer, edited = host.run_node("RewindDemoTextEdit", edit=kind, seed=5)
    components, chosen = video.get_components(), edits.text_example(5, kind)
    assert components.images.shape == answer.shape == (8, 96, 96, 3) and float(components.frame_rate) == 7
    assert prompt == chosen.prompt("sks") and "sks" in prompt and caption == chosen.caption
    assert edited == host.module("demo.captions").caption(chosen.target_words, 0) != caption
    assert edits.score(chosen, answer.movedim(-1, 1)).success
    assert not edits.score(chosen, components.images.movedim(-1, 1)).accuracy
    assert torch.equal(answer, host.run_node("RewindDemoTextEdit", edit=kind, seed=5)[3])
    assert not torch.equal(answer, host.run_node("RewindDemoTextEdit", edit=kind, seed=6)[3])


def test_the_text_edits_token_goes_into_the_prompt(host):
    prompts = [host.run_node("RewindDemoTextEdit", token=token)[1] for token in ("", " zq ", "sks")]
    assert prompts[1] == prompts[2].replace("sks", "zq") and prompts[0] == prompts[2].replace("sks ", "")
