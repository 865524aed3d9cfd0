"""Masks in the host: what lies outside one is the source to the bit, at every step and in the end."""

from __future__ import annotations

import json

import comfy_host
import pytest
import tiny_models
import torch
from graph import to_api
from masks import hard_mask, outside
from results import frames, node_of, saved_latent

STEPS = 4


@pytest.fixture(scope="module")
def model(host):
    return tiny_models.svd(host)


@pytest.fixture(scope="module")
def conditions():
    return {"source": tiny_models.conditioning("svd"), "edited": tiny_models.conditioning("svd", seed=1)}


def invert(host, model, latent, conditions, **inputs):
    sigmas = tiny_models.sigmas(model, STEPS, "karras")
    return host.run_node(
        "RewindEDMInversion",
        model=model,
        positive=conditions["source"],
        latent=latent,
        sigmas=sigmas,
        strength=1.0,
        **inputs,
    )


def denoise(host, model, conditions, inversion, **inputs):
    both = {"positive": conditions["edited"], "negative": conditions["source"]}
    return host.run_node("RewindSVDDenoise", model=model, inversion=inversion, **both, **inputs)[0]["samples"]


# --- SVD Denoise, Latent Normalize, Latent Rescale --------------------------------------------------------------------


@pytest.mark.parametrize("denormalize", [True, False])
@pytest.mark.parametrize("kind", ["off", "channel", "frame"])
def test_outside_a_hard_mask_the_result_is_the_source_latent_to_the_bit(host, model, conditions, kind, denormalize):
    """The LATENT as the VAE gave it, whatever was done to it between."""
    source, mask = tiny_models.latent("svd"), hard_mask(5)
    before = source["samples"].clone()
    (latent,) = host.run_node("RewindLatentNormalize", model=model, latent=source, kind=kind, mask=mask)
    *_, inversion = invert(host, model, latent, conditions)
    result = denoise(host, model, conditions, inversion, mask=mask, denormalize=denormalize, last_guidance=2.0)
    reference = {"samples": 2 * before[:1] + 1}
    (rescaled,) = host.run_node(
        "RewindLatentRescale", latent={"samples": result}, reference=reference, strength=1.0, mask=mask
    )
    kept = outside(host, mask, before.shape)
    for samples in (result, rescaled["samples"]):
        assert torch.equal(samples[kept], before[kept])
        assert float((samples - before)[~kept].abs().mean()) > 0.05
    inside = ~kept[0, 0]
    for own, wanted in zip(rescaled["samples"][0], reference["samples"][0]):
        torch.testing.assert_close(own[inside].std(), wanted[inside].std(), rtol=1e-3, atol=1e-3)
    assert torch.equal(source["samples"], before) and set(source) == {"samples"}


def test_the_network_sees_the_sources_own_noise_outside(host, model, conditions):
    """At each level the trajectory's point, to the bit: neither what the edit made of it nor the clean clip."""
    source, mask, seen = tiny_models.latent("svd"), hard_mask(5), []
    *_, inversion = invert(host, model, source, conditions)
    spying = model.clone()

    def spy(apply_model, args):
        seen.append(args["input"].clone())
        return apply_model(args["input"], args["timestep"], **args["c"])

    spying.set_model_unet_function_wrapper(spy)
    denoise(host, spying, conditions, inversion, mask=mask)
    assert len(seen) == STEPS
    kept = outside(host, mask, source["samples"].shape)
    for index, x in enumerate(seen):
        point = inversion.trajectory[-1 - index]
        assert torch.equal(x.cpu()[kept], point[kept])
        assert not torch.equal(point[kept], inversion.trajectory[0][kept])


def test_a_mask_of_everything_and_a_soft_one(host, model, conditions):
    *_, inversion = invert(host, model, tiny_models.latent("svd"), conditions)
    plain = denoise(host, model, conditions, inversion)
    assert torch.equal(denoise(host, model, conditions, inversion, mask=torch.ones(1, 64, 64)), plain)
    half = denoise(host, model, conditions, inversion, mask=torch.full((64, 64), 0.5))
    source = inversion.original
    assert 0.05 < float((half - source).norm() / (plain - source).norm()) < 0.6


def test_a_clip_that_was_changed_after_its_normalisation_is_what_comes_back(host, model, conditions):
    """Turned upside down behind Latent Normalize: the source is then the turned clip."""
    source, mask = tiny_models.latent("svd"), hard_mask(5)
    (latent,) = host.run_node("RewindLatentNormalize", model=model, latent=source, kind="channel")
    turned = {**latent, "samples": latent["samples"].flip(2)}
    *_, inversion = invert(host, model, turned, conditions)
    result, kept = denoise(host, model, conditions, inversion, mask=mask), outside(host, mask, (5, 4, 8, 8))
    torch.testing.assert_close(result[kept], source["samples"].flip(2)[kept], rtol=1e-4, atol=1e-4)


BAD = {
    "frames": (hard_mask(4), "the mask has 4 frames, the clip 5"),
    "proportions": (torch.ones(5, 64, 96), "the proportions differ"),
    "empty": (torch.zeros(5, 64, 64), "empty"),
    "NaN": (torch.full((5, 64, 64), float("nan")), "0..1"),
}


@pytest.mark.parametrize(("mask", "message"), BAD.values(), ids=BAD)
def test_bad_masks_are_refused_before_any_sampling(host, model, conditions, mask, message):
    *_, inversion = invert(host, model, tiny_models.latent("svd"), conditions)
    counting, calls = tiny_models.counted(model)
    with pytest.raises(ValueError, match=message):
        denoise(host, counting, conditions, inversion, mask=mask)
    assert calls == []


# --- Masked Sampler, Source Composite ---------------------------------------------------------------------------------


def play(host, model, positive, sampler, latent, sigmas):
    (guider,) = host.run_node("BasicGuider", model=model, conditioning=positive)
    (none,) = host.run_node("DisableNoise")
    result, _ = host.run_node(
        "SamplerCustomAdvanced", noise=none, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=latent
    )
    return result


@pytest.mark.parametrize("kind", ["off", "channel"])
def test_the_sampler_is_svd_denoise(host, model, conditions, kind):
    source, mask = tiny_models.latent("svd"), hard_mask(5)
    (latent,) = host.run_node("RewindLatentNormalize", model=model, latent=source, kind=kind)
    inverted, sigmas, _, inversion = invert(host, model, latent, conditions)
    (sampler,) = host.run_node("RewindMaskedSampler", inversion=inversion, mask=mask)
    played = play(host, model, conditions["edited"], sampler, inverted, sigmas)
    (final,) = host.run_node("RewindSourceComposite", latent=played, source=source, mask=mask)
    wanted = denoise(host, model, conditions, inversion, mask=mask)
    torch.testing.assert_close(final["samples"], wanted, rtol=1e-4, atol=1e-4)


def test_the_sampler_says_what_is_connected_wrongly(host, model, conditions):
    source, mask = tiny_models.latent("svd"), hard_mask(5)
    inverted, sigmas, _, inversion = invert(host, model, source, conditions)
    (sampler,) = host.run_node("RewindMaskedSampler", inversion=inversion, mask=mask)
    counting, calls = tiny_models.counted(model)
    empty = {"samples": torch.zeros_like(source["samples"])}
    short = {"samples": inverted["samples"][:4]}
    wrong = {
        "the LATENT is empty": (empty, sigmas),
        "stored nothing at the noise level": (inverted, 0.9 * sigmas),
        "start from the clip that was inverted": (short, sigmas),
    }
    for message, (latent, levels) in wrong.items():
        with pytest.raises(ValueError, match=message):
            play(host, counting, conditions["edited"], sampler, latent, levels)
    assert calls == []
    with pytest.raises(ValueError, match="the mask has 3 frames, the clip 5"):
        host.run_node("RewindMaskedSampler", inversion=inversion, mask=mask[:3])


def test_source_composite_keeps_the_latents_other_keys_and_refuses_another_clip(host):
    edited, source = {**tiny_models.latent("svd", 1), "batch_index": [4]}, tiny_models.latent("svd")
    (result,) = host.run_node("RewindSourceComposite", latent=edited, source=source, mask=hard_mask(5))
    assert result["batch_index"] == [4]
    with pytest.raises(ValueError, match=r"shape \(5, 4, 8, 8\), the source \(1, 16, 3, 8, 8\)"):
        host.run_node("RewindSourceComposite", latent=edited, source=tiny_models.latent("wan"), mask=hard_mask(5))


# --- Pixel Composite --------------------------------------------------------------------------------------------------


def test_pixel_composite_is_the_clip_outside_the_mask_to_the_bit(host):
    generator = torch.Generator().manual_seed(0)
    source, edited = (0.2 + 0.6 * torch.rand(3, 64, 64, 3, generator=generator) for _ in range(2))
    before, mask = source.clone(), hard_mask(3)
    wanted = torch.where(mask[..., None] == 1, edited, source)
    (mixed,) = host.run_node("RewindPixelComposite", images=edited, clip=source, mask=mask, match=False)
    assert torch.equal(mixed, wanted)
    (matched,) = host.run_node("RewindPixelComposite", images=wanted + 0.1, clip=source, mask=mask)
    assert torch.equal(matched[mask == 0], source[mask == 0]) and torch.equal(source, before)
    torch.testing.assert_close(matched, wanted)
    alpha = torch.cat([source, torch.rand(3, 64, 64, 1, generator=generator)], -1)
    assert torch.equal(
        mixed, host.run_node("RewindPixelComposite", images=edited, clip=alpha, mask=mask, match=False)[0]
    )


def test_pixel_composite_brings_the_clip_and_the_mask_to_the_edits_size(host):
    source, edited = torch.rand(2, 96, 128, 3), torch.rand(2, 48, 64, 3)
    mask = torch.zeros(1, 96, 128)
    mask[:, :, 64:] = 1
    (mixed,) = host.run_node("RewindPixelComposite", images=edited, clip=source, mask=mask, match=False)
    import comfy.utils

    small = comfy.utils.common_upscale(source.movedim(-1, 1), 64, 48, "bilinear", "center").movedim(1, -1)
    assert torch.equal(mixed[:, :, :31], small[:, :, :31]) and torch.equal(mixed[:, :, 33:], edited[:, :, 33:])


BAD_PIXELS = {
    "frames": ({"clip": torch.rand(2, 64, 64, 3)}, "images has 3 frames, clip 2"),
    "masks": ({"mask": hard_mask(2)}, "the mask has 2 frames, the clip 3"),
    "proportions": ({"mask": torch.ones(1, 64, 96)}, "proportions differ"),
    "grey": ({"images": torch.rand(3, 64, 64, 1)}, "at least one RGB image"),
}


@pytest.mark.parametrize(("change", "message"), BAD_PIXELS.values(), ids=BAD_PIXELS)
def test_pixels_that_do_not_fit_are_refused(host, change, message):
    inputs = {"images": torch.rand(3, 64, 64, 3), "clip": torch.rand(3, 64, 64, 3), "mask": hard_mask(3)}
    with pytest.raises(ValueError, match=message):
        host.run_node("RewindPixelComposite", **{**inputs, **change})


# --- Edit Mask --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(host):
    """A clip, its edited first frame, and its object's masks."""
    chosen = host.module("demo.clip").example(1000, "recolour")
    images = [clip.movedim(1, -1).contiguous() for clip in (chosen.source[:4], chosen.target[:1])]
    return *images, (chosen.source_mask[:4] > 0.5).float()


def test_edit_mask_is_the_pipelines_mask(host, clip):
    source, edited, truth = clip
    masks = host.module("pipelines.videoshop.masks")
    (mask,) = host.run_node("RewindEditMask", clip=source, edited_frame=edited, grow=2, feather=3)
    settings = masks.MaskSettings(grow=2, feather=3)
    wanted = masks.edit_mask(source.movedim(-1, 1), edited[0].movedim(-1, 0), settings)
    assert mask.shape == (4, 96, 96) and torch.equal(mask, wanted)
    assert torch.equal(mask, host.run_node("RewindEditMask", clip=source, edited_frame=edited, grow=2, feather=3)[0])
    assert (mask[truth > 0] > 0).float().mean() > 0.97
    alpha = [torch.cat([images, torch.rand(*images.shape[:3], 1)], -1) for images in (source, edited)]
    (with_alpha,) = host.run_node("RewindEditMask", clip=alpha[0], edited_frame=alpha[1], grow=2, feather=3)
    assert torch.equal(with_alpha, mask)


def test_a_painted_mask_follows_the_motion(host, clip):
    source, _, truth = clip
    own = {"clip": source, "edited_frame": source[:1], "grow": 0}
    (mask,) = host.run_node("RewindEditMask", first_mask=truth[:1], **own)
    assert torch.equal(mask[0], truth[0])
    for found, wanted in zip(mask, truth):
        assert float((found * wanted).sum() / torch.maximum(found, wanted).sum()) > 0.9
    large = torch.nn.functional.interpolate(truth[None, :1], scale_factor=2.0)[0]
    (again,) = host.run_node("RewindEditMask", first_mask=large, **own)
    assert float((again != mask).float().mean()) < 0.01
    with pytest.raises(ValueError, match="first_mask has 4 masks"):
        host.run_node("RewindEditMask", first_mask=truth, **own)


def test_the_hosts_optical_flow_model_takes_the_flows_place(host, clip):
    """One of the host's kind, whose network finds everything one pixel to the left in the frame before."""
    import comfy.model_patcher

    class Left(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, now, then):
            return [torch.tensor([-now.shape[3] / 96, 0.0])[None, :, None, None].expand(1, 2, *now.shape[2:])]

    cpu = torch.device("cpu")
    patcher = comfy.model_patcher.ModelPatcher(Left(), load_device=cpu, offload_device=cpu)
    source, edited, truth = clip
    (mask,) = host.run_node(
        "RewindEditMask", clip=source, edited_frame=edited, first_mask=truth[:1], grow=0, optical_flow=patcher
    )
    assert torch.equal(mask, torch.stack([truth[0].roll(i, 1) for i in range(4)]))


BAD_EDITS = {
    "nothing edited": (lambda s, e: (s, s[:1]), "differs from the clip's first frame by at most 0.000"),
    "several": (lambda s, e: (s, s), "edited_frame has 4 images"),
    "another shape": (lambda s, e: (s, e[:, :48]), "proportions differ"),
    "no frames": (lambda s, e: (s[:0], e), "at least one RGB image"),
    "NaN": (lambda s, e: (s * float("nan"), e), "NaN"),
}


@pytest.mark.parametrize(("change", "message"), BAD_EDITS.values(), ids=BAD_EDITS)
def test_clips_that_cannot_be_are_refused(host, clip, change, message):
    source, edited = change(*clip[:2])
    with pytest.raises(ValueError, match=message):
        host.run_node("RewindEditMask", clip=source, edited_frame=edited)


def test_cancel_stops_between_two_frames(host, clip, monkeypatch):
    import comfy.model_management as management

    motion = host.module("nodes.masks")
    looked = []

    def flow(frame, other):
        looked.append(1)
        management.interrupt_current_processing()
        return torch.zeros(2, 96, 96)

    monkeypatch.setattr(motion, "_flow", lambda optical_flow: flow)
    with pytest.raises(management.InterruptProcessingException):
        host.run_node("RewindEditMask", clip=clip[0], edited_frame=clip[1])
    assert len(looked) == 1


# --- the graphs -------------------------------------------------------------------------------------------------------


def read(name):
    return json.loads((comfy_host.ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))


def prepared(server, name):
    """The graph in API form with few steps, and nodes that save the source's latent and the result's."""
    prompt = to_api(read(name), server.object_info())
    prompt[node_of(prompt, "BasicScheduler")]["inputs"]["steps"] = 6
    decoded = prompt[node_of(prompt, "VAEDecode")]["inputs"]["samples"]
    source = [node_of(prompt, "RewindVideoshopConditioning"), 4]
    mask = [node_of(prompt, "RewindEditMask"), 0]
    for number, samples in (("901", source), ("902", decoded)):
        inputs = {"samples": samples, "filename_prefix": f"latents/{name}{number}"}
        prompt[number] = {"class_type": "SaveLatent", "inputs": inputs, "_meta": {"title": "save"}}
    prompt["903"] = {"class_type": "MaskPreview", "inputs": {"mask": mask}, "_meta": {"title": "mask"}}
    return prompt


@pytest.mark.parametrize("name", ["videoshop_masked", "videoshop_masked_sampler"])
def test_in_the_graph_the_latents_outside_are_the_sources_to_the_bit(host, server, trained, name):
    prompt = prepared(server, name)
    history = server.prompt(prompt)
    source, result = (saved_latent(server, history, number) for number in ("901", "902"))
    mask = frames(server, history, "903")[..., 0]
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    kept = outside(host, mask, source.shape)
    assert torch.equal(result[kept], source[kept])
    assert float((result - source)[~kept].abs().mean()) > 0.1


def test_in_the_graph_the_frames_outside_are_the_clips_own(host, server, trained):
    prompt = prepared(server, "videoshop_masked")
    history = server.prompt(prompt)
    result, mask = (frames(server, history, node) for node in (node_of(prompt, "PreviewImage"), "903"))
    mask = mask[..., 0]
    inputs = prompt[node_of(prompt, "RewindDemoClip")]["inputs"]
    truth = host.module("demo.clip").example(inputs["seed"], inputs["edit"])
    source = (truth.source.movedim(1, -1) * 255).clamp(0, 255).to(torch.uint8)  # as the host saves pictures
    shown = (result * 255).round().to(torch.uint8)
    assert torch.equal(shown[mask == 0], source[mask == 0])
    assert float((result - truth.source.movedim(1, -1))[mask == 1].abs().mean()) > 0.02
