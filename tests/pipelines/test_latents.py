"""Normalising, rescaling and the preparation of the first frame."""

from __future__ import annotations

import math

import pytest
import torch
from denoisers import clip

from rewind.pipelines.videoshop.latents import (
    NORMALISATIONS,
    augment,
    clip_preprocess,
    normalise,
    rescale,
    whiten_condition,
)

SHAPES = {"4-D": (6, 4, 5, 7), "5-D": (2, 4, 6, 5, 7)}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def varied(shape, seed=0, dtype=torch.float32):
    """A clip whose channels and frames differ in mean and deviation."""
    x = clip(*shape, seed=seed)
    channels = torch.arange(1.0, 5.0, dtype=torch.float64).reshape(1, 4, *[1] * (len(shape) - 2))
    frames = torch.linspace(0.5, 2.0, 6, dtype=torch.float64).reshape((6, 1, 1, 1) if len(shape) == 4 else (6, 1, 1))
    return ((x * channels + 3 * channels) * frames).to(dtype)


def clips(x):
    """The clips of a batch, each [T, C, h, w]."""
    return [x] if x.ndim == 4 else [v.movedim(1, 0) for v in x]


# --- normalising -----------------------------------------------------------------------------------------------------


@shapes
def test_channel_divides_by_the_deviation_over_all_frames_and_keeps_the_mean(shape):
    x = varied(shape)
    y, applied = normalise(x, "channel")
    for source, result in zip(clips(x), clips(y)):
        for channel in range(4):
            torch.testing.assert_close(result[:, channel], source[:, channel] / source[:, channel].std())
    torch.testing.assert_close(applied.apply(x), y)
    torch.testing.assert_close(applied.undo(y), x, rtol=1e-5, atol=1e-5)


@shapes
def test_frame_whitens_each_frame_over_channels_and_pixels(shape):
    x = varied(shape)
    y, applied = normalise(x, "frame")
    for source, result in zip(clips(x), clips(y)):
        for frame in range(6):
            torch.testing.assert_close(result[frame], (source[frame] - source[frame].mean()) / source[frame].std())
    torch.testing.assert_close(applied.undo(y), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["channel", "frame"])
def test_clips_of_a_batch_do_not_mix(kind):
    x = varied(SHAPES["5-D"])
    torch.testing.assert_close(normalise(x, kind)[0][1:], normalise(x[1:], kind)[0])


@shapes
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", NORMALISATIONS)
def test_strength_0_and_off_are_bit_identical(shape, dtype, kind):
    x = varied(shape, dtype=dtype)
    assert normalise(x, kind, strength=0.0) == (x, None)
    assert normalise(x, "off") == (x, None)


@pytest.mark.parametrize("kind", ["channel", "frame"])
def test_strength_goes_from_nothing_to_all(kind):
    x = varied(SHAPES["4-D"])
    whole, nearly, half = (normalise(x, kind, strength)[0] for strength in (1.0, 1 - 1e-6, 0.5))
    torch.testing.assert_close(nearly, whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(normalise(x, kind, 1e-6)[0], x, rtol=1e-4, atol=1e-4)
    axes = (0, 2, 3) if kind == "channel" else (1, 2, 3)
    torch.testing.assert_close(half.std(axes), x.std(axes).sqrt(), rtol=1e-4, atol=0)
    y, applied = normalise(x, kind, 0.5)
    torch.testing.assert_close(applied.undo(y), x, rtol=1e-5, atol=1e-5)


@shapes
@pytest.mark.parametrize("kind", ["channel", "frame"])
def test_what_does_not_vary_gives_no_nan_and_comes_back(kind, shape):
    x = varied(shape)
    x[:, 2] = 2.5  # a constant channel
    for given in (x, torch.full(shape, 2.5), torch.zeros(shape)):
        y, applied = normalise(given, kind)
        assert torch.isfinite(y).all() and y.abs().max() < 100
        torch.testing.assert_close(applied.undo(y), given, rtol=1e-5, atol=1e-5)
    if kind == "channel":
        assert torch.equal(normalise(x, kind)[0][:, 2], x[:, 2])


def test_a_single_value_has_no_deviation():
    for kind in ("channel", "frame"):
        y, applied = normalise(torch.full((1, 1, 1, 1), 2.0), kind)
        assert torch.isfinite(y).all() and applied.undo(y).item() == 2.0
    assert rescale(torch.full((2, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 5.0)).tolist() == [[[[5.0]]]] * 2


# --- rescaling -------------------------------------------------------------------------------------------------------


@shapes
def test_rescaling_takes_the_first_frames_statistics_to_the_references(shape):
    """The paper's formula, written out a channel at a time."""
    x, reference = varied(shape), clip(*shape, seed=8, dtype=torch.float32) * 0.3 - 1
    y = rescale(x, reference)
    for source, picture, result in zip(clips(x), clips(reference), clips(y)):
        for c in range(4):
            first, target = source[0, c], picture[0, c]
            wanted = (source[:, c] - first.mean()) / first.std() * target.std() + target.mean()
            torch.testing.assert_close(result[:, c], wanted, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(result[0, c].std(), target.std(), rtol=1e-4, atol=1e-4)


def test_only_the_references_first_frame_counts():
    x, reference = varied(SHAPES["4-D"]), varied(SHAPES["4-D"], seed=8)
    assert torch.equal(rescale(x, reference), rescale(x, reference[:1]))


@shapes
def test_the_strength_of_rescaling(shape):
    x, reference = varied(shape), varied(shape, seed=8) * 0.3
    assert rescale(x, reference, 0.0) is x
    torch.testing.assert_close(rescale(x, reference, 0.25), x + 0.25 * (rescale(x, reference) - x))


def test_rescaling_to_its_own_first_frame_changes_nothing():
    x = varied(SHAPES["4-D"])
    torch.testing.assert_close(rescale(x, x), x)


def test_rescaling_a_constant_channel_gives_no_nan():
    x = varied(SHAPES["4-D"])
    x[:, 2] = 2.5
    reference = varied(SHAPES["4-D"], seed=8)
    result = rescale(x, reference)
    assert torch.isfinite(result).all()
    torch.testing.assert_close(result[:, 2], reference[0, 2].mean().expand(6, 5, 7))


def test_a_channel_that_is_constant_in_the_first_frame_alone_is_shifted_not_blown_up():
    x, reference = varied(SHAPES["4-D"]), varied(SHAPES["4-D"], seed=8)
    x[0, 2] = 2.5
    result = rescale(x, reference)
    torch.testing.assert_close(result[:, 2], x[:, 2] - 2.5 + reference[0, 2].mean())
    torch.testing.assert_close(result[:, :2], rescale(x[:, :2], reference[:, :2]))


def test_rescaling_forgets_a_channel_normalisation_before_it():
    """So the paper's method need not undo its normalisation: the two are affine, channel by channel."""
    x, reference = varied(SHAPES["4-D"]), varied(SHAPES["4-D"], seed=8)
    torch.testing.assert_close(rescale(normalise(x)[0], reference), rescale(x, reference), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_type_is_kept_and_inputs_are_left_alone(dtype):
    x, reference = varied(SHAPES["4-D"], dtype=dtype), varied(SHAPES["4-D"], seed=8, dtype=dtype)
    before = x.clone(), reference.clone()
    y, applied = normalise(x)
    assert y.dtype == rescale(x, reference).dtype == applied.undo(y).dtype == dtype
    assert torch.equal(x, before[0]) and torch.equal(reference, before[1])
    exact = normalise(x.double())[0]
    assert float((y.double() - exact).abs().max()) < torch.finfo(dtype).eps * float(exact.abs().max())


# --- the first frame -------------------------------------------------------------------------------------------------


def test_augmentation_is_in_the_models_range_and_off_at_0():
    pixels, noise = clip(1, 3, 8, 8), clip(3, 8, 8, seed=1)
    torch.testing.assert_close(augment(pixels, 0.2, noise), pixels + 0.2 * noise)
    assert augment(pixels, 0.0, noise) is pixels


def test_the_whitened_condition_has_the_spread_of_unscaled_latents():
    latent = 3 * clip(1, 4, 6, 8) + 1
    white = whiten_condition(latent, 0.18215)
    assert float(white.mean()) == pytest.approx(0, abs=1e-6)
    assert float(white.std()) == pytest.approx(5.49, abs=1e-3)


def test_a_picture_of_clips_own_size_is_only_rounded_and_standardised():
    image = torch.tensor([0.2, 0.5, 0.7])[:, None, None].expand(1, 3, 4, 4)
    values = [51 / 255, 128 / 255, 178 / 255]  # 0.5 -> 127.5 -> 128, 0.7 -> 178.5 -> 178: half to even
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    wanted = [(v - m) / d for v, m, d in zip(values, mean, deviation)]
    prepared = clip_preprocess(image, 4)
    assert prepared.shape == (1, 3, 4, 4)
    assert prepared[0, :, 1, 2].tolist() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("height, width", [(40, 64), (64, 40), (24, 24), (50, 25), (10, 16)])
def test_a_picture_is_prepared_as_transformers_does_it(height, width):
    """transformers' image processor on the same picture in bytes, which also rounds between resizing and cropping."""
    from transformers import CLIPImageProcessor

    image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    image = (255 * torch.nn.functional.avg_pool2d(image, 3, 1, 1)).round() / 255  # smooth, so that ringing is mild
    processor = CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    theirs = processor((255 * image).to(torch.uint8)[0], return_tensors="pt")["pixel_values"]
    ours = clip_preprocess(image, 24)
    assert ours.shape == (1, 3, 24, 24)
    step = 1 / 255 / 0.26  # one step of a byte
    assert float((ours - theirs).abs().mean()) < 0.6 * step and float((ours - theirs).abs().max()) < 3 * step


def test_the_longer_side_is_rounded_as_the_host_does():
    """31 x 25 at size 24 is 29.76 x 24: the host resizes to 30, transformers to 29."""
    image = torch.rand(1, 3, 31, 25, generator=torch.Generator().manual_seed(0))
    resized = torch.nn.functional.interpolate(image, (30, 24), mode="bicubic", antialias=True)[:, :, 3:27]
    torch.testing.assert_close(clip_preprocess(image, 24), clip_preprocess(resized, 24))


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: normalise(x, "batch"), '"batch"; it must be one of channel, frame, off'),
        (lambda x: normalise(x, strength=2.0), "strength of the normalisation is 2.0; it must be 0 to 1"),
        (lambda x: normalise(x * math.nan), "NaN or infinite"),
        (lambda x: normalise(x * math.inf, "off"), "NaN or infinite"),
        (lambda x: normalise(x[0]), r"shape \(4, 5, 7\); a clip is"),
        (lambda x: normalise(x[:0]), r"empty latent of shape \(0, 4, 5, 7\)"),
        (
            lambda x: normalise(x, "frame")[1].undo(x[:3]),
            r"are \(6, 1, 1, 1\), got a clip of \(3, 4, 5, 7\)",
        ),
        (lambda x: normalise(x)[1].apply(x[:, :2]), "before it is normalised, not after"),
        (lambda x: rescale(x, x, -0.1), "strength of the rescaling is -0.1; it must be 0 to 1"),
        (lambda x: rescale(x, x * math.nan), "NaN or infinite"),
        (lambda x: rescale(x, x[:, :3]), r"\(6, 4, 5, 7\) to a picture of shape \(6, 3, 5, 7\): both must come from"),
        (lambda x: rescale(x, x[None]), "same VAE"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(varied(SHAPES["4-D"]))
