"""Normalising, rescaling and the preparation of the first frame."""

import pytest
import torch
from denoisers import clip

from rewind.pipelines.videoshop.latents import NORMALISATIONS, augment, clip_preprocess, normalise, rescale

CLIPS = {"4d": (6, 4, 5, 7), "5d": (2, 4, 6, 5, 7)}


def varied(shape):
    """A clip whose channels and frames differ in mean and spread."""
    x = clip(*shape, dtype=torch.float32)
    channels = torch.arange(1.0, 5.0).reshape(*([1, 4] + [1] * (len(shape) - 2)))
    return x * channels + 3 * channels


@pytest.mark.parametrize("shape", CLIPS.values(), ids=CLIPS)
def test_channel_normalisation_gives_each_channel_unit_spread_and_keeps_its_mean_over_spread(shape):
    x = varied(shape)
    y, applied = normalise(x, "channel")
    axes = (0, 2, 3) if len(shape) == 4 else (2, 3, 4)
    assert torch.allclose(y.std(axes), torch.ones_like(y.std(axes)), atol=1e-4)
    assert torch.allclose(y.mean(axes), x.mean(axes) / x.std(axes), rtol=1e-4)
    assert torch.allclose(applied.undo(y), x, atol=1e-4)


@pytest.mark.parametrize("shape", CLIPS.values(), ids=CLIPS)
def test_frame_normalisation_whitens_each_frame(shape):
    x = varied(shape)
    y, applied = normalise(x, "frame")
    axes = (1, 2, 3) if len(shape) == 4 else (1, 3, 4)
    assert y.mean(axes).abs().max() < 1e-5
    assert torch.allclose(y.std(axes), torch.ones_like(y.std(axes)), atol=1e-4)
    assert torch.allclose(applied.undo(y), x, atol=1e-4)


def test_clips_of_a_5d_batch_do_not_mix():
    x = varied(CLIPS["5d"])
    for kind in ("channel", "frame"):
        alone = normalise(x[1:], kind)[0]
        assert torch.allclose(normalise(x, kind)[0][1:], alone, atol=1e-6)


@pytest.mark.parametrize("kind", NORMALISATIONS)
def test_strength_zero_is_bit_identical(kind):
    x = varied(CLIPS["4d"])
    assert normalise(x, kind, strength=0.0) == (x, None)
    assert rescale(x, x + 1, strength=0.0) is x


def test_half_strength_lies_between_and_is_undone():
    x = varied(CLIPS["4d"])
    y, applied = normalise(x, "channel", strength=0.5)
    spread = x.std((0, 2, 3))
    assert torch.allclose(y.std((0, 2, 3)), spread.sqrt(), rtol=1e-3)
    assert torch.allclose(applied.undo(y), x, atol=1e-4)


@pytest.mark.parametrize("kind", ["channel", "frame"])
@pytest.mark.parametrize("shape", CLIPS.values(), ids=CLIPS)
def test_a_constant_clip_gives_no_nan(kind, shape):
    x = torch.full(shape, 2.5)
    y, applied = normalise(x, kind)
    assert torch.isfinite(y).all() and torch.allclose(applied.undo(y), x, atol=1e-5)
    assert torch.isfinite(rescale(x, varied(shape))).all()


@pytest.mark.parametrize("shape", CLIPS.values(), ids=CLIPS)
def test_rescaling_gives_the_first_frame_the_references_statistics(shape):
    x, reference = varied(shape), clip(*shape, seed=8, dtype=torch.float32) * 0.3 - 1
    y = rescale(x, reference)
    first, target = (v[0] if v.ndim == 4 else v[:, :, 0] for v in (y, reference))
    assert torch.allclose(first.mean((-1, -2)), target.mean((-1, -2)), atol=1e-4)
    assert torch.allclose(first.std((-1, -2)), target.std((-1, -2)), atol=1e-4)


def test_rescaling_forgets_a_channel_normalisation_before_it():
    x, reference = varied(CLIPS["4d"]), clip(1, 4, 5, 7, seed=8, dtype=torch.float32)
    assert torch.allclose(rescale(normalise(x)[0], reference), rescale(x, reference), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_type_is_kept_and_inputs_are_left_alone(dtype):
    x = varied(CLIPS["4d"]).to(dtype)
    before = x.clone()
    y, applied = normalise(x)
    assert y.dtype == rescale(x, x).dtype == applied.undo(y).dtype == dtype
    assert torch.equal(x, before)


def test_the_image_is_prepared_as_clip_does():
    from transformers import CLIPImageProcessor

    images = torch.rand(2, 3, 40, 64, generator=torch.Generator().manual_seed(0))
    ours = clip_preprocess(images, 24)
    processor = CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    pixels = (images * 255).round().to(torch.uint8)
    theirs = processor(list(pixels), return_tensors="pt")["pixel_values"]
    assert ours.shape == (2, 3, 24, 24)
    assert (ours - theirs).abs().mean() < 0.02  # they round the picture to 8 bits before resizing too


def test_augmentation_is_in_the_models_range_and_off_at_zero():
    pixels, noise = torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)
    assert torch.equal(augment(pixels, 0.2, noise), torch.full_like(pixels, 0.2))
    assert augment(pixels, 0.0, noise) is pixels


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: normalise(x, "batch"), "channel, frame, off"),
        (lambda x: normalise(x, strength=2.0), "0 to 1"),
        (lambda x: normalise(x / 0 * 0), "NaN"),
        (lambda x: normalise(x[0]), r"\(4, 5, 7\)"),
        (lambda x: rescale(x, x[:, :3]), "same VAE"),
        (lambda x: rescale(x, x[None]), "same VAE"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(varied(CLIPS["4d"]))
