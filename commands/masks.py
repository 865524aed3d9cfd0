"""The masks of `rewind edit`: made of the edit itself, or read from a file, and carried along the clip."""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import Tensor

from ..pipelines.motion import Flow, load_raft, lucas_kanade
from ..pipelines.video import fit, read_image, read_video
from ..pipelines.videoshop.masks import DEFAULT_MASK, MaskSettings, edit_mask, soften
from .files import VIDEOS, named, same_proportions, say

NONE, AUTO = "none", "auto"
OPTIONS = ("mask_threshold", "mask_grow", "mask_feather", "flow_weights")


def mask_settings(args: argparse.Namespace) -> MaskSettings:
    """The defaults with what the command line changes. Raises ValueError for a value out of range."""
    own = {name: getattr(args, f"mask_{name}") for name in ("threshold", "grow", "feather")}
    return MaskSettings(**{name: getattr(DEFAULT_MASK, name) if v is None else v for name, v in own.items()})


def check_mask_options(args: argparse.Namespace) -> None:
    """Raise for mask options that say nothing together, are out of range, or name a file that is not there."""
    mask_settings(args)
    if args.mask == NONE:
        unused = [name for name in OPTIONS if getattr(args, name) is not None]
        unused += ["keep_pixels"] if args.keep_pixels else []
        if unused:
            raise ValueError(f"{named(unused)} without a mask: give --mask {AUTO}, or --mask with a file")
        return
    if args.mask != AUTO and not Path(args.mask).is_file():
        raise FileNotFoundError(f"there is no file {args.mask}; --mask takes {NONE}, {AUTO}, or a picture or video")
    if args.mask != AUTO and args.mask_threshold is not None:
        raise ValueError(f"--mask-threshold tells what of the edit counts; --mask {args.mask} does not ask the edit")
    if args.flow_weights is not None and Path(args.mask).suffix.lower() in VIDEOS:
        raise ValueError(f"--flow-weights tells how a mask moves; {args.mask} has a mask for each frame")


def read_mask(path: Path, frames: int, fps: int | None, size: tuple[int, int], original: tuple[int, int]) -> Tensor:
    """The masks of a file, [1 or frames, H, W] of 0 and 1: white is edited.

    frames, fps: as the clip was read; size: width and height that the clip was brought to, original: its own. Raises
    ValueError for another number of frames, other proportions, or a mask without white.
    """
    video = path.suffix.lower() in VIDEOS
    pixels = read_video(path, frames=frames, fps=fps).frames if video else read_image(path)[None]
    if video and len(pixels) != frames:
        raise ValueError(f"the mask {path} has {len(pixels)} frames, the clip {frames}; one for each is needed")
    height, width = pixels.shape[2:]
    if not same_proportions((width, height), original):
        raise ValueError(
            f"the mask {path} is {width}x{height} and the clip {original[0]}x{original[1]}: their proportions differ"
        )
    mask = (fit(pixels, *size).mean(1) > 0.5).float()
    if not mask[0].any():
        raise ValueError(f"the mask {path} has nothing white in its first frame: nothing could be edited")
    return mask


def make_mask(args: argparse.Namespace, clip: Tensor, edited: Tensor, original: tuple[int, int]) -> Tensor | None:
    """The mask of an edit, [T, H, W] in 0..1, as the options want it, and said how much it lets change; None for none.

    clip: [T, 3, H, W] as the model takes it; edited: [3, H, W]; original: the clip's own width and height.
    """
    if args.mask == NONE:
        return None
    settings, size = mask_settings(args), (clip.shape[3], clip.shape[2])
    flow: Flow = lucas_kanade if args.flow_weights is None else load_raft(args.flow_weights)
    if args.mask == AUTO:
        mask = edit_mask(clip, edited, settings, flow)
    else:
        read = read_mask(Path(args.mask), len(clip), args.fps, size, original)
        if len(read) == len(clip):
            mask = soften(read, settings.grow, settings.feather)
        else:
            mask = edit_mask(clip, edited, settings, flow, read[0])
    shares = (mask > 0).float().mean((1, 2))
    say(f"the edit may show in {shares[0]:.0%} of the first frame and {shares[-1]:.0%} of the last")
    empty = [str(number) for number, share in enumerate(shares.tolist(), 1) if not share]
    if empty:
        say(f"the mask is empty in frame {', '.join(empty)}: there the source comes back as it is")
    return mask
