"""Masks: of pixels and of latents, and what they hold the source to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from denoisers import Gaussian, clip

from rewind.demo.clip import SEEDS, example
from rewind.pipelines.denoiser import FLOW, V
from rewind.pipelines.videoshop.denoising import sample_euler
from rewind.pipelines.videoshop.inversion import Inversion, sample_edm_inversion
from rewind.pipelines.videoshop.latents import normalise, rescale
from rewind.pipelines.videoshop.masks import (
    DEFAULT_MASK,
    MaskSettings,
    StoredSource,
    check_mask,
    composite,
    composite_pixels,
    difference_mask,
    edit_mask,
    latent_mask,
    soften,
)

# --- masks of pixels --------------------------------------------------------------------------------------------------


def square(height=24, width=30):
    mask = torch.zeros(2, height, width)
    mask[0, 8:12, 10:15] = 1
    mask[1, 0:3, 27:30] = 1
    return mask


def test_what_differs_by_more_than_the_threshold_is_masked():
    frame = torch.full((3, 4, 5), 0.5)
    edited = frame.clone()
    edited[0, 1, 1] += 0.2  # in one colour alone
    edited[:, 2, 3] -= 0.3
    edited[:, 3, 0] += 0.1
    assert difference_mask(frame, edited, 0.15).nonzero().tolist() == [[1, 1], [2, 3]]
    assert difference_mask(frame, edited, 0.25).nonzero().tolist() == [[2, 3]]
    with pytest.raises(ValueError, match="at most 0.300, and the mask's threshold is 0.35"):
        difference_mask(frame, edited, 0.35)
    with pytest.raises(ValueError, match=r"\(3, 4, 5\) and its edit of shape \(3, 4, 4\)"):
        difference_mask(frame, edited[..., :4])


def test_growing_widens_to_each_side():
    grown = soften(square(), grow=2)
    wanted = torch.zeros(2, 24, 30)
    wanted[0, 6:14, 8:17] = 1
    wanted[1, 0:5, 25:30] = 1
    assert torch.equal(grown, wanted)
    assert torch.equal(soften(square()), square())


@pytest.mark.parametrize("feather", [1, 2, 3, 6])
def test_a_feather_falls_from_1_to_0_outside_what_is_masked(feather):
    soft, inner = soften(square(), 1, feather), soften(square(), 1)
    reach = soften(square(), 1 + feather)
    assert torch.equal(soft == 1, inner == 1) or feather > 1  # a feather of 1 is one value
    assert (soft[inner == 1] == 1).all() and (soft[reach == 0] == 0).all()
    assert 0 <= float(soft.min()) and float(soft.max()) == 1
    row = soft[0, 10, 15:]  # from the last column that is grown to, outwards
    assert row[0] == 1 and (row.diff() <= 0).all() and ((row > 0) & (row < 1)).sum() >= (feather + 1) // 2


@pytest.mark.parametrize(
    ("values", "message"),
    [({"threshold": 1.0}, "threshold is 1.0"), ({"grow": -1}, "grow is -1"), ({"feather": -2}, "feather is -2")],
)
def test_settings_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        replace(DEFAULT_MASK, **values)


@pytest.mark.parametrize("kind", ["recolour", "reshape", "add"])
def test_the_mask_of_an_edit_covers_it_in_every_frame(kind):
    """Of the pixels that the TRUE edit changes hardly any is left out, and far from all of the frame is let change.

    Least is covered of a band that is added to a plain object which turns: nothing inside it shows the turn.
    """
    for seed in (SEEDS["validation"], SEEDS["validation"] + 1):
        chosen = example(seed, kind)
        mask = edit_mask(chosen.source, chosen.edited_frame)
        changed = (chosen.target - chosen.source).abs().amax(1) > DEFAULT_MASK.threshold
        covered = (changed & (mask > 0)).sum((1, 2)) / changed.sum((1, 2))
        assert float(covered[0]) == 1 and float(covered.mean()) > 0.97 and float(covered.min()) > 0.8, covered
        assert float(mask.mean()) < 0.3


def test_a_given_mask_takes_the_place_of_the_difference():
    chosen = example(SEEDS["validation"])
    settings = MaskSettings(grow=0, feather=0)
    first = chosen.source_mask[0]
    masks = edit_mask(chosen.source, chosen.source[0], settings, first=first)  # nothing differs
    assert torch.equal(masks[0], (first > 0.5).float())
    with pytest.raises(ValueError, match="the mask of the first frame is empty"):
        edit_mask(chosen.source, chosen.edited_frame, settings, first=0.4 * first)


# --- masks of latents -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width", "h", "w"), [(64, 96, 8, 12), (61, 93, 8, 12), (20, 30, 20, 30)])
def test_every_masked_pixel_has_a_masked_latent_and_no_other_latent_is(height, width, h, w):
    mask = (torch.rand(3, height, width, generator=torch.Generator().manual_seed(0)) > 0.995).float()
    small = latent_mask(mask, (3, 4, h, w))
    assert small.shape == (3, 1, h, w)
    wanted = torch.zeros(3, h, w)
    for frame, y, x in mask.nonzero().tolist():
        # the latents whose part of the frame the pixel touches
        for row in range(h):
            for column in range(w):
                over_rows = row * height < (y + 1) * h and y * h < (row + 1) * height
                if over_rows and column * width < (x + 1) * w and x * w < (column + 1) * width:
                    wanted[frame, row, column] = 1
    assert torch.equal(small[:, 0], wanted) and 0 < wanted.mean() < 0.5


def test_a_soft_mask_keeps_the_largest_value_of_a_patch():
    mask = torch.zeros(2, 16, 16)
    mask[0, 3, 4], mask[0, 5, 9], mask[1, 15, 15] = 0.25, 0.5, 1.0
    small = latent_mask(mask, (2, 4, 2, 2))[:, 0]
    assert small.tolist() == [[[0.25, 0.5], [0, 0]], [[0, 0], [0, 1.0]]]


def test_time_is_taken_as_video_vaes_take_it():
    """9 frames are 3 latents: the first, then four each."""
    mask = torch.zeros(9, 8, 8)
    mask[4, 0, 0] = mask[5, 7, 7] = 1
    small = latent_mask(mask, (1, 16, 3, 2, 2))
    assert small.shape == (1, 1, 3, 2, 2)
    assert small[0, 0].nonzero().tolist() == [[1, 0, 0], [2, 1, 1]]
    assert latent_mask(mask[4:5], (1, 16, 3, 2, 2)).shape == (1, 1, 1, 2, 2)  # broadcasts: one for all
    assert torch.equal(latent_mask(mask[4:7], (1, 16, 3, 2, 2))[0, 0, 0], torch.tensor([[1.0, 0], [0, 0]]))
    for frames in (2, 4, 8):
        with pytest.raises(ValueError, match=f"the mask has {frames} frames, the clip 3 latents"):
            latent_mask(mask[:frames], (1, 16, 3, 2, 2))


BAD = {
    "a picture": (torch.ones(8, 8), "must be .frames, height, width."),
    "frames": (torch.ones(3, 8, 8), "the mask has 3 frames, the clip 2"),
    "proportions": (torch.ones(2, 8, 16), "16x8, the clip 8x8"),
    "empty": (torch.zeros(2, 8, 8), "empty"),
    "range": (2 * torch.ones(2, 8, 8), "0..1"),
    "NaN": (torch.full((2, 8, 8), torch.nan), "0..1"),
}


@pytest.mark.parametrize(("mask", "message"), BAD.values(), ids=BAD)
def test_masks_that_cannot_be_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        check_mask(mask, 2, 8, 8)


# --- the source outside -----------------------------------------------------------------------------------------------


def test_a_composite_is_the_source_outside_and_the_edit_inside_to_the_bit():
    x, source = (torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(i)) for i in range(2))
    x[0, 0, 0, 0] = torch.inf
    mask = torch.zeros(2, 1, 6, 8)
    mask[:, :, 2:4], mask[:, :, 5] = 1.0, 0.25
    mixed = composite(x, source, mask)
    assert torch.equal(mixed[:, :, :2], source[:, :, :2]) and torch.equal(mixed[:, :, 4], source[:, :, 4])
    assert torch.equal(mixed[:, :, 2:4], x[:, :, 2:4])
    torch.testing.assert_close(mixed[:, :, 5], 0.25 * x[:, :, 5] + 0.75 * source[:, :, 5])
    half = composite(x.half(), source, mask)
    assert half.dtype == torch.float32 and torch.equal(half[:, :, :2], source[:, :, :2])


def test_pixels_are_the_sources_outside_and_lose_the_vaes_shift_inside():
    """A shift of colours that differs by frame, all over the frames, is known from outside and taken away inside."""
    generator = torch.Generator().manual_seed(0)
    source, edited = (0.2 + 0.6 * torch.rand(3, 3, 40, 40, generator=generator) for _ in range(2))
    mask = torch.zeros(3, 40, 40)
    mask[:2, 12:20, 10:25], mask[2] = 1.0, 1.0
    shift = torch.tensor([[0.05, -0.1, 0.0], [-0.05, 0.02, 0.1], [0.1, 0.1, 0.1]])[:, :, None, None]
    true = torch.where(mask[:, None] == 1, edited, source)
    found = composite_pixels(true + shift, source, mask)
    outside = (mask == 0)[:, None].expand_as(source)
    assert torch.equal(found[outside], source[outside])
    torch.testing.assert_close(found[:2], true[:2])
    torch.testing.assert_close(found[2], (true + shift)[2])  # masked as a whole: nothing is known of it
    plain = composite_pixels(true + shift, source, mask, match=False)
    assert torch.equal(plain, composite(true + shift, source, mask[:, None]))
    far = true + shift
    far[0, :, 30:] += 0.2  # beyond the ring
    torch.testing.assert_close(composite_pixels(far, source, mask)[:2], true[:2])
    still = composite_pixels(true + shift, source, mask[:1])
    assert torch.equal(still[1][outside[1]], source[1][outside[1]])


def inverted(path, top, shape=(4, 4, 3, 5)):
    """A clip inverted by the ideal denoiser, its trajectory kept."""
    x, states = clip(*shape), []
    sigmas = torch.linspace(0, top, 6, dtype=torch.float64)
    model = Gaussian(path, s=0.8, mu=0.2)
    latent = sample_edm_inversion(
        model,
        x,
        sigmas,
        callback=lambda step: states.append(step["x"]),
        disable=True,
        path=path,
        guess_below="current",
    )
    return Inversion(latent, sigmas.flip(0), trajectory=torch.stack([x, *states]), source=x)


FAMILIES = {"v": (V, 8.0, (4, 4, 3, 5)), "flow": (FLOW, 0.9, (2, 4, 3, 4, 5))}


@pytest.mark.parametrize(("path", "top", "shape"), FAMILIES.values(), ids=FAMILIES)
def test_the_network_sees_the_sources_own_points_outside_the_mask_at_every_level(path, top, shape):
    """What the network is shown outside is the trajectory to the bit, and not the clean clip; inside nothing changes.

    The denoiser looks at each element alone, so that inside the mask the result is that of no mask.
    """
    inversion = inverted(path, top, shape)
    mask = (torch.rand(1, 1, *shape[-2:], generator=torch.Generator().manual_seed(1)) > 0.5).double()
    mask = mask if len(shape) == 4 else mask[:, :, None]
    start = inversion.latent + 0.3 * mask  # the edit; and what is wrong outside at the start is put right
    edited, plain = Gaussian(path, s=0.8, mu=0.9), Gaussian(path, s=0.8, mu=0.9)
    put_back = StoredSource(inversion, mask)
    result = sample_euler(edited, start + (1 - mask), inversion.sigmas, disable=True, put_back=put_back)
    without = sample_euler(plain, start, inversion.sigmas, disable=True)
    outside, inside = (mask == 0).expand(shape), (mask == 1).expand(shape)
    assert len(edited.seen) == len(inversion.sigmas) - 1
    for i, (x, _) in enumerate(edited.seen):
        point = inversion.trajectory[-1 - i]
        assert torch.equal(x[outside], point[outside])
        assert float((point - inversion.source)[outside].abs().mean()) > 0.05
        assert torch.equal(x[inside], plain.seen[i][0][inside])
    assert torch.equal(result[inside], without[inside])
    final = composite(result, inversion.source, mask)
    assert torch.equal(final[outside], inversion.source[outside])


def test_a_level_or_clip_that_the_inversion_did_not_pass_is_refused():
    inversion = inverted(V, 8.0)
    mask = torch.ones(1, 1, 3, 5)
    put_back = StoredSource(inversion, mask)
    assert torch.equal(put_back(inversion.latent, 8.0 * (1 + 1e-6)), inversion.latent)
    with pytest.raises(ValueError, match="stored nothing at the noise level 7.9"):
        put_back(inversion.latent, 7.9)
    with pytest.raises(ValueError, match=r"shape \(3, 4, 3, 5\), the inverted clip \(4, 4, 3, 5\)"):
        put_back(inversion.latent[:3], 8.0)
    with pytest.raises(ValueError, match="holds no trajectory"):
        StoredSource(replace(inversion, trajectory=None), mask)


# --- statistics -------------------------------------------------------------------------------------------------------


def region(shape, seed=2):
    """A mask of latents of 0 and 1 that differs by frame, in the shape that broadcasts over a clip."""
    wanted = (shape[0], 1, *shape[2:]) if len(shape) == 4 else (1, 1, *shape[2:])
    return (torch.rand(wanted, generator=torch.Generator().manual_seed(seed)) > 0.4).float()


SHAPES = {"4-D": (6, 4, 5, 7), "5-D": (1, 4, 6, 5, 7)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_normalisations_statistics_come_from_inside(shape):
    x, mask = 3 * clip(*shape, dtype=torch.float32) + 1, region(shape)
    inside = mask.expand_as(x).bool()
    _, channel = normalise(x, "channel", mask=mask)
    _, frame = normalise(x, "frame", mask=mask)
    frames = x if x.ndim == 4 else x[0].movedim(1, 0)
    chosen = inside if x.ndim == 4 else inside[0].movedim(1, 0)
    for i in range(4):
        torch.testing.assert_close(channel.scale.flatten()[i], frames[:, i][chosen[:, i]].std() + 1e-6)
    for i in range(6):
        torch.testing.assert_close(frame.shift.flatten()[i], frames[i][chosen[i]].mean())
        torch.testing.assert_close(frame.scale.flatten()[i], frames[i][chosen[i]].std() + 1e-6)
    y, everything = normalise(x, "channel", mask=torch.ones_like(mask))
    torch.testing.assert_close(y, normalise(x, "channel")[0])
    torch.testing.assert_close(everything.undo(y), x)


def test_a_frame_in_which_nothing_is_masked_is_whitened_as_a_whole():
    x, mask = clip(6, 4, 5, 7, dtype=torch.float32), region((6, 4, 5, 7))
    mask[3] = 0
    _, frame = normalise(x, "frame", mask=mask)
    torch.testing.assert_close(frame.scale.flatten()[3], x[3].std() + 1e-6)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_rescaling_matches_the_inside_and_leaves_the_outside_alone(shape):
    x, mask = clip(*shape, dtype=torch.float32), region(shape)
    first = (slice(None, 1),) if x.ndim == 4 else (slice(None), slice(None), slice(None, 1))
    reference = 2 * clip(*shape, dtype=torch.float32, seed=5)[first] + 1
    result = rescale(x, reference, mask=mask)
    assert torch.equal(result[(mask == 0).expand_as(x)], x[(mask == 0).expand_as(x)])
    inside = mask[first].expand_as(reference).bool()
    for channel in range(4):
        own, target = (v[:, channel][inside[:, channel]] for v in (result[first], reference))
        torch.testing.assert_close((own.mean(), own.std()), (target.mean(), target.std()), rtol=1e-4, atol=1e-4)
    half = rescale(x, reference, mask=0.5 * mask)
    torch.testing.assert_close(half, torch.lerp(x, result, 0.5))
    assert rescale(x, reference, 0.0, mask=mask) is x


def test_rescaling_refuses_a_mask_that_says_nothing_of_the_first_frame():
    x, mask = clip(6, 4, 5, 7), region((6, 4, 5, 7))
    mask[0] = 0
    with pytest.raises(ValueError, match="first frame is empty"):
        rescale(x, x[:1], mask=mask)
    with pytest.raises(ValueError, match="both must be of one size"):
        rescale(x, x[:1, :, :4], mask=region((6, 4, 5, 7)))
