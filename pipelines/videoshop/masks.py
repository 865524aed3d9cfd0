"""Edits that stay where they are: a mask of the edited region, outside which the source comes back exactly.

While a clip is played, what lies outside the mask is put back from the inversion's own trajectory, at the noise level
that the clip is at: the network then sees the source as it was on its way to noise. (The clean latent, which inpainting
pastes in, belongs to fresh noise; an inverted clip passes no such point.) At level 0 the source itself is laid over
the result.

A mask is 1 where the edit may show and 0 where the source stays; in between both are mixed. All of it is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d, max_pool2d

from ..motion import Flow, lucas_kanade, propagate
from .inversion import Inversion

SAME_PROPORTIONS = 0.02  # a mask's may differ by this share from the clip's
SAME_LEVEL = 1e-4  # two noise levels are one that differ by less than this share
RING = 8  # pixels around a mask in which the VAE's shift of colours is looked for: a patch of latents


@dataclass(frozen=True)
class MaskSettings:
    """How a mask is made of a difference. Raises ValueError for a value out of range.

    threshold: 0..1, how far a pixel's most changed colour must differ from the source's to count as edited.
    grow: pixels by which the region is widened to each side, for shadows, soft edges, and motion that is not quite met.
    feather: pixels beyond that over which the mask falls to 0; 0 ends it hard.
    """

    threshold: float = 0.1
    grow: int = 4
    feather: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise ValueError(f"the mask's threshold is {self.threshold}; it must be at least 0 and below 1")
        for name in ("grow", "feather"):
            if getattr(self, name) < 0:
                raise ValueError(f"the mask's {name} is {getattr(self, name)}; it must be at least 0 pixels")


DEFAULT_MASK = MaskSettings()


# --- masks of pixels --------------------------------------------------------------------------------------------------


def difference_mask(frame: Tensor, edited: Tensor, threshold: float = DEFAULT_MASK.threshold) -> Tensor:
    """Where a frame was edited: [H, W] of 0 and 1. frame, edited: [3, H, W] in 0..1.

    Raises ValueError for unequal shapes, and where nothing differs by more than the threshold.
    """
    if frame.ndim != 3 or frame.shape != edited.shape:
        raise ValueError(
            f"got a frame of shape {tuple(frame.shape)} and its edit of shape {tuple(edited.shape)}; both must be the "
            "same [3, height, width]"
        )
    difference = (edited - frame).abs().amax(0)
    if float(difference.max()) <= threshold:
        raise ValueError(
            f"the edited frame differs from the clip's first frame by at most {float(difference.max()):.3f}, and the "
            f"mask's threshold is {threshold:g}: lower it, give a mask, or check that this is the edited frame"
        )
    return (difference > threshold).float()


def _widen(masks: Tensor, by: int) -> Tensor:
    """The largest value within so many pixels to each side (a square), [T, H, W]."""
    return max_pool2d(masks[:, None], 2 * by + 1, stride=1, padding=by)[:, 0] if by else masks


def soften(masks: Tensor, grow: int = 0, feather: int = 0) -> Tensor:
    """Masks [T, H, W] of 0 and 1, widened by `grow` pixels, then falling to 0 over `feather` more.

    What the widened mask holds stays exactly 1, and what lies `feather` pixels beyond it exactly 0.
    """
    from kornia.filters import gaussian_blur2d

    inner = _widen(masks, grow)
    if not feather:
        return inner
    # Blurred with a window of `feather` pixels to each side, a mask falls from that far inside to that far outside.
    middle, blur = _widen(inner, (feather + 1) // 2), feather // 2
    if blur == 0:
        return torch.maximum(inner, middle / 2)
    soft = gaussian_blur2d(middle[:, None], 2 * blur + 1, (blur / 2, blur / 2), border_type="replicate")[:, 0]
    return torch.where(inner == 1, inner, soft.clamp(0, 1))


def edit_mask(
    clip: Tensor,
    edited: Tensor,
    settings: MaskSettings = DEFAULT_MASK,
    flow: Flow = lucas_kanade,
    first: Tensor | None = None,
    on_frame: Callable[[int], None] | None = None,
) -> Tensor:
    """Masks of an edit, one a frame, [T, H, W] in 0..1: made in the first frame and carried along the clip's motion.

    clip: [T, 3, H, W] in 0..1; edited: its first frame after the edit, [3, H, W]. flow, on_frame: see `propagate`.
    first: [H, W], a mask of the first frame in the place of the difference. Raises ValueError for a mask that is empty.
    """
    if first is None:
        first = difference_mask(clip[0], edited, settings.threshold)
    elif not (first > 0.5).any():
        raise ValueError("the mask of the first frame is empty (nothing above 0.5): nothing could be edited")
    return soften(propagate(first, clip, flow, on_frame), settings.grow, settings.feather)


def check_mask(mask: Tensor, frames: int, height: int, width: int) -> None:
    """ValueError unless a mask is [frames or 1, H, W] in 0..1, not empty, in a clip's proportions."""
    if mask.ndim != 3 or mask.numel() == 0:
        raise ValueError(f"got a mask of shape {tuple(mask.shape)}; it must be [frames, height, width]")
    if len(mask) not in (1, frames):
        raise ValueError(f"the mask has {len(mask)} frames, the clip {frames}: one for each is needed, or one for all")
    own_height, own_width = mask.shape[1:]
    if abs(own_width * height - width * own_height) > SAME_PROPORTIONS * width * own_height:
        raise ValueError(
            f"the mask is {own_width}x{own_height}, the clip {width}x{height}: the proportions differ, so the mask "
            "would not lie over the clip; crop it like the clip"
        )
    if not torch.isfinite(mask).all() or mask.min() < 0 or mask.max() > 1:
        raise ValueError("the mask holds values that are not in 0..1")
    if not mask.any():
        raise ValueError("the mask is empty (all 0): nothing could be edited")


# --- in latent space --------------------------------------------------------------------------------------------------


def latent_mask(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A mask of pixels as a mask of latents: [T, 1, h, w] for a clip [T, C, h, w], [1, 1, T, h, w] for [B, C, T, h, w].

    mask: [frames, H, W] in 0..1. A latent stands for a patch of pixels (8 x 8 in Stable Video Diffusion) and gets the
    LARGEST value in it, so that every masked pixel may change and at an edge up to a patch more does; with the mean, or
    the value in its middle, a patch's masked pixels would be held to the source. In time the same: one mask serves all
    latents, one a latent is taken as it is, and of stride (T - 1) + 1 frames the first stands alone and the others are
    taken by the stride, as video VAEs do. Raises ValueError for another number of frames, and as `check_mask`.
    """
    frames = shape[0] if len(shape) == 4 else shape[2]
    count = len(mask)
    if count not in (1, frames):
        if frames < 2 or count < frames or (count - 1) % (frames - 1):
            raise ValueError(
                f"the mask has {count} frames, the clip {frames} latents: one for each frame or latent is needed, or "
                "one for all"
            )
        rest = mask[1:].unflatten(0, (frames - 1, (count - 1) // (frames - 1)))
        mask = torch.cat([mask[:1], rest.amax(1)])
    check_mask(mask, frames, *shape[-2:])
    # A window for each latent, from the floor of its beginning to the ceiling of its end: no pixel is left out.
    small = adaptive_max_pool2d(mask.float()[:, None], tuple(shape[-2:]))
    return small if len(shape) == 4 else small.movedim(0, 1)[None]


def composite(x: Tensor, source: Tensor, mask: Tensor) -> Tensor:
    """x where the mask is 1, the source where it is 0, bit for bit; a linear mixture in between. mask broadcasts.

    The result has the more exact type of the two, so that the source is not rounded.
    """
    dtype = torch.promote_types(x.dtype, source.dtype)
    x, source, mask = x.to(dtype), source.to(x.device, dtype), mask.to(x.device, dtype)
    return torch.where(mask > 0, torch.lerp(source, x, mask), source)


def composite_pixels(frames: Tensor, source: Tensor, mask: Tensor, match: bool = True) -> Tensor:
    """The frames of an edit with the source's own pixels outside the mask, bit for bit.

    frames, source: [T, 3, H, W] in 0..1; mask: [T or 1, H, W] in 0..1.
    match: first take away, a frame and colour, what the frames differ from the source by on average within RING pixels
    around the mask. There both should be equal, and what they differ by is the VAE's: what it makes of a latent depends
    on all of the frame, so that beside an edit the source's own latents decode a little lighter or darker.
    """
    if match:
        hard = (mask > 0).float().expand(len(frames), -1, -1)
        ring = (_widen(hard, RING) - hard)[:, None].to(frames)
        shift = ((source.to(frames) - frames) * ring).sum((2, 3), keepdim=True)
        frames = (frames + shift / ring.sum((2, 3), keepdim=True).clamp_min(1)).clamp(0, 1)
    return composite(frames, source, mask[:, None])


class StoredSource:
    """Puts the source back outside a mask, as the inversion passed through the noise level that the clip is at.

    inversion: with its trajectory; mask: of latents, see `latent_mask`. Raises ValueError for an inversion without a
    trajectory, and when called at a level where the inversion stored nothing.
    """

    def __init__(self, inversion: Inversion, mask: Tensor):
        if inversion.trajectory is None:
            raise ValueError("the inversion holds no trajectory, from which the source is put back: keep it")
        self.trajectory, self.mask = inversion.trajectory, mask
        self.levels = inversion.sigmas.flip(0).tolist()  # as the trajectory has them, from 0 up

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """x at a noise level sigma, with the source's own point at that level outside the mask."""
        index = min(range(len(self.levels)), key=lambda i: abs(self.levels[i] - sigma))
        if abs(self.levels[index] - sigma) > SAME_LEVEL * sigma:
            raise ValueError(
                f"the inversion stored nothing at the noise level {sigma:g}: sample on the inversion's own sigmas"
            )
        if x.shape != self.trajectory.shape[1:]:
            raise ValueError(
                f"the latent has shape {tuple(x.shape)}, the inverted clip {tuple(self.trajectory.shape[1:])}: start "
                "from the clip that was inverted"
            )
        return composite(x, self.trajectory[index].to(x), self.mask)
