"""What a clip of the captioned world shows, read from its pixels alone.

An object is lighter than its background, which is a linear gradient: what stands out from the fitted gradient is the
object. Its path tells direction and speed; drawings of every shape, turn and size, with and without the dark band, are
compared with the mean of its pictures. Made for generated clips too, which are blurred, and may show nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from . import captions
from . import world as W

# Lengths are in pixels of a 96-pixel frame, brightness in 0..1.
FAINT = 0.08  # mean of the three channels above the background's from which a pixel may belong to an object
LEAST_AREA = 150  # pixels of an object that is there; the smallest has 740, two thirds of them outside a band
REACH = 32  # an object's pixels lie within this of its densest place: what is farther off is another one
DULL = 0.15  # saturation of a background below which it is grey
GREY_VALUE = 0.76  # brightness of a grey background, of what a coloured one with the same words has
DARK = 0.13  # brightness below which it is night
BAND_CONTRAST = 0.35  # a band is seen where the object's contrast there is below this share of the rest's
STILL = 0.5  # pixels a frame below which nothing moves, and has no direction
RADII = tuple(range(10, 27, 2))  # pixels; the nearest is enough to tell shapes apart
TURNS = 36  # headings that drawings are made of
PATCH = 65  # side of the drawings


@dataclass(frozen=True)
class Seen:
    """What a clip of T frames shows; without any object what is told of one is NaN, -1 or False."""

    present: bool  # one object in every frame
    visible: Tensor  # [T] bool: in which frames there is one
    rgb: Tensor  # [3] the object's colour, 0..1
    colour: int  # the nearest of world.COLOURS
    shape: int  # index into world.SHAPES
    radius: float  # pixels
    likeness: float  # at most 1: the share of the picture that the best drawing of a shape explains
    path: Tensor  # [T, 2] centres (x, y) in pixels, NaN where there is no object
    heading: float  # radians, where it moves; NaN where it stands still
    direction: int  # the nearest of captions.DIRECTIONS, -1 where it stands still
    speed: float  # pixels a frame, at 96 pixels
    background: Tensor  # [3] mean colour, 0..1
    hue: int  # the nearest of captions.HUES
    night: bool
    striped: bool

    @property
    def quick(self) -> int:
        """The nearest of captions.SPEEDS: the limit lies between the two."""
        return int(self.speed > (captions.SLOW[1] + captions.QUICK[0]) / 2)


# --- background and object --------------------------------------------------------------------------------------------


def _gradient(frames: Tensor) -> Tensor:
    """The linear gradient of each frame, [T, 3, H, W], fitted to the three quarters of pixels that it fits best."""
    count, _, height, width = frames.shape
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    basis = torch.stack([torch.ones_like(x), x, y], -1).flatten(0, 1).double()  # [pixels, 3]
    pixels = frames.flatten(2).movedim(1, 2).double()  # [T, pixels, 3]
    keep = torch.ones(pixels.shape[:2], dtype=torch.float64)
    for _ in range(8):
        weighted = keep[..., None] * basis
        fitted = basis @ torch.linalg.solve(weighted.mT @ basis, weighted.mT @ pixels)
        error = (pixels - fitted).abs().amax(-1)
        keep = (error <= error.quantile(0.75, dim=1, keepdim=True)).double()
    return fitted.movedim(2, 1).unflatten(2, (height, width)).to(frames)


def _masks(light: Tensor) -> Tensor:
    """The object's pixels in each frame, [T, H, W] of 0 and 1. light: [T, H, W], brightness above the background's.

    The edge lies at half of the object's median contrast, so that a blur moves no border.
    """
    faint = light > FAINT
    contrast = light[faint].median() if faint.any() else light.new_tensor(1.0)
    mask = (light > 0.5 * contrast).float()
    density = F.avg_pool2d(mask[:, None], 31, stride=1, padding=15, count_include_pad=False).flatten(1)
    width = light.shape[-1]
    best = density.argmax(1)
    y, x = torch.meshgrid(torch.arange(light.shape[-2]), torch.arange(width), indexing="ij")
    away = (x - (best % width)[:, None, None]) ** 2 + (y - (best // width)[:, None, None]) ** 2
    return mask * (away <= REACH**2)


def _centres(mask: Tensor) -> Tensor:
    """Centroids (x, y) of masks [T, H, W] in pixels, [T, 2]; NaN where a mask is empty."""
    y, x = torch.arange(mask.shape[-2]) + 0.5, torch.arange(mask.shape[-1]) + 0.5
    total = mask.sum((1, 2))
    return torch.stack([(mask.sum(1) * x).sum(1), (mask.sum(2) * y).sum(1)], 1) / total[:, None]


def _motion(path: Tensor) -> tuple[float, float]:
    """Heading in radians and speed in pixels a frame of the straight line through a path [T, 2].

    NaN where the path is known in less than two frames, and the heading of what stands still.
    """
    time = torch.arange(len(path))[known := ~path.isnan().any(1)].double()
    if len(time) < 2:
        return math.nan, math.nan
    time = time - time.mean()
    vx, vy = ((time[:, None] * path[known].double()).sum(0) / time.square().sum()).tolist()
    speed = math.hypot(vx, vy)
    return math.atan2(vy, vx) if speed >= STILL else math.nan, speed


# --- shape ------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _drawings() -> tuple[Tensor, Tensor, Tensor]:
    """Every drawing as orthonormal parts: [n, 3, PATCH^2] of the object, its nose and its band, centred on what is
    light; their shape, band and radius, [n, 3]; and the plain parts, [n, 3, PATCH^2]."""
    half = PATCH // 2
    y, x = torch.meshgrid(*[torch.arange(-half, half + 1.0)] * 2, indexing="ij")
    parts, told = [], []
    for shape in range(len(W.SHAPES)):
        for band in (0, 1):
            for radius in RADII:
                offset = _light_centre(shape, radius) if band else 0.0
                heading = torch.arange(TURNS)[:, None, None] * (2 * math.pi / TURNS)
                cos, sin = heading.cos(), heading.sin()
                u, v = (cos * x + sin * y + offset) / radius, (cos * y - sin * x) / radius
                parts.append(torch.stack(_parts(shape, band, radius, u, v), 1).flatten(2))
                told.append(torch.tensor([shape, band, radius]).expand(TURNS, 3))
    plain, told = torch.cat(parts), torch.cat(told)
    return _orthonormal(plain), told, plain


def _parts(shape: int, band: int, radius: float, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How far the object, its nose and its band cover each pixel; u, v: the object's own coordinates."""
    body = W.distance(torch.tensor(shape), u, v) * radius
    nose = W.coverage((torch.sqrt((u - 0.5) ** 2 + v**2 + 1e-8) - 0.26) * radius)
    dark = W.coverage(torch.maximum(body, ((u + 0.3).abs() - 0.22) * radius)) * band
    return W.coverage(body), nose, dark


def _light_centre(shape: int, radius: float) -> float:
    """Where the centroid of what is light lies along the heading, in pixels, of an object with a band."""
    half = PATCH // 2
    y, x = torch.meshgrid(*[torch.arange(-half, half + 1.0)] * 2, indexing="ij")
    body, _, dark = _parts(shape, 1, radius, x / radius, y / radius)
    light = (body - dark).clamp(min=0)
    return float((light * x).sum() / light.sum())


def _orthonormal(parts: Tensor) -> Tensor:
    """The parts [n, k, pixels] made orthonormal, in order; a part that is empty stays so."""
    done: list[Tensor] = []
    for part in parts.unbind(1):
        for other in done:
            part = part - (part * other).sum(1, keepdim=True) * other
        norm = part.norm(dim=1, keepdim=True)
        done.append(torch.where(norm > 1e-3, part / norm.clamp(min=1e-3), torch.zeros_like(part)))
    return torch.stack(done, 1)


def _portrait(excess: Tensor, path: Tensor) -> Tensor:
    """The object's mean picture above its background, [3, PATCH^2], each frame shifted to its centre."""
    height, width = excess.shape[-2:]
    reach = torch.arange(PATCH) - PATCH // 2
    x, y = path[:, :1] + reach, path[:, 1:] + reach  # [T, PATCH], pixels
    grid_x = (2 * x / width - 1)[:, None].expand(-1, PATCH, -1)
    grid_y = (2 * y / height - 1)[:, :, None].expand(-1, -1, PATCH)
    pieces = F.grid_sample(excess, torch.stack([grid_x, grid_y], -1).to(excess), align_corners=False)
    return pieces.mean(0).flatten(1)


def _compare(portrait: Tensor) -> tuple[int, float, float, bool]:
    """Shape, radius, likeness and whether a band is seen, of a portrait [3, PATCH^2]."""
    orthonormal, told, plain = _drawings()
    explained = (orthonormal @ portrait.T).square().sum((1, 2))
    bands = told[:, 1] == 1
    best = int(torch.where(bands, -1.0, explained).argmax())
    banded = int(torch.where(bands, explained, -1.0).argmax())
    body, _, band = torch.linalg.lstsq(plain[banded].T, portrait.T).solution.mean(1).tolist()
    striped = body > 0 and body + band < BAND_CONTRAST * body
    chosen = banded if striped else best
    shape, _, radius = told[chosen].tolist()
    likeness = float(explained[chosen] / portrait.square().sum().clamp(min=1e-6))
    return int(shape), radius, likeness, striped


# --- the whole --------------------------------------------------------------------------------------------------------


def _backdrop(background: Tensor) -> tuple[int, bool]:
    """Hue and night of a background's mean colour [3]."""
    low, high = float(background.min()), float(background.max())
    grey = high - low < DULL * max(high, 1e-3)
    hue = captions.HUES.index("grey") if grey else int(background.argmax())
    return hue, high < DARK * (GREY_VALUE if grey else 1.0)


@torch.no_grad()
def recognise(frames: Tensor) -> Seen:
    """Read a clip. frames: [T, 3, H, W] in 0..1, square and of any size (lengths are told at 96 pixels).

    Raises ValueError for frames of another shape.
    """
    if frames.ndim != 4 or frames.shape[1] != 3 or frames.shape[2] != frames.shape[3]:
        raise ValueError(f"got frames of shape {tuple(frames.shape)}; the world's clips are square: [T, 3, size, size]")
    frames = frames.float().cpu()
    if frames.shape[-1] != 96:
        frames = F.interpolate(frames, size=96, mode="bilinear", antialias=True)
    gradient = _gradient(frames)
    excess = frames - gradient
    mask = _masks(excess.mean(1))
    visible = mask.sum((1, 2)) >= LEAST_AREA
    path = torch.where(visible[:, None], _centres(mask), math.nan)
    background = gradient.mean((0, 2, 3))
    hue, night = _backdrop(background)
    rgb, colour = torch.full((3,), math.nan), -1
    shape, radius, likeness, striped = -1, math.nan, math.nan, False
    if visible.any():
        body = frames.movedim(1, -1)[(mask > 0) & visible[:, None, None]]
        rgb = body.median(0).values
        colour = int((W.palette(captions.WORLD) - rgb).norm(dim=1).argmin())
        shape, radius, likeness, striped = _compare(_portrait(excess[visible], path[visible]))
    heading, speed = _motion(path)
    direction = -1 if math.isnan(heading) else round(heading / (math.pi / 2)) % len(captions.DIRECTIONS)
    return Seen(
        present=bool(visible.all()),
        visible=visible,
        rgb=rgb,
        colour=colour,
        shape=shape,
        radius=radius,
        likeness=likeness,
        path=path,
        heading=heading,
        direction=direction,
        speed=speed,
        background=background,
        hue=hue,
        night=night,
        striped=striped,
    )
