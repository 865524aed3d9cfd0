"""The nodes around Dreamix's fine-tuning do what the methods say, on the host's own models, samplers and VAEs."""

from __future__ import annotations

import math

import pytest
import tiny_models
import torch

FRAMES, SIZE = 5, 64
FAMILIES = ("svd", "sd15", "wan")
SEED = 11


@pytest.fixture(scope="module")
def models(host):
    return {family: getattr(tiny_models, family)(host) for family in FAMILIES}


@pytest.fixture(scope="module")
def vaes(host):
    """The embedded VAE for the models that take frames as a batch, a tiny one of the host's class for Wan."""
    config, keys = host.module("demo.models").ImageToVideoConfig(), host.module("demo.keys")
    weights = keys.split_checkpoint(tiny_models.checkpoint(host))["vae"]
    by_frame = host.module("nodes.host.models").build_vae(weights, config)
    return {"svd": by_frame, "sd15": by_frame, "wan": tiny_models.wan_vae()}


@pytest.fixture
def clip():
    return torch.rand(FRAMES, SIZE, SIZE, 3, generator=torch.Generator().manual_seed(0))


def corrupt(host, models, vaes, family, images, **values):
    return host.run_node("RewindDreamixCorrupt", images=images, model=models[family], vae=vaes[family], **values)


def sampled(host, model, family, latent, sigmas):
    """Through core nodes only: the result, and what the network was first called with."""
    clone, seen = model.clone(), []

    def record(apply_model, args):
        seen.append(args["input"].clone())
        return apply_model(args["input"], args["timestep"], **args["c"])

    clone.set_model_unet_function_wrapper(record)
    condition = tiny_models.conditioning(family)
    condition[0][1].pop("concat_latent_image", None)  # made for another number of pixels
    (guider,) = host.run_node("BasicGuider", model=clone, conditioning=condition)
    (noise,) = host.run_node("RandomNoise", noise_seed=SEED)
    (sampler,) = host.run_node("KSamplerSelect", sampler_name="euler")
    result, _ = host.run_node(
        "SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=latent
    )
    return result["samples"], seen


def drawn_noise(samples):
    import comfy.sample

    return comfy.sample.prepare_noise(samples, SEED)


# --- Dreamix Corrupt -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("s", [0.3, 0.85])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_sampler_begins_at_alpha_x0_plus_sigma_noise(host, models, vaes, clip, family, s):
    model = models[family]
    _, latent, sigmas = corrupt(host, models, vaes, family, clip, s=s, steps=4)
    ratio = math.tan(math.pi * s / 2)
    sigma = ratio / (1 + ratio) if family == "wan" else ratio
    assert float(sigmas[0]) == pytest.approx(sigma, rel=1e-6)
    assert float(sigmas[-1]) == 0 and bool((sigmas.diff() < 0).all())
    _, seen = sampled(host, model, family, latent, sigmas)
    x0, noise = model.model.process_latent_in(latent["samples"]), drawn_noise(latent["samples"])
    signal = 1 - sigma if family == "wan" else 1.0
    torch.testing.assert_close(seen[0], signal * x0 + sigma * noise, rtol=1e-5, atol=1e-5)
    assert len(seen) == len(sigmas) - 1


@pytest.mark.parametrize("family", FAMILIES)
def test_one_s_is_one_ratio_of_signal_and_noise(host, models, vaes, clip, family):
    """Equal log-SNR on every kind of model: at s = 0.5 signal and noise are alike."""
    _, _, sigmas = corrupt(host, models, vaes, family, clip, s=0.5)
    assert float(sigmas[0]) == pytest.approx(0.5 if family == "wan" else 1.0, rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_noise_the_sampler_hands_the_latent_on(host, models, vaes, clip, family):
    _, latent, sigmas = corrupt(host, models, vaes, family, clip, s=0.0)
    assert len(sigmas) == 0 and torch.count_nonzero(latent["samples"])
    result, seen = sampled(host, models[family], family, latent, sigmas)
    assert torch.equal(result, latent["samples"]) and not seen


@pytest.mark.parametrize("family", FAMILIES)
def test_from_pure_noise_nothing_of_the_clip_is_left(host, models, vaes, clip, family):
    _, latent, sigmas = corrupt(host, models, vaes, family, clip, s=1.0, steps=3)
    _, other, _ = corrupt(host, models, vaes, family, 1 - clip, s=1.0, steps=3)
    assert latent.keys() == {"samples"} and torch.equal(latent["samples"], other["samples"])
    assert latent["samples"].shape == corrupt(host, models, vaes, family, clip, s=0.5)[1]["samples"].shape
    whole = tiny_models.sigmas(models[family], 3, "simple" if family == "wan" else "karras")
    assert torch.equal(sigmas, whole)
    _, seen = sampled(host, models[family], family, latent, sigmas)
    top = float(sigmas[0])
    scale = top if family == "wan" else (1 + top**2) ** 0.5  # the host's own noise for a model's highest level
    torch.testing.assert_close(seen[0], scale * drawn_noise(latent["samples"]), rtol=1e-5, atol=1e-5)


def test_the_clip_is_degraded_as_the_method_does_and_encoded_as_the_host_does(host, models, vaes, clip):
    degrade = host.module("pipelines.dreamix.corruption").degrade
    values = {"factor": 3.0, "stride": 2, "temporal": "linear"}
    images, latent, _ = corrupt(host, models, vaes, "svd", clip, s=0.6, **values)
    assert torch.equal(images, degrade(clip.movedim(-1, 1), 3.0, None, 2, "linear").movedim(1, -1))
    (encoded,) = host.run_node("VAEEncode", pixels=images, vae=vaes["svd"])
    assert torch.equal(latent["samples"], encoded["samples"])
    assert float((images - clip).abs().mean()) > 0.05
    same, _, _ = corrupt(host, models, vaes, "svd", clip, factor=1.0)
    assert torch.equal(same, clip)


def test_alpha_is_dropped_and_the_input_stays(host, models, vaes, clip):
    kept = clip.clone()
    first = corrupt(host, models, vaes, "svd", clip)
    with_alpha = corrupt(host, models, vaes, "svd", torch.cat([clip, torch.rand(FRAMES, SIZE, SIZE, 1)], -1))
    assert torch.equal(clip, kept)
    for ours, theirs in zip(
        (first[0], first[1]["samples"], first[2]), (with_alpha[0], with_alpha[1]["samples"], with_alpha[2])
    ):
        assert torch.equal(ours, theirs)
    beyond = corrupt(host, models, vaes, "svd", clip * 1.01, factor=1.0)[0]  # as an upscale by Lanczos leaves it
    assert float(beyond.max()) == 1.0


@pytest.mark.parametrize("family, name", [("svd", "karras"), ("sd15", "karras"), ("wan", "simple")])
def test_the_scheduler_fits_the_model(host, models, vaes, clip, family, name):
    automatic, chosen = (
        corrupt(host, models, vaes, family, clip, steps=8, scheduler=scheduler)[2] for scheduler in ("automatic", name)
    )
    assert torch.equal(automatic, chosen)
    whole = tiny_models.sigmas(models[family], 8, name)
    assert torch.equal(automatic[1:], whole[len(whole) - len(automatic) + 1 :])
    other = corrupt(host, models, vaes, family, clip, steps=8, scheduler="normal")[2]
    assert len(other) != len(automatic) or not torch.equal(other, automatic)


BAD_CLIPS = {
    "one frame": ("svd", lambda c: c[:1], "1 frame"),
    "no frames": ("svd", lambda c: c[:0], "connect RGB images"),
    "grey": ("svd", lambda c: c[..., :1], "connect RGB images"),
    "NaN": ("svd", lambda c: c * float("nan"), "NaN"),
    "infinite": ("svd", lambda c: c / 0, "infinite"),
    "a length that Wan's VAE cuts": ("wan", lambda c: c[:4], "4 frames; this VAE takes 1 or 5"),
}


@pytest.mark.parametrize("case", BAD_CLIPS)
def test_clips_that_cannot_be_are_refused(host, models, vaes, clip, case):
    family, change, message = BAD_CLIPS[case]
    with pytest.raises(ValueError, match=message):
        corrupt(host, models, vaes, family, change(clip))


def test_a_vae_of_another_model_is_refused(host, models, vaes, clip):
    with pytest.raises(ValueError, match="VAE that belongs to the MODEL"):
        host.run_node("RewindDreamixCorrupt", images=clip, model=models["wan"], vae=vaes["svd"])


@pytest.mark.parametrize("value", [{"s": 1.2}, {"factor": 0.5}, {"stride": 0}, {"temporal": "none"}])
def test_values_out_of_their_range_are_refused(host, models, vaes, clip, value):
    with pytest.raises(ValueError, match=r"must be"):
        corrupt(host, models, vaes, "svd", clip, **value)


# --- Dreamix Coarse Video --------------------------------------------------------------------------------------------


def coarse(host, image, **values):
    return host.run_node("RewindDreamixCoarseVideo", image=image, **values)[0]


def test_a_coarse_video_is_the_methods_own(host, clip):
    module = host.module("pipelines.dreamix.coarse_video")
    kept = clip.clone()
    video = coarse(
        host, clip[:1], frames=7, move="pan left", amount=0.5, fill="reflect", easing="linear", yaw=10.0, zoom=1.2
    )
    end = module.View(zoom=1.2, x=0.125, yaw=10.0)
    wanted = module.coarse_video(clip[0].movedim(-1, 0), 7, end, fill="reflect", easing="linear")
    torch.testing.assert_close(video, wanted.movedim(1, -1), rtol=0, atol=1e-6)
    assert torch.equal(video[0], clip[0]), "the first frame is the picture"
    assert torch.equal(clip, kept)
    assert torch.equal(
        video,
        coarse(
            host, clip[:1], frames=7, move="pan left", amount=0.5, fill="reflect", easing="linear", yaw=10.0, zoom=1.2
        ),
    )


def test_every_view_can_be_reached_from_a_still_picture(host):
    """Added to the move that stands still, the extra inputs are the view; zooms are multiplied."""
    at_end, module = host.module("nodes.dreamix").view_at_end, host.module("pipelines.dreamix.coarse_video")
    view = module.View(0.5, 0.1, -0.2, 30.0, -20.0, 45.0)
    assert at_end("replicate", 1.0, view) == view
    sum_of_both = at_end("zoom out", 1.0, view)
    assert sum_of_both.zoom == pytest.approx(0.35) and sum_of_both.yaw == 30.0
    assert at_end("roll", -2.0, module.View(roll=5.0)).roll == pytest.approx(-25.0)


def test_a_still_picture_is_repeated(host, clip):
    video = coarse(host, clip[:1], frames=4, move="replicate")
    assert torch.equal(video, clip[:1].expand(4, -1, -1, -1))
    with_alpha = torch.cat([clip[:1], torch.zeros(1, SIZE, SIZE, 1)], -1)
    assert torch.equal(coarse(host, with_alpha, frames=4, move="replicate"), video)


@pytest.mark.parametrize(
    "count, values, message",
    [
        (3, {}, "3 images: connect one picture"),
        (0, {}, "connect RGB images"),
        (1, {"frames": 1}, "at least 2"),
        (1, {"move": "dance"}, "must be one of"),
        (1, {"move": "turn left", "amount": 4.0}, "turn it less"),
        (1, {"fill": "black"}, "must be one of"),
    ],
)
def test_what_is_no_picture_to_animate_is_refused(host, clip, count, values, message):
    with pytest.raises(ValueError, match=message):
        coarse(host, clip[:count], **values)


# --- Dreamix Prompt --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(host):
    """A CLIP with the embedded model's vocabulary and random weights."""
    weights = host.module("demo.keys").split_checkpoint(tiny_models.text_checkpoint(host))
    return host.module("nodes.host.models").build_clip(weights["text_encoder"])


def same(a, b):
    assert len(a) == len(b)
    return all(torch.equal(x[0], y[0]) and x[1].keys() == y[1].keys() for x, y in zip(a, b))


def test_both_texts_are_encoded_as_the_host_does(host, encoder):
    token, edit, prompt = host.run_node("RewindDreamixPrompt", clip=encoder, token="sks", prompt="a shape moves up")
    assert prompt == "a sks shape moves up"
    (bare,) = host.run_node("CLIPTextEncode", clip=encoder, text="sks")
    (whole,) = host.run_node("CLIPTextEncode", clip=encoder, text=prompt)
    assert same(token, bare) and same(edit, whole) and not same(edit, bare)
    written = host.run_node("RewindDreamixPrompt", clip=encoder, token="sks", prompt=prompt, place="as written")
    assert written[2] == prompt and same(written[1], edit)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"token": ""}, "token is empty"),
        ({"token": "two words"}, "without spaces"),
        ({"place": "as written"}, 'does not hold the token "sks"'),
        ({"clip": None}, "no text encoder"),
    ],
)
def test_a_prompt_that_cannot_be_is_refused_before_anything_is_encoded(host, encoder, values, message):
    class Unused:
        def tokenize(self, text):
            raise AssertionError("encoded all the same")

    given = {"clip": Unused(), "prompt": "a shape moves up", **values}
    with pytest.raises(ValueError, match=message):
        host.run_node("RewindDreamixPrompt", **given)


# --- Dreamix Preset --------------------------------------------------------------------------------------------------


def test_every_preset_is_handed_out_and_shown(host):
    presets = host.module("pipelines.dreamix.presets").PRESETS
    (options,) = [
        spec[1]["options"] for spec in [host.mappings["RewindDreamixPreset"].INPUT_TYPES()["required"]["kind"]]
    ]
    assert options == list(presets)
    for kind, preset in presets.items():
        outputs, ui = host.run_node_ui("RewindDreamixPreset", kind=kind)
        assert outputs == tuple(vars(preset).values())
        assert [type(value) for value in outputs] == [float, float, int, float, int, float]
        assert ui["text"] == [str(preset)]


def test_the_nodes_defaults_fit_the_presets(host):
    """What a preset says, the nodes that it is connected to take."""
    limits = {}
    for node in ("RewindDreamixCorrupt", "RewindDreamixFineTune"):
        for part in host.mappings[node].INPUT_TYPES().values():
            limits |= {name: rest[0] for name, (_, *rest) in part.items() if rest and "min" in rest[0]}
    for preset in host.module("pipelines.dreamix.presets").PRESETS.values():
        values = {**vars(preset), "steps": preset.fine_tune_steps}
        for name in ("s", "factor", "stride", "alpha", "steps"):
            assert limits[name]["min"] <= values[name] <= limits[name]["max"]
