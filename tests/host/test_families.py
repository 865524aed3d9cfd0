"""Inversion on the host's own classes: Stable Video Diffusion (V), Stable Diffusion 1.5 (EPS), three flow models."""

from __future__ import annotations

import pytest
import tiny_models
import torch

SCHEDULERS = {"svd": "karras", "sd15": "karras", "wan": "simple", "ltxv": "simple", "hunyuan": "simple"}
STEPS = 6


@pytest.fixture(scope="module")
def models(host):
    return {family: getattr(tiny_models, family)(host) for family in SCHEDULERS}


def invert(host, model, family, latent=None, **inputs):
    """The inversion node's four outputs on a tiny model."""
    return host.run_node(
        "RewindEDMInversion",
        model=model,
        positive=tiny_models.conditioning(family),
        latent=latent or tiny_models.latent(family),
        sigmas=tiny_models.sigmas(model, STEPS, SCHEDULERS[family]),
        **inputs,
    )


def resume(host, model, family, noise, sigmas, sampler="euler"):
    """Through core nodes only: the NOISE and an empty latent into SamplerCustomAdvanced."""
    (guider,) = host.run_node("BasicGuider", model=model, conditioning=tiny_models.conditioning(family))
    (kept,) = host.run_node("KSamplerSelect", sampler_name=sampler)
    empty = {"samples": torch.zeros(tiny_models.SHAPES[family])}
    result, _ = host.run_node(
        "SamplerCustomAdvanced", noise=noise, guider=guider, sampler=kept, sigmas=sigmas, latent_image=empty
    )
    return result["samples"]


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("family", SCHEDULERS)
def test_refined_inversion_comes_back_through_core_nodes(host, models, family):
    model, clean = models[family], tiny_models.latent(family)["samples"]
    _, sigmas, noise, inversion = invert(host, model, family, strength=1.0, refine=50)
    assert inversion.sigmas[-1] == 0 and len(inversion.residuals) == STEPS
    assert max(inversion.residuals) <= 1e-4
    back = resume(host, model, family, noise, sigmas)
    assert relative(back, clean) <= 1e-3
    # The test can fail: without refinement, or with another sampler, the clip does not come back as exactly.
    _, sigmas, noise, _ = invert(
        host, model, family, strength=1.0, refine=0, guess_above="current", guess_below="current"
    )
    assert relative(resume(host, model, family, noise, sigmas), clean) > 2e-3


@pytest.mark.parametrize("family", ["svd", "sd15"])
def test_the_latent_resumes_as_the_noise_does(host, models, family):
    """For families that add noise to the signal the host's DisableNoise route is exact too."""
    model = models[family]
    latent, sigmas, noise, _ = invert(host, model, family, strength=1.0)
    (guider,) = host.run_node("BasicGuider", model=model, conditioning=tiny_models.conditioning(family))
    (euler,) = host.run_node("KSamplerSelect", sampler_name="euler")
    (none,) = host.run_node("DisableNoise")
    result, _ = host.run_node(
        "SamplerCustomAdvanced", noise=none, guider=guider, sampler=euler, sigmas=sigmas, latent_image=latent
    )
    assert relative(result["samples"], resume(host, model, family, noise, sigmas)) < 1e-5


@pytest.mark.parametrize("family", ["svd", "sd15"])
def test_the_benchmarks_naive_inversion_is_what_the_hosts_nodes_do(host, models, family):
    """FlipSigmas, DisableNoise and euler, against the same steps written down in `pipelines`."""
    model, latent = models[family], tiny_models.latent(family)
    levels = tiny_models.sigmas(model, STEPS, SCHEDULERS[family])
    (guider,) = host.run_node("BasicGuider", model=model, conditioning=tiny_models.conditioning(family))
    (flipped,) = host.run_node("FlipSigmas", sigmas=levels)
    (euler,) = host.run_node("KSamplerSelect", sampler_name="euler")
    (none,) = host.run_node("DisableNoise")
    nodes, _ = host.run_node(
        "SamplerCustomAdvanced", noise=none, guider=guider, sampler=euler, sigmas=flipped, latent_image=latent
    )
    sampling, naive = host.module("nodes.host.sampling"), host.module("pipelines.videoshop.inversion")

    def written_down(denoiser, x, sigmas, *, extra_args, callback, **_):
        return naive.sample_naive_inversion(denoiser, x, sigmas.flip(0), extra_args, callback, disable=True)

    own = sampling.sample(
        sampling.guider(model, tiny_models.conditioning(family)),
        sampling.DirectSampler(written_down),
        levels,
        latent["samples"],
        torch.zeros_like(latent["samples"]),
        0,
    )
    assert relative(own, nodes["samples"]) < 1e-5


def test_a_controlnet_on_the_conditioning_applies(host, models):
    def inverted(positive):
        latent, *_ = host.run_node(
            "RewindEDMInversion",
            model=models["sd15"],
            positive=positive,
            latent=tiny_models.latent("sd15"),
            sigmas=tiny_models.sigmas(models["sd15"], STEPS, "karras"),
            strength=1.0,
        )
        return latent["samples"]

    plain = tiny_models.conditioning("sd15")
    image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    net = tiny_models.controlnet(host)

    def controlled(strength):
        values = {"positive": plain, "negative": plain, "control_net": net, "image": image, "strength": strength}
        return host.run_node("ControlNetApplyAdvanced", **values, start_percent=0.0, end_percent=1.0)[0]

    without = inverted(plain)
    assert relative(inverted(controlled(1.0)), without) > 1e-3
    assert torch.equal(inverted(controlled(1e-9)), without) or relative(inverted(controlled(1e-9)), without) < 1e-6
    assert torch.equal(inverted(plain), without)


@pytest.mark.parametrize("strength, steps", [(1.0, 6), (0.55, 3), (0.05, 1)])
def test_strength_takes_the_last_steps(host, models, strength, steps):
    model = models["svd"]
    _, sigmas, _, inversion = invert(host, model, "svd", strength=strength)
    assert torch.equal(sigmas, tiny_models.sigmas(model, STEPS, "karras")[-(steps + 1) :])
    assert inversion.trajectory.shape == (steps + 1, *tiny_models.SHAPES["svd"])
    assert inversion.evaluations == steps


@pytest.mark.parametrize("family", ["svd", "wan"])
def test_latent_normalize_gives_the_network_unit_spread(host, models, family):
    """What the model is called with at the first step, where the guess is the clean latent itself."""
    seen = []

    def record(apply_model, args):
        seen.append(args["input"].clone())
        return apply_model(args["input"], args["timestep"], **args["c"])

    latent = tiny_models.latent(family)
    channels = latent["samples"].shape[1]
    spread = torch.linspace(0.3, 8.0, channels).view(1, channels, *[1] * (latent["samples"].ndim - 2))
    latent = {"samples": latent["samples"] * spread + 1.5}
    model = models[family].clone()
    model.set_model_unet_function_wrapper(record)
    axes = [i for i in range(latent["samples"].ndim) if i != 1]
    for kind in ("off", "channel"):
        (normalised,) = host.run_node("RewindLatentNormalize", model=model, latent=latent, kind=kind)
        seen.clear()
        invert(host, model, family, normalised, guess_above="current", guess_below="current", strength=0.05)
        std = seen[0].std(axes)
        if kind == "off":
            assert float(std.max() / std.min()) > 5
        else:
            torch.testing.assert_close(std, torch.ones_like(std), rtol=1e-3, atol=1e-3)


def test_the_normalisation_travels_into_the_inversion(host, models):
    model, latent = models["svd"], {"samples": 5 * tiny_models.latent("svd")["samples"] + 2}
    (normalised,) = host.run_node("RewindLatentNormalize", model=model, latent=latent, kind="channel")
    _, _, _, inversion = invert(host, model, "svd", normalised)
    source = model.model.process_latent_out(inversion.source)
    torch.testing.assert_close(source, latent["samples"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", SCHEDULERS)
def test_the_path_is_read_from_the_model(host, models, family):
    sampling, denoiser = host.module("nodes.host.sampling"), host.module("pipelines.denoiser")
    wanted = {"svd": denoiser.V, "sd15": denoiser.EPS}.get(family, denoiser.FLOW)
    assert sampling.noise_path(models[family].get_model_object("model_sampling")) == wanted


def resampled(model, kind):
    """A MODEL that makes its denoised estimate as another kind does."""
    import comfy.model_sampling

    class Sampling(comfy.model_sampling.ModelSamplingContinuousEDM, kind):
        pass

    model = model.clone()
    model.add_object_patch("model_sampling", Sampling(model.model.model_config))
    return model


@pytest.mark.parametrize("name", ["X0", "IMG_TO_IMG", "IMG_TO_IMG_FLOW", "V_PREDICTION_DDPM"])
def test_models_in_other_coordinates_are_refused(host, models, name):
    import comfy.model_sampling

    if not hasattr(comfy.model_sampling, name):
        pytest.skip(f"ComfyUI {host.version} has no {name}")
    with pytest.raises(ValueError, match=f"samples as {name}"):
        invert(host, resampled(models["svd"], getattr(comfy.model_sampling, name)), "svd")


def test_a_distilled_model_is_refused(host, models):
    (model,) = host.run_node("ModelSamplingDiscrete", model=models["sd15"], sampling="lcm", zsnr=False)
    with pytest.raises(ValueError, match="samples as LCM"):
        invert(host, model, "sd15")


def test_the_skip_of_every_path_is_the_hosts(host, models):
    """c_skip is the share of x in the denoised estimate: what is left of x where the network's output is 0."""
    import comfy.model_sampling as kinds

    sampling = host.module("nodes.host.sampling")
    for kind in (kinds.EPS, kinds.V_PREDICTION, kinds.EDM, kinds.CONST, kinds.COSMOS_RFLOW):
        own = resampled(models["svd"], kind).get_model_object("model_sampling")
        path = sampling.noise_path(own)
        for sigma in (0.01, 0.4, 0.9, 30.0):
            x, zero = torch.ones(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)
            left = own.calculate_denoised(torch.tensor([sigma]), zero, x)
            torch.testing.assert_close(left, path.c_skip(sigma) * x, msg=f"{kind.__name__} at {sigma}")
