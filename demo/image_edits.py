"""Edits for a text-to-image model with known answers: colour, shape or background change, the motion stays.

They are the object and background edits of `text_edits`, asked for in the full captions that the model was trained on,
and scored more closely: where the object is in every frame, what stays in the pixels, and if what moves in the result
moves as it does in the true answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pipelines.evaluation.metrics import CORE, psnr
from . import captions
from . import world as W
from .captions import WORLD
from .recognition import recognise
from .text_edits import TextExample, judge, text_example

EDITS = {
    "colour": ("object", 0),
    "shape": ("object", 1),
    "background": ("background", 0),
}  # kind, variant of text_edits
# The first seeds of the sets, apart from all others of the demo.
SEEDS = {"validation": 45_000, "test": 4_500_000}
PATH_ERROR = 4.0  # pixels, half a latent's side, by which the object may be off its path on average
BORDER = 3  # pixels to each side of the object's edge in which no warp error is told: the VAE blurs edges


@dataclass(frozen=True)
class ImageEdit:
    """One edit of a clip in words, and the truth about it. T frames of H x W pixels."""

    name: str  # one of EDITS
    example: TextExample
    source_mask: Tensor  # [T, H, W] in 0..1, the object
    target_mask: Tensor  # [T, H, W] in 0..1, in the true answer

    @property
    def caption(self) -> str:
        """All that the source shows, in words."""
        return self.example.caption

    @property
    def prompt(self) -> str:
        """All that the answer shows: the caption with one word changed."""
        return captions.caption(self.example.target_words, 0)


def image_edit(seed: int, name: str, world: W.World = WORLD) -> ImageEdit:
    """One edit of the clip of a seed, which is the same for all edits. ValueError for a name that is not in EDITS."""
    if name not in EDITS:
        raise ValueError(f'the edit is "{name}"; it must be one of {", ".join(EDITS)}')
    example = text_example(seed, *EDITS[name], world)
    masks = (W.render(scene)[1][0] for scene in (example.source_scene, example.target_scene))
    return ImageEdit(name, example, *masks)


# --- scores -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """How far a result is from what was asked. Errors of the object are NaN where none is seen."""

    edited: bool  # what the prompt changes shows
    kept: bool  # all else is as in the source, the object's place in every frame too
    right: dict[str, bool]  # of each of text_edits.PROPERTIES
    colour_error: float  # RGB distance to the true answer's colour
    background_error: float  # RGB distance to the true answer's mean colour
    path_error: float  # pixels between the object's centre and its true place, mean over the frames that show one
    psnr_kept: float  # dB, to the source, where the edit may not show

    @property
    def success(self) -> bool:
        return self.edited and self.kept


def score(edit: ImageEdit, frames: Tensor) -> Score:
    """Compare a result [T, 3, H, W] in 0..1 with what was asked."""
    chosen, seen = edit.example, recognise(frames)
    judged = judge(chosen, seen)
    size = chosen.target_scene.world.size
    away = (seen.path * size / 96 - chosen.target_scene.position[0]).norm(dim=1)[seen.visible]
    path_error = float(away.mean()) * 96 / size if len(away) else math.nan
    region = W.edited_region(edit.source_mask, edit.target_mask, edit.name)
    return Score(
        edited=judged.accuracy,
        kept=judged.appearance and path_error < PATH_ERROR,
        right=judged.right,
        colour_error=judged.colour_error,
        background_error=judged.background_error,
        path_error=path_error,
        psnr_kept=psnr(frames.float().cpu(), chosen.source, 1 - region),
    )


# --- consistency ------------------------------------------------------------------------------------------------------


def flow_back(scene: W.Scene) -> Tensor:
    """The exact flow [T - 1, 2, H, W] (dx, dy in pixels) of each frame but the first to the one before it.

    It is the flow of the scene played backwards, on the object of the later frame; 0 on the background.
    """
    backwards = replace(scene, position=scene.position.flip(1), heading=scene.heading.flip(1))
    return W.optical_flow(backwards)[0].flip(0)


def _sources(flow: Tensor) -> tuple[Tensor, Tensor]:
    """Where in the frame before each pixel comes from: x and y, [T - 1, H, W] each, the first pixel's centre at 0."""
    height, width = flow.shape[-2:]
    y, x = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    return x + flow[:, 0], y + flow[:, 1]


def comparable(mask: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """Which pixels of each frame but the first show what the one before shows too, [T - 1, H, W] of bool each: on the
    object, and on the background.

    mask: [T, H, W], the object. flow: of `flow_back`. What the object has just uncovered has no counterpart, nor has
    what came in from outside; BORDER pixels to each side of the object's edge are left out.
    """

    def near(where: Tensor) -> Tensor:
        return F.max_pool2d(where[:, None].float(), 2 * BORDER + 1, stride=1, padding=BORDER)[:, 0] > 0

    inside, clear = ~near(mask <= CORE), ~near(mask > 1 - CORE)
    x, y = _sources(flow)
    height, width = mask.shape[-2:]
    known = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    return inside[1:] & known, clear[1:] & clear[:-1]


def warped(frames: Tensor, flow: Tensor) -> Tensor:
    """What each frame but the last becomes in the next one, [T - 1, 3, H, W]: read, bilinearly, where the flow
    [T - 1, 2, H, W] from the next frame back points to."""
    height, width = flow.shape[-2:]
    x, y = _sources(flow)
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1)
    return F.grid_sample(frames[:-1], grid.to(frames), mode="bilinear", padding_mode="border", align_corners=False)


def warp_error(edit: ImageEdit, frames: Tensor) -> tuple[float, float]:
    """How much a result changes from frame to frame along the true motion: the mean absolute difference, in 0..1, of
    all comparable pixels, and of the object's alone.

    frames: [T, 3, H, W] in 0..1. Where nothing is comparable it is NaN.
    """
    frames = frames.float().cpu()
    flow = flow_back(edit.example.target_scene)
    on_object, on_background = comparable(edit.target_mask, flow)
    error = (frames[1:] - warped(frames, flow)).abs().mean(1)
    return float(error[on_object | on_background].mean()), float(error[on_object].mean())
