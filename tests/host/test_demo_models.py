"""The embedded model's two faces: the host's SVD classes and diffusers' give the same on the same weights."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models
import torch
from safetensors.torch import load_file

FRAMES = 3
CLOSE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(scope="module", params=["random", "stored"])
def faces(host, request):
    """(MODEL, CLIP_VISION, VAE) of the host and (unet, vae, image_encoder) of diffusers, from one checkpoint."""
    demo, keys, builders = host.module("demo.models"), host.module("demo.keys"), host.module("nodes.host.models")
    config = demo.ImageToVideoConfig()
    if request.param == "random":
        checkpoint = tiny_models.checkpoint(host, seed=5)
    else:
        checkpoint = {name: tensor.float() for name, tensor in load_file(demo.WEIGHTS).items()}
    parts = keys.split_checkpoint(checkpoint)
    ours = (
        builders.build_model(parts["unet"], config),
        builders.build_clip_vision(parts["image_encoder"], config),
        builders.build_vae(parts["vae"], config),
    )
    theirs = demo.build_unet(config), demo.build_vae(config), demo.build_image_encoder(config)
    for module, part in zip(theirs, ("unet", "vae", "image_encoder")):
        module.load_state_dict(keys.from_checkpoint(checkpoint, config)[part])
        module.eval()
    return ours, theirs


@pytest.fixture(scope="module")
def images():
    return torch.rand(FRAMES, 96, 96, 3, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def test_the_unets_are_one(faces):
    (model, _, _), (unet, _, _) = faces
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(FRAMES, 8, 12, 12, generator=generator)
    context = torch.randn(1, 1, 64, generator=generator)
    ids = model.model.encode_adm(fps=7, motion_bucket_id=100, augmentation_level=0.1)
    for c_noise in (-1.5, 0.3, 1.6):
        ours = model.model.diffusion_model(
            x,
            torch.full((FRAMES,), c_noise),
            context=context.expand(FRAMES, -1, -1),
            y=ids.expand(FRAMES, -1),
            num_video_frames=FRAMES,
        )
        theirs = unet(x[None], c_noise, context, torch.tensor([[6.0, 100.0, 0.1]]), return_dict=False)[0][0]
        assert float(theirs.std()) > 0.01
        torch.testing.assert_close(ours, theirs, **CLOSE)


@torch.inference_mode()
def test_the_unets_see_the_clip(faces):
    """The test above can fail: another number of frames, other ids or another embedding give another output."""
    (model, _, _), _ = faces
    x = torch.randn(FRAMES, 8, 12, 12, generator=torch.Generator().manual_seed(2))
    context = torch.ones(FRAMES, 1, 64)
    ids = model.model.encode_adm(fps=7, motion_bucket_id=100, augmentation_level=0.1).expand(FRAMES, -1)
    other = model.model.encode_adm(fps=7, motion_bucket_id=20, augmentation_level=0.1).expand(FRAMES, -1)

    def run(frames=FRAMES, y=ids, context=context):
        time = torch.full((FRAMES,), 0.3)
        return model.model.diffusion_model(x, time, context=context, y=y, num_video_frames=frames)

    for changed in (run(frames=1), run(y=other), run(context=-context)):
        assert float((changed - run()).abs().max()) > 1e-4


@torch.inference_mode()
def test_the_vaes_are_one(faces, images):
    (_, _, ours), (_, theirs, _) = faces
    latents = ours.encode(images)
    torch.testing.assert_close(latents, theirs.encode(2 * images.movedim(-1, 1) - 1).latent_dist.mode(), **CLOSE)
    decoded = theirs.decode(latents, num_frames=FRAMES).sample.movedim(1, -1)
    torch.testing.assert_close(ours.decode(latents), (decoded / 2 + 0.5).clamp(0, 1), **CLOSE)


@torch.inference_mode()
def test_the_image_encoders_are_one(host, faces, images):
    (_, ours, _), (_, _, theirs) = faces
    pixels = host.module("pipelines.videoshop.latents").clip_preprocess(images.movedim(-1, 1), 32)
    torch.testing.assert_close(ours.encode_image(images).image_embeds, theirs(pixels).image_embeds, **CLOSE)


@torch.inference_mode()
def test_the_denoisers_are_one(host, faces):
    """The host's whole path (scalings, condition, guider) against the pipelines' SVDDenoiser."""
    (model, _, _), (unet, _, _) = faces
    pipeline = host.module("pipelines.videoshop.pipeline")
    generator = torch.Generator().manual_seed(4)
    x, image = torch.randn(FRAMES, 4, 12, 12, generator=generator), torch.randn(1, 4, 12, 12, generator=generator)
    embedding = torch.randn(1, 1, 64, generator=generator)
    denoiser = pipeline.SVDDenoiser(unet, image, embedding, torch.tensor([[6.0, 127.0, 0.02]]))
    extra = {"concat_latent_image": image, "fps": 7, "motion_bucket_id": 127, "augmentation_level": 0.02}
    sigma = 4.0

    class Once:
        seed = 0

        def generate_noise(self, latent):
            return x / sigma

    (guider,) = host.run_node("BasicGuider", model=model, conditioning=[[embedding, extra]])
    (euler,) = host.run_node("KSamplerSelect", sampler_name="euler")
    result, _ = host.run_node(
        "SamplerCustomAdvanced",
        noise=Once(),
        guider=guider,
        sampler=euler,
        sigmas=torch.tensor([sigma, 0.0]),
        latent_image={"samples": torch.zeros_like(x)},
    )
    ours = model.model.process_latent_in(result["samples"])
    torch.testing.assert_close(ours, denoiser(x, torch.full((FRAMES,), sigma)), rtol=0, atol=2e-4)


def test_the_node_loads_what_is_stored(host):
    """The node's MODEL, CLIP_VISION and VAE run, and the host can make its own copy of the MODEL."""
    tiny_models.ensure_weights(host, host.pack)
    model, clip_vision, vae = host.run_node("RewindDemoImageToVideo")
    image = torch.rand(2, 96, 96, 3)
    with torch.inference_mode():
        assert clip_vision.encode_image(image).image_embeds.shape == (2, 64)
        assert vae.decode(vae.encode(image)).shape == image.shape
    make, arguments = model.cached_patcher_init
    copy = make(*arguments)
    weights, copied = model.model.diffusion_model.state_dict(), copy.model.diffusion_model.state_dict()
    assert copy.model is not model.model
    assert all(torch.equal(weights[name], copied[name]) for name in weights)


def test_missing_weights_are_named(host, tmp_path):
    models, config = host.module("nodes.host.models"), host.module("demo.models")
    with pytest.raises(FileNotFoundError, match="reinstall Rewind"):
        models.load_demo_models(tmp_path / "none.safetensors", config.ImageToVideoConfig())


def test_the_host_tells_the_same_of_the_checkpoint(host):
    """Its detection of the UNet's sizes from the stored names gives the settings that the MODEL is built with."""
    import comfy.model_detection

    builders, config = host.module("nodes.host.models"), host.module("demo.models").ImageToVideoConfig()
    checkpoint = tiny_models.checkpoint(host)
    found = comfy.model_detection.detect_unet_config(checkpoint, "model.diffusion_model.")
    wanted = builders.unet_settings(config)
    assert {name: found.get(name) for name in wanted if name != "dtype"} == {
        name: value for name, value in wanted.items() if name != "dtype"
    }


@torch.inference_mode()
def test_previews_show_the_picture(host):
    """What the page shows of a clip while it is sampled, against the eight times smaller clip."""
    import latent_preview

    if not host.module("demo.models").WEIGHTS.is_file():
        pytest.skip("the embedded model's weights are not there")
    model, _, vae = host.run_node("RewindDemoImageToVideo")
    source = host.module("demo.clip").example(3).source
    encoded = vae.encode(source.movedim(1, -1).contiguous())
    space = model.get_model_object("latent_format")
    previewer = latent_preview.Latent2RGBPreviewer(space.latent_rgb_factors, space.latent_rgb_factors_bias)
    picture = previewer.decode_latent_to_preview(model.model.process_latent_in(encoded.float()))
    shown = torch.from_numpy(np.array(picture)).float() / 255
    wanted = torch.nn.functional.avg_pool2d(source[:1], 8)[0].movedim(0, -1)
    assert shown.shape == wanted.shape
    assert float((shown - wanted).abs().mean()) < 0.04 and float((shown - wanted.mean()).abs().mean()) > 0.04
