"""Measures of an edited clip against a known answer.

A clip is [T, 3, H, W] in 0..1, a mask [T, H, W] in 0..1. Whole-frame PSNR and SSIM reward keeping the source: an edit
is measured in the edited region, against the TRUE edit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import NormalDist, fmean, stdev

import torch
from torch import Tensor

PSNR_CAP = 100.0  # dB, of equal clips: a mean over clips stays finite
CORE = 0.9  # mask values above this are inside the object, away from its antialiased edge


def _check_pair(a: Tensor, b: Tensor, mask: Tensor | None) -> None:
    if a.ndim != 4 or a.shape != b.shape:
        raise ValueError(
            f"got clips of shapes {tuple(a.shape)} and {tuple(b.shape)}; both must be the same [T, C, H, W]"
        )
    if mask is not None and mask.shape != (a.shape[0], *a.shape[2:]):
        raise ValueError(
            f"got a mask of shape {tuple(mask.shape)} for clips of shape {tuple(a.shape)}; it must be [T, H, W]"
        )


def psnr(a: Tensor, b: Tensor, mask: Tensor | None = None) -> float:
    """Peak signal-to-noise ratio of two clips in dB, the squared error averaged over the clip before the logarithm.

    a, b: [T, C, H, W] in 0..1. mask: [T, H, W], weights of the pixels; None counts all alike. At most PSNR_CAP; NaN
    where the mask is empty. Raises ValueError for unequal shapes.
    """
    _check_pair(a, b, mask)
    error = (a.double() - b.double()).square().mean(1)
    weight = torch.ones_like(error) if mask is None else mask.double()
    total = weight.sum()
    if total == 0:
        return math.nan
    mean = float((weight * error).sum() / total)
    return min(PSNR_CAP, -10 * math.log10(mean)) if mean > 0 else PSNR_CAP


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity (Wang et al. 2004; 11 x 11 Gaussian window), the mean over a clip's pixels and channels.

    a, b: [T, C, H, W] in 0..1. Raises ValueError for unequal shapes.
    """
    from kornia.metrics import ssim as ssim_map

    _check_pair(a, b, None)
    return float(ssim_map(a.float(), b.float(), window_size=11).mean())


def colour_transfer(result: Tensor, source: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """How far the object's mean colour went from the source's to the target's, a frame: [T].

    The projection of (result - source) on (target - source), divided by the latter's length: 0 is the source's colour,
    1 the target's. result, source, target: [T, 3, H, W]. mask: [T, H, W], the object in the TRUE edit; its core counts.
    NaN in frames without an object or without a change of colour. Raises ValueError for unequal shapes.
    """
    _check_pair(result, source, mask)
    _check_pair(result, target, mask)
    core = (mask > CORE).double()
    pixels = core.sum((-2, -1))

    def mean_colour(clip: Tensor) -> Tensor:  # [T, 3]
        return (clip.double() * core[:, None]).sum((-2, -1)) / pixels[:, None]

    start = mean_colour(source)
    way = mean_colour(target) - start
    length = way.square().sum(1)
    share = ((mean_colour(result) - start) * way).sum(1) / length
    return torch.where(length > 1e-6, share, math.nan)


def seam_error(result: Tensor, truth: Tensor, mask: Tensor) -> float:
    """How far the step across a mask's edge is from the true one, in levels of 255: 0 where no seam shows.

    The mean of |(a - b) - (a* - b*)| over all colours and all pairs of neighbouring pixels, side by side or one above
    the other, of which one lies inside the mask (above 0) and one outside; a, b of the result and a*, b* of the truth.
    result, truth: [T, C, H, W] in 0..1. mask: [T, H, W]. NaN for a mask without an edge. Raises ValueError for unequal
    shapes.
    """
    _check_pair(result, truth, mask)
    error, pairs = 0.0, 0
    for axis in (-1, -2):
        edge = (mask > 0).diff(dim=axis)
        steps = (result.double() - truth.double()).diff(dim=axis).abs().mean(1)
        error, pairs = error + float(steps[edge].sum()), pairs + int(edge.sum())
    return 255 * error / pairs if pairs else math.nan


def estimate_flow(clip: Tensor) -> Tensor:
    """Optical flow [T - 1, 2, H, W] (dx, dy in pixels) from each frame of a clip to the next, estimated by DIS.

    clip: [T, 3, H, W] in 0..1. Kroeger et al., arXiv 1603.03590, in OpenCV's implementation. Raises ImportError with
    advice where OpenCV is missing.
    """
    try:
        import cv2
    except ImportError as error:
        raise ImportError("optical flow is estimated with OpenCV: pip install opencv-python-headless") from error

    estimator = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    # The finest scale: the clips of the demo world are small.
    estimator.setFinestScale(0)
    pixels = (clip.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in pixels]
    flows = [estimator.calc(now, then, None) for now, then in pairwise(grey)]
    return torch.stack([torch.from_numpy(flow).permute(2, 0, 1) for flow in flows])


def flow_error(clip: Tensor, flow: Tensor, mask: Tensor | None = None) -> float:
    """Mean end-point error, in pixels, of the flow estimated on a clip against the known one.

    clip: [T, 3, H, W]. flow: [T - 1, 2, H, W], the known forward flow. mask: [T, H, W]; the masks of the first T - 1
    frames say which pixels count. NaN where they are empty. Raises ValueError for unequal shapes, ImportError without
    OpenCV.
    """
    if flow.shape != (clip.shape[0] - 1, 2, *clip.shape[2:]):
        raise ValueError(
            f"got a flow {tuple(flow.shape)} for a clip {tuple(clip.shape)}; the flow must be [T - 1, 2, H, W]"
        )
    _check_pair(clip, clip, mask)
    error = (estimate_flow(clip) - flow.cpu()).norm(dim=1)
    weight = torch.ones_like(error) if mask is None else mask[:-1].cpu().to(error)
    return float((weight * error).sum() / weight.sum())


def lower_bound(values: Sequence[float], confidence: float = 0.95) -> float:
    """One-sided lower confidence bound on the mean of independent values, by Student's t.

    Raises ValueError for fewer than two values.
    """
    n = len(values)
    if n < 2:
        raise ValueError(f"got {n} values; a bound needs at least 2")
    z, v = NormalDist().inv_cdf(confidence), n - 1
    # The quantile of Student's t from the normal one (Abramowitz and Stegun 26.7.5), to three digits from v = 4 on.
    t = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    return fmean(values) - t * stdev(values) / math.sqrt(n)


def share_bound(right: int, count: int, confidence: float = 0.95) -> float:
    """One-sided lower confidence bound on a share, by Wilson's score; it stays below 1 where all are right.

    right: how many of `count` independent trials succeeded. Wilson, J. Am. Stat. Assoc. 22 (1927). Raises ValueError
    unless 0 <= right <= count and count > 0.
    """
    if not 0 <= right <= count or count == 0:
        raise ValueError(
            f"got {right} right of {count}; a share needs at least one trial, and no more right than there are"
        )
    z, share = NormalDist().inv_cdf(confidence), right / count
    middle = share + z**2 / (2 * count)
    reach = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, (middle - reach) / (1 + z**2 / count))
