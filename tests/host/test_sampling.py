"""The adapter in the host's guider: determinism, Cancel, previews, cost, guidance, other packs' patches."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from context_windows import windowed

STEPS = 6


@pytest.fixture(scope="module")
def model(host):
    return tiny_models.svd(host)


@pytest.fixture(scope="module")
def inputs(model):
    return {
        "positive": tiny_models.conditioning("svd"),
        "latent": tiny_models.latent("svd"),
        "sigmas": tiny_models.sigmas(model, STEPS, "karras"),
    }


def test_equal_inputs_give_equal_outputs_and_stay_as_they_were(host, model, inputs):
    """As when the host hands back a cached object: the same objects twice, and a fresh pair."""
    before = {name: value.clone() for name, value in (("s", inputs["sigmas"]), ("x", inputs["latent"]["samples"]))}
    state = torch.random.get_rng_state()
    first = host.run_node("RewindEDMInversion", model=model, **inputs, seed=3, refine=2)
    again = host.run_node("RewindEDMInversion", model=model, **inputs, seed=3, refine=2)
    other = host.run_node("RewindEDMInversion", model=model, **inputs, seed=4, guess_below="random")
    assert torch.equal(first[0]["samples"], again[0]["samples"])
    assert torch.equal(first[3].trajectory, again[3].trajectory)
    assert not torch.equal(first[0]["samples"], other[0]["samples"])
    assert torch.equal(inputs["sigmas"], before["s"]) and torch.equal(inputs["latent"]["samples"], before["x"])
    assert set(inputs["latent"]) == {"samples"}
    assert torch.equal(torch.random.get_rng_state(), state), "the node touches the host's random numbers"
    noise, empty = first[2], {"samples": torch.zeros_like(inputs["latent"]["samples"])}
    one, two = noise.generate_noise(empty), noise.generate_noise(empty)
    one.zero_()
    assert two.count_nonzero() and torch.equal(noise.generate_noise(empty), two)


def test_the_sampler_is_the_node(host, model, inputs):
    """The SAMPLER in core's SamplerCustomAdvanced, twice from the same object, gives what the node gives."""
    guesses = {"guess_above": "extrapolation", "guess_below": "random", "refine": 1}
    (sampler,) = host.run_node("RewindEDMInversionSampler", **guesses)
    (guider,) = host.run_node("BasicGuider", model=model, conditioning=inputs["positive"])
    wanted, sigmas, _, _ = host.run_node("RewindEDMInversion", model=model, **inputs, **guesses, strength=1.0, seed=11)

    class Noise:
        seed = 11

        def generate_noise(self, latent):
            return torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(11))

    for _ in range(2):
        result, _ = host.run_node(
            "SamplerCustomAdvanced",
            noise=Noise(),
            guider=guider,
            sampler=sampler,
            sigmas=inputs["sigmas"],
            latent_image=inputs["latent"],
        )
        torch.testing.assert_close(result["samples"], wanted["samples"], rtol=1e-6, atol=1e-6)


def test_the_random_guess_needs_a_direction(host, model, inputs):
    (sampler,) = host.run_node("RewindEDMInversionSampler", guess_below="random")
    (guider,) = host.run_node("BasicGuider", model=model, conditioning=inputs["positive"])
    (none,) = host.run_node("DisableNoise")
    with pytest.raises(ValueError, match="connect RandomNoise"):
        host.run_node(
            "SamplerCustomAdvanced",
            noise=none,
            guider=guider,
            sampler=sampler,
            sigmas=inputs["sigmas"],
            latent_image=inputs["latent"],
        )


def test_cancel_stops_within_one_step(host, model, inputs):
    import comfy.model_management as management

    def cancel(number):
        if number == 2:
            management.interrupt_current_processing()

    cancelling, calls = tiny_models.counted(model, cancel)
    with pytest.raises(management.InterruptProcessingException):
        host.run_node("RewindEDMInversion", model=cancelling, **inputs, refine=20)
    assert len(calls) == 2
    *_, inversion = host.run_node("RewindEDMInversion", model=model, **inputs)
    cancelling, calls = tiny_models.counted(model, cancel)
    positive = inputs["positive"]
    with pytest.raises(management.InterruptProcessingException):
        host.run_node("RewindSVDDenoise", model=cancelling, positive=positive, negative=positive, inversion=inversion)
    assert len(calls) == 2


def test_cancel_does_not_need_the_hosts_layers(host, model, inputs):
    """The host asks inside its own layers; a network of others' must stop as soon."""
    import comfy.model_management as management

    calls = []

    def foreign(apply_model, args):
        calls.append(1)
        if len(calls) == 2:
            management.interrupt_current_processing()
        return torch.zeros_like(args["input"])

    clone = model.clone()
    clone.set_model_unet_function_wrapper(foreign)
    with pytest.raises(management.InterruptProcessingException):
        host.run_node("RewindEDMInversion", model=clone, **inputs)
    assert len(calls) == 2


def test_no_network_call_is_wasted(host, model, inputs):
    counting, calls = tiny_models.counted(model)
    *_, inversion = host.run_node("RewindEDMInversion", model=counting, **inputs, strength=1.0)
    assert len(calls) == STEPS == inversion.evaluations
    negative = tiny_models.conditioning("svd", seed=1)
    for first, last, options, wanted in (
        (1.0, 1.0, {}, STEPS),  # no guidance: the negative side is never computed
        (1.0, 3.0, {}, 2 * STEPS),
        (3.0, 3.0, {"guidance_from": 5.0, "guidance_to": 100.0}, None),
    ):
        calls.clear()
        host.run_node(
            "RewindSVDDenoise",
            model=counting,
            positive=inputs["positive"],
            negative=negative,
            inversion=inversion,
            first_guidance=first,
            last_guidance=last,
            **options,
        )
        frames = sum(shape[0] for shape in calls) // tiny_models.SHAPES["svd"][0]
        if wanted is None:
            inside = [s for s in inputs["sigmas"][:-1].tolist() if 5.0 <= s <= 100.0]
            assert 0 < len(inside) < STEPS
            wanted = STEPS + len(inside)
        assert frames == wanted


def test_guidance_runs_from_frame_to_frame(host, model, inputs):
    """With one step, the result is the guided estimate itself: compared with core's own guider, frame by frame."""
    sigmas = torch.tensor([3.0, 0.0])
    negative = tiny_models.conditioning("svd", seed=1)
    changed = {**inputs, "sigmas": sigmas}
    _, _, noise, inversion = host.run_node("RewindEDMInversion", model=model, **changed, strength=1.0)

    def core(cfg):
        (guider,) = host.run_node("CFGGuider", model=model, positive=inputs["positive"], negative=negative, cfg=cfg)
        (euler,) = host.run_node("KSamplerSelect", sampler_name="euler")
        empty = {"samples": torch.zeros_like(inputs["latent"]["samples"])}
        result, _ = host.run_node(
            "SamplerCustomAdvanced", noise=noise, guider=guider, sampler=euler, sigmas=sigmas, latent_image=empty
        )
        return result["samples"]

    (result,) = host.run_node(
        "RewindSVDDenoise",
        model=model,
        positive=inputs["positive"],
        negative=negative,
        inversion=inversion,
        first_guidance=1.0,
        last_guidance=5.0,
    )
    for frame, cfg in enumerate((1.0, 2.0, 3.0, 4.0, 5.0)):
        torch.testing.assert_close(result["samples"][frame], core(cfg)[frame], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(core(1.0)[4], core(5.0)[4], atol=1e-3)


def test_a_guidance_function_on_the_model_does_no_harm(host, model, inputs):
    """VideoLinearCFGGuidance mixes the missing negative side's zeros in at guidance 1, unless it is left out."""
    (patched,) = host.run_node("VideoLinearCFGGuidance", model=model, min_cfg=2.0)
    plain = host.run_node("RewindEDMInversion", model=model, **inputs)[0]["samples"]
    assert torch.equal(host.run_node("RewindEDMInversion", model=patched, **inputs)[0]["samples"], plain)
    assert "sampler_cfg_function" in patched.model_options


def test_weight_patches_apply(host, model, inputs):
    """What a LoRA does: a patch on a weight of the clone changes the inversion, and the model stays as it was."""
    patched = model.clone()
    key = "diffusion_model.input_blocks.1.0.out_layers.3.weight"
    patched.add_patches({key: ("diff", (0.2 * torch.ones_like(model.model.state_dict()[key]),))}, 1.0)
    plain = host.run_node("RewindEDMInversion", model=model, **inputs)[0]["samples"]
    assert not torch.allclose(host.run_node("RewindEDMInversion", model=patched, **inputs)[0]["samples"], plain)
    assert torch.equal(host.run_node("RewindEDMInversion", model=model, **inputs)[0]["samples"], plain)


def test_context_windows_apply(host, model, inputs):
    counting, calls = tiny_models.counted(model)
    in_windows = windowed(host, counting)
    result = host.run_node("RewindEDMInversion", model=in_windows, **inputs, strength=1.0)[0]["samples"]
    assert result.shape == inputs["latent"]["samples"].shape and torch.isfinite(result).all()
    assert {shape[0] for shape in calls} == {3} and len(calls) > STEPS


def test_a_noise_mask_is_not_applied_and_that_is_said(host, model, inputs, caplog):
    mask = torch.zeros(1, 8, 8)
    masked = {**inputs, "latent": {**inputs["latent"], "noise_mask": mask, "batch_index": [0, 1, 2, 3, 4]}}
    plain = host.run_node("RewindEDMInversion", model=model, **inputs)[0]
    assert "noise_mask" not in caplog.text
    result = host.run_node("RewindEDMInversion", model=model, **masked)[0]
    assert torch.equal(result["samples"], plain["samples"])
    assert "noise_mask" in caplog.text
    assert set(result) == {"samples", "batch_index"}


BAD = {
    "ends above 0": ({"sigmas": torch.tensor([10.0, 1.0, 0.5])}, "must end in 0"),
    "not falling": ({"sigmas": torch.tensor([10.0, 10.0, 0.0])}, "do not fall"),
    "no steps": ({"sigmas": torch.zeros(0)}, "at least 1 step"),
    "NaN levels": ({"sigmas": torch.tensor([float("nan"), 0.0])}, "NaN"),
    "another model's levels": ({"sigmas": torch.tensor([5000.0, 1.0, 0.0])}, "end at 700"),
    "empty latent": ({"latent": {"samples": torch.zeros(5, 4, 8, 8)}}, "empty"),
    "no frames": ({"latent": {"samples": torch.zeros(0, 4, 8, 8)}}, "no frames"),
    "one frame": ({"latent": {"samples": torch.ones(1, 4, 8, 8)}}, "1 frame"),
    "NaN latent": ({"latent": {"samples": torch.full((5, 4, 8, 8), float("nan"))}}, "NaN"),
    "another model's latent": ({"latent": {"samples": torch.ones(1, 16, 3, 8, 8)}}, "4 channels"),
    "another size": ({"latent": {"samples": torch.ones(5, 4, 8, 16)}}, "made for 64 x 64 pixels"),
    "cfg without negative": ({"cfg": 3.0}, "negative is not connected"),
    "negative of another size": (
        {"cfg": 3.0, "negative": [[torch.ones(1, 1, 64), {"concat_latent_image": torch.ones(1, 4, 4, 4)}]]},
        "negative was made for 32 x 32 pixels",
    ),
    "another model's embedding": ({"positive": [[torch.ones(1, 1, 1024), {}]]}, "width 1024, this MODEL takes 64"),
    "no picture": ({"positive": [[torch.ones(1, 1, 64), {}]]}, "no first frame"),
    "no condition": ({"positive": []}, "positive is empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_inputs_are_refused_before_any_sampling(host, model, inputs, case):
    change, message = BAD[case]
    counting, calls = tiny_models.counted(model)
    with pytest.raises(ValueError, match=message):
        host.run_node("RewindEDMInversion", model=counting, **{**inputs, **change})
    assert calls == []


def test_a_clip_that_was_cut_after_its_normalisation_is_refused(host, model, inputs):
    counting, calls = tiny_models.counted(model)
    (normalised,) = host.run_node("RewindLatentNormalize", model=model, latent=inputs["latent"], kind="frame")
    (cut,) = host.run_node("LatentFromBatch", samples=normalised, batch_index=0, length=3)
    with pytest.raises(ValueError, match="before it is normalised, not after"):
        host.run_node("RewindEDMInversion", model=counting, **{**inputs, "latent": cut})
    assert calls == []


def test_the_noise_says_where_it_belongs(host, model, inputs):
    _, _, noise, inversion = host.run_node("RewindEDMInversion", model=model, **inputs)
    with pytest.raises(ValueError, match="empty latent of that size"):
        noise.generate_noise({"samples": torch.zeros(4, 4, 8, 8)})
    with pytest.raises(ValueError, match="empty latent"):
        noise.generate_noise(inputs["latent"])


def test_svd_denoise_refuses_other_models_and_sizes(host, model, inputs):
    *_, inversion = host.run_node("RewindEDMInversion", model=model, **inputs)
    positive = inputs["positive"]
    with pytest.raises(ValueError, match="not Stable Video Diffusion"):
        host.run_node(
            "RewindSVDDenoise", model=tiny_models.sd15(host), positive=positive, negative=positive, inversion=inversion
        )
    small = [[positive[0][0], {**positive[0][1], "concat_latent_image": torch.zeros(1, 4, 4, 4)}]]
    with pytest.raises(ValueError, match="made for 32 x 32 pixels"):
        host.run_node("RewindSVDDenoise", model=model, positive=small, negative=positive, inversion=inversion)
