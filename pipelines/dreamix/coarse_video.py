"""A coarse video from one picture, for the general editor to animate (Dreamix, arXiv 2302.01329).

"The input image is duplicated and transformed using perspective transformations, synthesizing a coarse video with some
camera motion" (the paper's project page, whose figure shrinks a photograph inside a white canvas). The parameters are
not told: the moves, their amounts and the easing are ours.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

FILLS = {"white": "fill", "edge": "border", "reflect": "reflection"}  # to kornia's words
EASINGS = ("linear", "smooth")
FARTHEST = 4.0  # of a move's amount, either way
FIELD_OF_VIEW = 50.0  # degrees, of the longer side: how strong the perspective of a turn is (ours: a normal lens)


@dataclass(frozen=True)
class View:
    """How the picture lies in the frame. The default shows it as it is.

    zoom: its size, above 0; below 1 it shrinks inside the canvas. x, y: its shift to the right and down, in widths and
    heights of the frame. yaw, pitch, roll: its turn, degrees: right edge away, top edge away, clockwise.
    """

    zoom: float = 1.0
    x: float = 0.0
    y: float = 0.0
    yaw: float = 0.0
    pitch: float = 0.0
    roll: float = 0.0


STILL = "replicate"
# Each move from the picture as it is to here, at amount 1.
MOVES = {
    STILL: View(),
    "zoom in": View(zoom=1.4),
    "zoom out": View(zoom=0.7),
    "pan left": View(x=0.25),
    "pan right": View(x=-0.25),
    "pan up": View(y=0.25),
    "pan down": View(y=-0.25),
    "turn left": View(yaw=-25.0),
    "turn right": View(yaw=25.0),
    "tilt": View(pitch=25.0),
    "roll": View(roll=15.0),
}


def move(name: str, amount: float = 1.0) -> View:
    """Where a named move ends. amount: 0 does not move, 1 is the move as listed, 2 twice as far; zoom goes by powers.

    Raises ValueError for another name, or an amount beyond FARTHEST.
    """
    if name not in MOVES:
        raise ValueError(f'the move is "{name}"; it must be one of {", ".join(MOVES)}')
    if not abs(amount) <= FARTHEST:
        raise ValueError(f"the amount of the move is {amount}; it must be {-FARTHEST:g} to {FARTHEST:g}")
    return between(View(), MOVES[name], amount)


def between(start: View, end: View, share: float) -> View:
    """The view at a share of the way; the zoom runs geometrically, so that its speed looks even."""
    first, *a = astuple(start)
    last, *b = astuple(end)
    return View(first * (last / first) ** share, *(x + (y - x) * share for x, y in zip(a, b)))


def _rotation(yaw: float, pitch: float, roll: float) -> Tensor:
    """Roll, then pitch, then yaw, of a picture seen along +z (x to the right, y down)."""
    (sy, cy), (sp, cp), (sr, cr) = ((math.sin(math.radians(a)), math.cos(math.radians(a))) for a in (yaw, pitch, roll))
    about_y = torch.tensor([[cy, 0, -sy], [0, 1, 0], [sy, 0, cy]], dtype=torch.float64)
    about_x = torch.tensor([[1, 0, 0], [0, cp, sp], [0, -sp, cp]], dtype=torch.float64)
    about_z = torch.tensor([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]], dtype=torch.float64)
    return about_y @ about_x @ about_z


def homography(view: View, height: int, width: int) -> Tensor:
    """The map of the picture's pixels (x, y, 1) to the frame's, [3, 3] in float64.

    A pinhole camera before the picture's plane: p = f (R X + t) / z, with the focal length f of FIELD_OF_VIEW and the
    plane f away, so that a picture that is not turned keeps its size; then the zoom, about the frame's centre.
    Raises ValueError for a turn that shows the picture's edge or back (no corner comes behind the camera before), or
    for a zoom that is not above 0.
    """
    if not view.zoom > 0:
        raise ValueError(f"the zoom is {view.zoom}; it must be above 0 (1 keeps the size)")
    turn = _rotation(view.yaw, view.pitch, view.roll)
    if turn[2, 2] < 0.05:
        raise ValueError(
            f"a yaw of {view.yaw} and a pitch of {view.pitch} show the picture's edge or back: turn it less"
        )
    focal = max(height, width) / (2 * math.tan(math.radians(FIELD_OF_VIEW / 2)))
    x, y = (width - 1) / 2, (height - 1) / 2
    to_centre = torch.tensor([[1, 0, -x], [0, 1, -y], [0, 0, 1]], dtype=torch.float64)
    projection = torch.eye(3, dtype=torch.float64)  # of the centred picture, in homogeneous coordinates
    projection[:, :2] = turn[:, :2]
    projection[2, :2] /= focal
    x, y = x + view.x * width, y + view.y * height
    to_frame = torch.tensor([[view.zoom, 0, x], [0, view.zoom, y], [0, 0, 1]], dtype=torch.float64)
    return to_frame @ projection @ to_centre


def coarse_video(
    picture: Tensor,
    frames: int,
    end: View,
    start: View = View(),
    fill: str = "white",
    easing: str = "smooth",
) -> Tensor:
    """The picture repeated along a move of the camera: [frames, 3, H, W] in 0..1; frame 0 is the view at the start.

    picture: [3, H, W] in 0..1. start, end: the views of the first and the last frame; where a view is the default the
    frame is the picture, bit for bit. fill: what lies beyond the picture's edge, "white" (the paper's figure), "edge"
    or "reflect". easing: "linear", or "smooth" (3 t^2 - 2 t^3: starts and stops gently). Pixels are read bilinearly,
    without a filter for far zooms out: the corruption that follows has one.
    Raises ValueError for fewer than two frames, another fill or easing, or a view that cannot be drawn.
    """
    if picture.ndim != 3 or picture.shape[0] != 3 or picture.numel() == 0:
        raise ValueError(f"got a picture of shape {tuple(picture.shape)}; it must be [3, H, W]")
    if frames < 2:
        raise ValueError(f"got {frames} frames; a video needs at least 2")
    if fill not in FILLS:
        raise ValueError(f'the fill is "{fill}"; it must be one of {", ".join(FILLS)}')
    if easing not in EASINGS:
        raise ValueError(f'the easing is "{easing}"; it must be one of {", ".join(EASINGS)}')
    from kornia.geometry.transform import warp_perspective

    height, width = picture.shape[1:]
    time = torch.linspace(0, 1, frames, dtype=torch.float64)
    time = time if easing == "linear" else 3 * time**2 - 2 * time**3
    views = [between(start, end, float(t)) for t in time]
    maps = torch.stack([homography(view, height, width) for view in views])
    still = torch.tensor([view == View() for view in views], device=picture.device)
    video = warp_perspective(
        picture.float().expand(frames, -1, -1, -1),
        maps.to(picture.device, torch.float32),
        (height, width),
        padding_mode=FILLS[fill],
        align_corners=True,
        fill_value=torch.ones(3, device=picture.device),
    )
    return torch.where(still[:, None, None, None], picture, video.clamp(0, 1).to(picture.dtype))
