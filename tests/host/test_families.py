"""Inversion on every native family, read by the host's own loaders: noise levels (EPS, V), flow, and CogVideoX."""

from __future__ import annotations

import context_windows
import native_models
import pytest
import tiny_models
import torch
from masks import hard_mask, outside
from native_models import FAMILIES

STEPS = 6
FLOWS = {"wan21_t2v", "wan21_i2v", "wan22_i2v", "wan22_5b", "ltxv", "hunyuan"}


@pytest.fixture(scope="module")
def models(host):
    return native_models.Models(host)


def invert(host, model, family, latent=None, **inputs):
    """The inversion node's four outputs on a tiny model."""
    return host.run_node(
        "RewindEDMInversion",
        model=model,
        positive=native_models.conditioning(family),
        latent=latent or native_models.latent(family),
        sigmas=native_models.sigmas(model, family, STEPS),
        **inputs,
    )


def sampler_back(host, family):
    """The host's own SAMPLER that an inversion comes back with."""
    if family == "cogvideox":
        return host.run_node("VOIDSampler")[0]
    return host.run_node("KSamplerSelect", sampler_name="euler")[0]


def resume(host, model, family, noise, sigmas, positive=None, shape=None):
    """Through core nodes only: the NOISE and an empty latent into SamplerCustomAdvanced."""
    positive = positive or native_models.conditioning(family)
    (guider,) = host.run_node("BasicGuider", model=model, conditioning=positive)
    empty = {"samples": torch.zeros(shape or FAMILIES[family].shape)}
    result, _ = host.run_node(
        "SamplerCustomAdvanced",
        noise=noise,
        guider=guider,
        sampler=sampler_back(host, family),
        sigmas=sigmas,
        latent_image=empty,
    )
    return result["samples"]


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_host_tells_the_family_from_its_file(host, models, family):
    import comfy.supported_models

    model, entry = models[family], FAMILIES[family]
    kind = getattr(comfy.supported_models, entry.kind)
    assert isinstance(model.model.model_config, kind)
    wanted = native_models.random_weights(host, family)
    loaded = model.model.diffusion_model.state_dict()
    assert loaded.keys() == wanted.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in wanted.items())


def test_a_host_without_cogvideox_says_so_itself(host):
    if native_models.there(host, "cogvideox"):
        pytest.skip(f"ComfyUI {host.version} has CogVideoX")
    name = native_models.save(
        {"blocks.0.norm1.linear.weight": torch.zeros(384, 64)}, "diffusion_models", "cog.safetensors"
    )
    with pytest.raises(RuntimeError, match="Could not detect model type"):
        host.run_node("UNETLoader", unet_name=name, weight_dtype="default")


@pytest.mark.parametrize("family", FAMILIES)
def test_refined_inversion_comes_back_through_core_nodes(host, models, family):
    model, clean = models[family], native_models.latent(family)["samples"]
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


@pytest.mark.parametrize("family", FAMILIES)
def test_the_round_trip_check_measures_every_family(host, models, family):
    model, vae = models[family], native_models.load_vae(host, family)
    (clip,) = host.run_node("VAEDecode", vae=vae, samples=native_models.latent(family))
    positive, found = native_models.conditioning(family), {}
    for name, inputs in {
        "refined": {"refine": 50},
        "naive": {"guess_above": "current", "guess_below": "current"},
    }.items():
        *_, inversion = invert(host, model, family, strength=1.0, **inputs)
        report, _, _, vae_share, own, found[name] = host.run_node(
            "RewindRoundTripCheck", model=model, positive=positive, inversion=inversion, vae=vae, clip=clip
        )
        assert f"relative error of the latent {found[name]:.2e}" in report
        assert vae_share > 60 and (name != "refined" or own > 60)
    assert found["refined"] <= 1e-3 and found["naive"] > 2e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_outside_a_mask_every_family_gives_the_source_to_the_bit(host, models, family):
    model, latent = models[family], native_models.latent(family)
    shape = latent["samples"].shape
    mask = hard_mask(*native_models.pixels(family))
    inverted, sigmas, _, inversion = invert(host, model, family, strength=0.75)
    (sampler,) = host.run_node("RewindMaskedSampler", inversion=inversion, mask=mask)
    positive = native_models.conditioning(family, seed=1)
    (guider,) = host.run_node("BasicGuider", model=model, conditioning=positive)
    (none,) = host.run_node("DisableNoise")
    inputs = {"noise": none, "guider": guider, "sampler": sampler, "sigmas": sigmas, "latent_image": inverted}
    played = [host.run_node("SamplerCustomAdvanced", **inputs)[0] for _ in range(2)]
    assert torch.equal(played[0]["samples"], played[1]["samples"]), "a sampler that is used twice keeps nothing"
    kept = outside(host, mask, shape)
    torch.testing.assert_close(played[0]["samples"][kept], latent["samples"][kept], rtol=1e-4, atol=1e-4)
    (final,) = host.run_node("RewindSourceComposite", latent=played[0], source=latent, mask=mask)
    assert torch.equal(final["samples"][kept], latent["samples"][kept])
    assert torch.equal(final["samples"][~kept], played[0]["samples"][~kept])
    assert float((final["samples"] - latent["samples"])[~kept].abs().mean()) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mask_of_everything_is_the_way_back_through_core_nodes(host, models, family):
    """Masked Sampler from the LATENT and the host's own sampler from the NOISE are the same Euler steps."""
    model = models[family]
    inverted, sigmas, noise, inversion = invert(host, model, family, strength=0.75)
    (sampler,) = host.run_node(
        "RewindMaskedSampler", inversion=inversion, mask=torch.ones(1, *native_models.pixels(family)[1:])
    )
    (guider,) = host.run_node("BasicGuider", model=model, conditioning=native_models.conditioning(family))
    (none,) = host.run_node("DisableNoise")
    result, _ = host.run_node(
        "SamplerCustomAdvanced", noise=none, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=inverted
    )
    assert relative(result["samples"], resume(host, model, family, noise, sigmas)) < 1e-4


@pytest.mark.parametrize("family", ["svd", "sd15"])
def test_the_latent_resumes_as_the_noise_does(host, models, family):
    """For families that add noise to the signal the host's DisableNoise route is exact too."""
    model = models[family]
    latent, sigmas, noise, _ = invert(host, model, family, strength=1.0)
    (guider,) = host.run_node("BasicGuider", model=model, conditioning=native_models.conditioning(family))
    (euler,) = host.run_node("KSamplerSelect", sampler_name="euler")
    (none,) = host.run_node("DisableNoise")
    result, _ = host.run_node(
        "SamplerCustomAdvanced", noise=none, guider=guider, sampler=euler, sigmas=sigmas, latent_image=latent
    )
    assert relative(result["samples"], resume(host, model, family, noise, sigmas)) < 1e-5


@pytest.mark.parametrize("family", ["svd", "sd15"])
def test_the_benchmarks_naive_inversion_is_what_the_hosts_nodes_do(host, models, family):
    """FlipSigmas, DisableNoise and euler, against the same steps written down in `pipelines`."""
    model, latent = models[family], native_models.latent(family)
    levels = native_models.sigmas(model, family, STEPS)
    (guider,) = host.run_node("BasicGuider", model=model, conditioning=native_models.conditioning(family))
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
        sampling.guider(model, native_models.conditioning(family)),
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
            latent=native_models.latent("sd15"),
            sigmas=tiny_models.sigmas(models["sd15"], STEPS, "karras"),
            strength=1.0,
        )
        return latent["samples"]

    plain = native_models.conditioning("sd15")
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
    assert inversion.trajectory.shape == (steps + 1, *FAMILIES["svd"].shape)
    assert inversion.evaluations == steps


@pytest.mark.parametrize("family", ["svd", "wan21_t2v"])
def test_latent_normalize_gives_the_network_unit_spread(host, models, family):
    """What the model is called with at the first step, where the guess is the clean latent itself."""
    seen = []

    def record(apply_model, args):
        seen.append(args["input"].clone())
        return apply_model(args["input"], args["timestep"], **args["c"])

    latent = native_models.latent(family)
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
    model, latent = models["svd"], {"samples": 5 * native_models.latent("svd")["samples"] + 2}
    (normalised,) = host.run_node("RewindLatentNormalize", model=model, latent=latent, kind="channel")
    _, _, _, inversion = invert(host, model, "svd", normalised)
    source = model.model.process_latent_out(inversion.source)
    torch.testing.assert_close(source, latent["samples"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_path_is_read_from_the_model(host, models, family):
    sampling, denoiser = host.module("nodes.host.sampling"), host.module("pipelines.denoiser")
    wanted = {"svd": denoiser.V, "cogvideox": denoiser.DDPM}.get(family, denoiser.EPS)
    wanted = denoiser.FLOW if family in FLOWS else wanted
    assert sampling.noise_path(models[family].get_model_object("model_sampling")) == wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_context_windows_apply_there_and_back(host, models, family):
    """Five frames in windows of three: the network sees no more at once, and the clip comes back all the same."""
    frames, dim = 5, 0 if len(FAMILIES[family].shape) == 4 else 2
    shape = [frames if axis == dim else size for axis, size in enumerate(FAMILIES[family].shape)]
    counting, calls = tiny_models.counted(models[family])
    values = {"dim": dim}
    if "causal_window_fix" in context_windows.known_inputs(host):
        values["causal_window_fix"] = family != "svd"  # a frame more in a window, of which the host's SVD is not told
    windowed = context_windows.windowed(host, counting, **values)
    latent = {"samples": torch.randn(shape, generator=torch.Generator().manual_seed(3))}
    positive = native_models.conditioning(family, frames=frames)
    sigmas = native_models.sigmas(windowed, family, STEPS)
    _, sigmas, noise, inversion = host.run_node(
        "RewindEDMInversion",
        model=windowed,
        positive=positive,
        latent=latent,
        sigmas=sigmas,
        strength=1.0,
        refine=30,
    )
    assert {size[dim] for size in calls} <= {3, 4} and len(calls) > inversion.evaluations
    assert relative(resume(host, windowed, family, noise, sigmas, positive, shape), latent["samples"]) < 3e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_noise_mask_never_reaches_the_network(host, models, family):
    """The node leaves it out; the SAMPLER too, but for models that the host itself tells of it, where it refuses."""
    counting, calls = tiny_models.counted(models[family])
    latent = native_models.latent(family)
    shape = latent["samples"].shape
    masked = {**latent, "noise_mask": torch.zeros(1, 1, *shape[2:] if len(shape) == 5 else (64, 64))}
    results = [invert(host, counting, family, given)[0]["samples"] for given in (latent, masked)]
    assert torch.equal(*results)
    calls.clear()
    (guider,) = host.run_node("BasicGuider", model=counting, conditioning=native_models.conditioning(family))
    (noise,) = host.run_node("RandomNoise", noise_seed=1)
    (sampler,) = host.run_node("RewindEDMInversionSampler")
    sigmas = native_models.sigmas(counting, family, STEPS)
    inputs = {"noise": noise, "guider": guider, "sampler": sampler, "sigmas": sigmas}

    def run(given):
        return host.run_node("SamplerCustomAdvanced", latent_image=given, **inputs)[0]["samples"]

    if family in ("wan22_5b", "ltxv"):
        with pytest.raises(ValueError, match="takes frames for clean"):
            run(masked)
        assert calls == []
    else:
        assert torch.equal(run(masked), run(latent))


@pytest.mark.parametrize("family", ["wan21_i2v", "wan22_i2v"])
def test_wans_first_frame_is_that_of_the_clip(host, models, family):
    counting, calls = tiny_models.counted(models[family])
    ((text, extra),) = native_models.conditioning(family)
    long = {**extra, "concat_latent_image": torch.zeros(1, 16, 5, 8, 8)}
    large = {**extra, "concat_latent_image": torch.zeros(1, 16, 3, 8, 16)}
    wrong = {
        "positive holds no first frame: connect WanImageToVideo": {},
        "made for 64 x 64 pixels and 17 frames, the clip is 64 x 64 with 9 frames": long,
        "made for 128 x 64 pixels and 9 frames": large,
    }
    for message, given in wrong.items():
        with pytest.raises(ValueError, match=message):
            host.run_node(
                "RewindEDMInversion",
                model=counting,
                positive=[[text, given]],
                latent=native_models.latent(family),
                sigmas=native_models.sigmas(counting, family, STEPS),
            )
    assert calls == []


@pytest.mark.parametrize("family", ["wan21_i2v", "wan22_i2v"])
def test_wans_way_back_follows_the_first_frame(host, models, family):
    """Another first frame is another clip; the same one is the same clip."""
    _, sigmas, noise, _ = invert(host, models[family], family, strength=1.0, refine=50)
    same, other = (
        resume(host, models[family], family, noise, sigmas, native_models.conditioning(family, seed)) for seed in (0, 1)
    )
    source = native_models.latent(family)["samples"]
    assert relative(same, source) < 1e-3 and relative(other, source) > 10 * relative(same, source)


def test_half_a_schedule_is_refused_so_a_pair_of_models_is_too(host, models):
    """Wan 2.2's pair of 14B models halves the noise levels between them, and an inversion needs all of one model's."""
    model = models["wan22_i2v"]
    levels = native_models.sigmas(model, "wan22_i2v", STEPS)
    high, low = host.run_node("SplitSigmas", sigmas=levels, step=2)
    inputs = {"positive": native_models.conditioning("wan22_i2v"), "latent": native_models.latent("wan22_i2v")}
    with pytest.raises(ValueError, match="upper part of SplitSigmas"):
        host.run_node("RewindEDMInversion", model=model, sigmas=high, **inputs)
    _, sigmas, *_ = host.run_node("RewindEDMInversion", model=model, sigmas=low, strength=1.0, **inputs)
    assert torch.equal(sigmas, low)


def resampled(model, kind):
    """A MODEL that makes its denoised estimate as another kind does."""
    import comfy.model_sampling

    class Sampling(comfy.model_sampling.ModelSamplingContinuousEDM, kind):
        pass

    model = model.clone()
    model.add_object_patch("model_sampling", Sampling(model.model.model_config))
    return model


@pytest.mark.parametrize("name", ["X0", "IMG_TO_IMG", "IMG_TO_IMG_FLOW"])
def test_models_without_noise_are_refused(host, models, name):
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
