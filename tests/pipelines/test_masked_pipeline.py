"""The headless job with a mask, on tiny random components of the real classes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny_svd
import torch
from denoisers import relative

from rewind.pipelines.videoshop.latents import normalise
from rewind.pipelines.videoshop.masks import composite_pixels, latent_mask
from rewind.pipelines.videoshop.pipeline import VideoshopPipeline
from rewind.pipelines.videoshop.settings import VideoshopSettings

PLAIN = VideoshopSettings(steps=3, strength=1.0, sigma_max=20.0, augmentation=0.0)
VIDEO = tiny_svd.video()
EDITED = tiny_svd.video(4)[0]
HARD = torch.zeros(tiny_svd.FRAMES, tiny_svd.HEIGHT, tiny_svd.WIDTH)
for _i in range(tiny_svd.FRAMES):
    HARD[_i, 5:14, 3 + 8 * _i : 20 + 8 * _i] = 1
OUTSIDE = (latent_mask(HARD, (4, 4, 4, 6)) == 0).expand(4, 4, 4, 6)  # of latents
PRESETS = {
    "plain": PLAIN,
    "rescaled": replace(PLAIN, rescale=1.0),
    "as the paper": replace(PLAIN, normalise="channel", rescale=1.0),
    "as the authors' code": replace(PLAIN, normalise="frame", denormalise=False, rescale=1.0, last_guidance=4.0),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pipeline() -> VideoshopPipeline:
    return VideoshopPipeline(*tiny_svd.components())


@pytest.mark.parametrize("settings", PRESETS.values(), ids=PRESETS)
def test_outside_a_hard_mask_the_latents_are_the_sources_to_the_bit(pipeline, settings):
    result = pipeline(VIDEO, EDITED, settings, generator(), progress=False, mask=HARD)
    source = pipeline.encode(VIDEO)
    assert 0.3 < OUTSIDE.float().mean() < 0.8
    assert torch.equal(result.latents[OUTSIDE], source[OUTSIDE])
    for frame in range(len(VIDEO)):
        inside = ~OUTSIDE[frame]
        assert relative(result.latents[frame][inside], source[frame][inside]) > 0.05
    assert not torch.equal(result.frames, VIDEO), "the frames have been through the VAE"


def test_the_sources_pixels_can_be_kept_too(pipeline):
    plain = pipeline(VIDEO, EDITED, PLAIN, generator(), progress=False, mask=HARD)
    kept = pipeline(VIDEO, EDITED, PLAIN, generator(), progress=False, mask=HARD, keep_pixels=True)
    outside, inside = ((HARD == value)[:, None].expand_as(VIDEO) for value in (0, 1))
    assert torch.equal(kept.frames[outside], VIDEO[outside])
    assert torch.equal(kept.frames, composite_pixels(plain.frames, VIDEO, HARD))
    assert float((kept.frames - VIDEO)[inside].abs().mean()) > 0.05
    assert torch.equal(kept.latents, plain.latents)


def test_a_mask_of_everything_changes_nothing(pipeline):
    settings = PRESETS["as the paper"]
    plain = pipeline(VIDEO, EDITED, replace(settings, rescale=0.0), generator(), progress=False)
    whole = pipeline(
        VIDEO, EDITED, replace(settings, rescale=0.0), generator(), progress=False, mask=torch.ones(1, 32, 48)
    )
    torch.testing.assert_close(whole.latents, plain.latents, rtol=1e-4, atol=1e-5)
    assert whole.evaluations == plain.evaluations


def test_the_network_sees_the_sources_own_noise_outside(pipeline):
    """Guided too, in which each level costs two calls."""
    seen = []

    class Spy(VideoshopPipeline):
        def condition(self, *arguments, **options):
            denoiser = super().condition(*arguments, **options)
            return lambda x, sigma: seen.append((x.clone(), float(sigma[0]))) or denoiser(x, sigma)

        def unconditional(self, condition):
            return condition

    inversion = pipeline.invert(VIDEO, PLAIN, generator(), keep_trajectory=True)
    spy = Spy(pipeline.unet, pipeline.vae, pipeline.image_encoder)
    spy.denoise(inversion, EDITED, replace(PLAIN, last_guidance=2.0), mask=HARD)
    assert len(seen) == 6
    for call, (x, sigma) in enumerate(seen):
        point = inversion.trajectory[-1 - call // 2]
        assert sigma == pytest.approx(float(inversion.sigmas[call // 2]))
        assert torch.equal(x[OUTSIDE], point[OUTSIDE])


def test_the_normalisations_statistics_come_from_inside(pipeline):
    settings = replace(PLAIN, normalise="channel")
    inversion = pipeline.invert(VIDEO, settings, generator(), mask=HARD)
    source = pipeline.encode(VIDEO)
    _, inside = normalise(source, "channel", mask=latent_mask(HARD, source.shape))
    torch.testing.assert_close(inversion.normalisation.scale, inside.scale)
    assert relative(inversion.normalisation.scale, normalise(source, "channel")[1].scale) > 0.005


def test_a_feather_mixes_both(pipeline):
    inversion = pipeline.invert(VIDEO, PLAIN, generator(), keep_trajectory=True)
    source = inversion.source
    soft = torch.full((1, 32, 48), 0.3)
    soft[:, :, 24:] = 1.0
    result = pipeline.denoise(inversion, EDITED, PLAIN, mask=soft)
    hard = pipeline.denoise(inversion, EDITED, PLAIN, mask=(soft == 1).float())
    far, near = (relative(result[..., columns], source[..., columns]) for columns in (slice(3, 6), slice(0, 3)))
    assert 0.01 < near < 0.7 * far
    assert torch.equal(hard[..., :3], source[..., :3])


BAD = {
    "frames": ({"mask": HARD[:3]}, "the mask has 3 frames, the clip 4"),
    "proportions": ({"mask": HARD[:, :16]}, "48x16, the clip 48x32"),
    "empty": ({"mask": 0 * HARD}, "empty"),
    "range": ({"mask": 255 * HARD}, "0..1"),
    "pixels without a mask": ({"keep_pixels": True}, "kept outside a mask: give one"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_masks_are_refused_before_any_work(pipeline, options, message, monkeypatch):
    monkeypatch.setattr(pipeline.vae, "encode", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(ValueError, match=message):
        pipeline(VIDEO, EDITED, PLAIN, generator(), progress=False, **options)


def test_an_inversion_without_a_trajectory_takes_no_mask(pipeline):
    inversion = pipeline.invert(VIDEO, replace(PLAIN, steps=1), generator())
    with pytest.raises(ValueError, match="holds no trajectory"):
        pipeline.denoise(inversion, EDITED, PLAIN, mask=HARD)
