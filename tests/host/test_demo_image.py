"""The embedded text-to-image model's two faces: the host's classes and diffusers' give the same on the same weights."""

from __future__ import annotations

import pytest
import tiny_models
import torch

CLOSE = {"rtol": 0, "atol": 1e-4}
CAPTION = "a red circle on a blue background"
SIDE = 12  # of the latents of a picture of 96 x 96


@pytest.fixture(scope="module", params=["random", "stored"])
def file(host, request, tmp_path_factory):
    """The model's file: random weights as they would be shipped, and what is shipped."""
    return tiny_models.model_file(host, "rewind_demo_t2i", request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def ours(host, file):
    """MODEL, CLIP and VAE of the host."""
    return host.module("nodes.host.models").load_demo_image_models(file)


@pytest.fixture(scope="module")
def theirs(host, file):
    """The same behind EI²'s headless face, of diffusers' and transformers' modules."""
    demo = host.module("demo.text_to_image")
    family = host.module("pipelines.ei2.family").TextToImage
    return family(*demo.load_image_components(file), demo.alphas_cumprod())


def encoded(host, clip, prompt):
    return host.run_node("CLIPTextEncode", clip=clip, text=prompt)[0]


def noise(count, seed=4):
    return torch.randn(count, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


# --- one model --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_the_unets_are_one(ours, theirs):
    x, context = noise(3), torch.randn(3, 32, 64, generator=torch.Generator().manual_seed(3))
    for time in (0.0, 412.3, 999.0):
        times = torch.full((3,), time)
        wanted = theirs.network(x, times, context, return_dict=False)[0]
        found = ours[0].model.diffusion_model(x, times, context=context)
        assert float(wanted.std()) > 0.01
        torch.testing.assert_close(found, wanted, **CLOSE)
        other = ours[0].model.diffusion_model(x, times, context=-context)
        assert float((other - found).abs().max()) > 1e-3, "it sees the text"


@torch.inference_mode()
def test_the_schedules_are_one(ours, theirs):
    sampling = ours[0].get_model_object("model_sampling")
    torch.testing.assert_close(sampling.log_sigmas.double(), theirs.times.log_sigmas, rtol=0, atol=1e-5)
    at = torch.tensor([0, 1, 417, 998, 999])
    torch.testing.assert_close(theirs.times.time(sampling.sigmas[at]), at.float(), rtol=0, atol=1e-2)
    torch.testing.assert_close(theirs.schedule(25), tiny_models.sigmas(ours[0], 25, "karras"), rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_the_denoisers_are_one(host, ours, theirs):
    """The host's whole path against the headless one, at levels that are the schedule's own: between two of them the
    host rounds the time."""
    model, x = ours[0], noise(2)
    levels = model.get_model_object("model_sampling").sigmas
    context, sampling = theirs.embed([CAPTION]), host.module("nodes.host.sampling")
    for sigma in (float(levels[970]), float(levels[450])):
        guider = sampling.guider(model, encoded(host, ours[1], CAPTION))
        once = sampling.DirectSampler(lambda denoiser, x, sigmas, **_: denoiser(x, sigmas[:1].expand(len(x))))
        latent = model.model.process_latent_out(x)
        result = sampling.sample(guider, once, torch.tensor([sigma, 0.0]), latent, torch.zeros_like(x), 0)
        found = model.model.process_latent_in(result)
        wanted = theirs.denoise(x, torch.full((2,), sigma), context)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * sigma)
    assert not torch.allclose(found, x, atol=0.05), "the network does something"


@torch.inference_mode()
def test_a_batch_is_as_many_pictures(ours):
    """Unlike the video models: what one of them shows does not depend on the others."""
    network, x, context = ours[0].model.diffusion_model, noise(3), torch.ones(3, 32, 64)
    times = torch.full((3,), 300.0)
    torch.testing.assert_close(
        network(x[1:2], times[:1], context=context[:1]), network(x, times, context=context)[1:2], **CLOSE
    )


def test_the_text_encoder_and_the_vae_are_the_other_models(host, ours, theirs):
    builders = host.module("nodes.host.models")
    _, clip, vae = builders.load_demo_text_models()
    context, wanted = encoded(host, ours[1], CAPTION)[0][0], encoded(host, clip, CAPTION)[0][0]
    assert torch.equal(context, wanted)
    torch.testing.assert_close(context, theirs.embed([CAPTION]), rtol=0, atol=1e-5)
    image = torch.rand(2, 96, 96, 3, generator=torch.Generator().manual_seed(1))
    latents = ours[2].encode(image)
    assert torch.equal(latents, vae.encode(image))
    in_model_space = ours[0].model.process_latent_in(latents)
    torch.testing.assert_close(in_model_space, theirs.encode_clip(image.movedim(-1, 1)), **CLOSE)


# --- in the host ------------------------------------------------------------------------------------------------------


def test_the_host_tells_the_same_of_the_checkpoint(host):
    """Its detection of the UNet's sizes from the stored names gives the settings that the MODEL is built with."""
    import comfy.model_detection

    builders, config = host.module("nodes.host.models"), host.module("demo.text_to_image").TextToImageConfig()
    found = comfy.model_detection.detect_unet_config(tiny_models.image_checkpoint(host), "model.diffusion_model.")
    wanted = builders.image_unet_settings(config)
    assert {name: found.get(name, "none") for name in wanted if name != "dtype"} == {
        name: value for name, value in wanted.items() if name != "dtype"
    }


def test_the_host_takes_it_for_a_stable_diffusion(ours):
    import comfy.model_base
    import comfy.supported_models

    model = ours[0].model
    assert isinstance(model.model_config, comfy.supported_models.SD15)
    assert model.model_type == comfy.model_base.ModelType.EPS and model.adm_channels == 0
    assert model.latent_format.latent_channels == 4 and model.latent_format.scale_factor == 0.18215


def test_the_host_makes_equal_copies_of_the_model(host, ours):
    """As its training, its weight hooks and its nodes for several GPUs ask for."""
    model = ours[0]
    make, arguments = model.cached_patcher_init
    copies = [make(*arguments), make(*arguments, disable_dynamic=True)]
    if host.release >= (0, 33):
        copies.append(model.clone(force_deepcopy=True))
    weights = model.model.diffusion_model.state_dict()
    for copy in copies:
        copied = copy.model.diffusion_model.state_dict()
        assert copy.model is not model.model and copied.keys() == weights.keys()
        assert all(torch.equal(weights[name], copied[name]) for name in weights)


def picture(host, models, prompt, steps, seed=1):
    """A picture [1, 96, 96, 3] by the host's nodes alone."""
    model, clip, vae = models
    (latent,) = host.run_node("EmptyLatentImage", width=96, height=96, batch_size=1)
    pair = {"positive": encoded(host, clip, prompt), "negative": encoded(host, clip, "")}
    how = {"seed": seed, "steps": steps, "cfg": 3.0, "sampler_name": "euler", "scheduler": "karras"}
    samples = host.run_node("KSampler", model=model, latent_image=latent, **pair, **how)[0]
    return host.run_node("VAEDecode", samples=samples, vae=vae)[0]


def test_a_prompt_becomes_a_picture(host, ours):
    first, again, other = (picture(host, ours, prompt, 2) for prompt in ("a red circle",) * 2 + ("a blue square",))
    assert first.shape == (1, 96, 96, 3) and torch.isfinite(first).all()
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_red_circle_is_a_red_circle(host):
    """The known answer, read from the pixels."""
    models, captions = host.module("demo.models"), host.module("demo.captions")
    names = ("rewind_demo_svd", "rewind_demo_t2v", "rewind_demo_t2i")
    if not tiny_models.ensure_weights(host, host.pack, names):
        pytest.skip("the embedded text-to-image model's weights are not there")
    drawn = picture(host, host.module("nodes.host.models").load_demo_image_models(models.IMAGE_WEIGHTS), CAPTION, 25)
    seen = host.module("demo.recognition").recognise(drawn.movedim(-1, 1))
    world = host.module("demo.world")
    assert seen.present
    assert (world.COLOURS[seen.colour], world.SHAPES[seen.shape]) == ("red", "circle")
    assert captions.HUES[seen.hue] == "blue" and not seen.night and not seen.striped


@torch.inference_mode()
def test_the_node_loads_what_is_stored(host):
    tiny_models.ensure_weights(host, host.pack)
    model, clip, vae = host.run_node("RewindDemoTextToImage")
    _, text_clip, its_vae = host.run_node("RewindDemoTextToVideo")
    builders, models = host.module("nodes.host.models"), host.module("demo.models")
    config = host.module("demo.text_to_image").TextToImageConfig()
    stored = builders.load_demo_image_unet(models.IMAGE_WEIGHTS, config).model.state_dict()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.model.state_dict().items())
    assert torch.equal(encoded(host, clip, CAPTION)[0][0], encoded(host, text_clip, CAPTION)[0][0])
    image = torch.rand(2, 96, 96, 3)
    assert torch.equal(vae.encode(image), its_vae.encode(image))


def test_files_that_cannot_be_are_refused(host, tmp_path):
    builders = host.module("nodes.host.models")
    with pytest.raises(FileNotFoundError, match="reinstall Rewind"):
        builders.load_demo_image_models(tmp_path / "none.safetensors")
    weights = tiny_models.image_checkpoint(host)
    without = {name: tensor for name, tensor in weights.items() if not name.endswith("out.2.bias")}
    with pytest.raises(RuntimeError, match=r"out\.2\.bias"):
        builders.load_demo_image_models(tiny_models.save_weights(without, tmp_path / "without.safetensors"))
