"""The measures against cases whose answers are known by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rewind.demo import world as W
from rewind.pipelines.evaluation.metrics import (
    PSNR_CAP,
    colour_transfer,
    estimate_flow,
    flow_error,
    lower_bound,
    psnr,
    seam_error,
    share_bound,
    ssim,
)


@pytest.fixture(scope="module")
def clip():
    """A clip with unpredictable motion, its recolouring, the object's mask and the flow."""
    generator = torch.Generator().manual_seed(3)
    scene = W.sample(1, generator, W.World(frames=4), motion="unpredictable", editable=True)
    frames, mask = W.render(scene)
    recoloured, _ = W.render(W.edit(scene, "recolour", generator))
    return frames[0], recoloured[0], mask[0], W.optical_flow(scene)[0]


def test_psnr_of_a_known_error():
    a = torch.full((2, 3, 8, 8), 0.5)
    assert psnr(a, a + 0.1) == pytest.approx(20.0, abs=1e-4)
    assert psnr(a, a) == PSNR_CAP


def test_psnr_pools_the_error_over_the_clip_before_the_logarithm():
    a = torch.zeros(2, 3, 8, 8)
    b = a.clone()
    b[1] = 0.2
    assert psnr(a, b) == pytest.approx(-10 * math.log10(0.04 / 2), abs=1e-6)


def test_psnr_counts_only_the_mask():
    a = torch.zeros(2, 3, 8, 8)
    b = a.clone()
    b[:, :, :4] = 1.0
    mask = torch.zeros(2, 8, 8)
    mask[:, 4:] = 1
    assert psnr(a, b, mask) == PSNR_CAP
    assert psnr(a, b, 1 - mask) == pytest.approx(0.0, abs=1e-9)
    assert math.isnan(psnr(a, b, torch.zeros(2, 8, 8)))


def test_ssim_is_one_for_equal_clips_and_falls_with_noise(clip):
    frames = clip[0]
    noisy = frames + 0.1 * torch.randn(frames.shape, generator=torch.Generator().manual_seed(0))
    assert ssim(frames, frames) == pytest.approx(1.0, abs=1e-4)
    assert ssim(frames, noisy) < 0.8


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0, 1.2])
def test_colour_transfer_is_the_share_of_the_way(clip, share):
    source, target, mask, _ = clip
    result = source + share * (target - source)
    torch.testing.assert_close(
        colour_transfer(result, source, target, mask), torch.full((4,), share).double(), atol=1e-5, rtol=0
    )


def test_colour_transfer_is_told_frame_by_frame_and_ignores_the_background(clip):
    source, target, mask, _ = clip
    result = target.clone()
    result[2:] = source[2:]
    result = torch.where(
        mask[:, None] > 0, result, torch.rand(result.shape, generator=torch.Generator().manual_seed(1))
    )
    torch.testing.assert_close(
        colour_transfer(result, source, target, mask), torch.tensor([1.0, 1, 0, 0]).double(), atol=1e-5, rtol=0
    )


def test_colour_transfer_is_nan_where_nothing_changes_colour_or_nothing_is_there(clip):
    source, target, mask, _ = clip
    assert colour_transfer(source, source, source, mask).isnan().all()
    empty = mask.clone()
    empty[1] = 0
    assert colour_transfer(target, source, target, empty).isnan().tolist() == [False, True, False, False]


def test_flow_of_a_shifted_texture_is_the_shift():
    pytest.importorskip("cv2")
    wide = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    wide = torch.nn.functional.interpolate(wide, size=(160, 160), mode="bicubic").clamp(0, 1)[0]
    clip = torch.stack([wide[:, 30 + 2 * t : 126 + 2 * t, 40 - 3 * t : 136 - 3 * t] for t in range(3)])
    flow = torch.tensor([3.0, -2.0])[None, :, None, None].expand(2, 2, 96, 96)
    inner = torch.zeros(3, 96, 96)
    inner[:, 12:-12, 12:-12] = 1
    assert (estimate_flow(clip) - flow)[..., 12:-12, 12:-12].norm(dim=1).mean() < 0.2
    assert flow_error(clip, flow, inner) < 0.2
    assert flow_error(clip, -flow, inner) == pytest.approx(2 * 13**0.5, abs=0.3)


def test_flow_error_tells_the_true_motion_from_none(clip):
    pytest.importorskip("cv2")
    source, target, mask, flow = clip
    frozen = source[:1].expand_as(source)
    assert flow_error(target, flow, mask) < 0.5 * flow_error(frozen, flow, mask)
    assert math.isnan(flow_error(source, flow, torch.zeros_like(mask)))


# One-sided 95 % quantiles of Student's t, from a table.
@pytest.mark.parametrize(("n", "quantile"), [(6, 2.015), (16, 1.753), (31, 1.697), (64, 1.669)])
def test_the_lower_bound_is_students(n, quantile):
    values = [math.sin(17.0 * i) for i in range(n)]
    mean = sum(values) / n
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    assert (mean - lower_bound(values)) * math.sqrt(n) / deviation == pytest.approx(quantile, abs=2e-3)


def test_the_lower_bound_covers_the_mean_as_often_as_it_says():
    draws = torch.randn(2000, 8, generator=torch.Generator().manual_seed(5))
    below = sum(lower_bound(row.tolist()) <= 0 for row in draws) / len(draws)
    assert below == pytest.approx(0.95, abs=0.015)


def test_the_share_bound_is_where_the_share_would_be_told_from_it():
    """Wilson's bound p solves (share - p) = z sqrt(p (1 - p) / n)."""
    for right, count in ((58, 64), (64, 64), (10, 12), (1, 40)):
        bound = share_bound(right, count)
        assert right / count - bound == pytest.approx(1.6449 * math.sqrt(bound * (1 - bound) / count), abs=1e-4)
    assert share_bound(0, 20) == 0 and 0.9 < share_bound(64, 64) < 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda a: psnr(a, a[:1]), "same"),
        (lambda a: psnr(a, a, torch.ones(2, 4, 4)), "mask"),
        (lambda a: ssim(a[0], a[0]), r"\[T, C, H, W\]"),
        (lambda a: colour_transfer(a, a, a[:1], torch.ones(2, 8, 8)), "same"),
        (lambda a: flow_error(a, torch.zeros(2, 2, 8, 8)), r"T - 1"),
        (lambda a: lower_bound([1.0]), "at least 2"),
        (lambda a: share_bound(3, 2), "3 right of 2"),
        (lambda a: share_bound(0, 0), "at least one"),
    ],
)
def test_bad_input_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.zeros(2, 3, 8, 8))


def test_a_seam_is_the_error_of_the_steps_across_the_edge():
    """A square of 3 x 2 pixels has 10 pairs at its edge; what is wrong elsewhere does not count."""
    truth = torch.rand(1, 3, 8, 9, generator=torch.Generator().manual_seed(0)) / 2
    mask = torch.zeros(1, 8, 9)
    mask[:, 2:5, 3:5] = 1
    lighter = truth + 0.1 * mask[:, None]
    assert seam_error(lighter, truth, mask) == pytest.approx(25.5, abs=1e-4)
    assert seam_error(truth + 0.1, truth, mask) == pytest.approx(0, abs=1e-4)
    assert seam_error(lighter, truth, torch.nn.functional.max_pool2d(mask, 3, 1, 1)) == pytest.approx(0, abs=1e-4)
    one = truth.clone()
    one[:, 0, 2, 3] += 0.3  # a corner, in one colour: two of the 10 pairs
    assert seam_error(one, truth, mask) == pytest.approx(255 * 0.1 * 2 / 10, abs=1e-4)
    assert math.isnan(seam_error(truth, truth, torch.ones_like(mask)))
    with pytest.raises(ValueError, match="mask of shape"):
        seam_error(truth, truth, mask[:, 1:])
