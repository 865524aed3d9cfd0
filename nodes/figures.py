"""Pictures that the checks give out: rows of frames with captions, curves, a matrix. Drawn with Pillow."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

WHITE, INK, FAINT = (255, 255, 255), (40, 40, 40), (215, 215, 215)
COLOURS = ((31, 119, 180), (214, 90, 20), (44, 140, 60))
FONT_SIZE, SMALL, LINE, MARGIN = 13, 11, 18, 8
CELL = 160  # widest picture of a frame, pixels
MOST_FRAMES = 8

Canvas = tuple[Image.Image, ImageDraw.ImageDraw]


def _canvas(width: int, height: int) -> Canvas:
    picture = Image.new("RGB", (width, height), WHITE)
    return picture, ImageDraw.Draw(picture)


def _write(
    draw: ImageDraw.ImageDraw,
    x: float,
    y: float,
    text: str,
    colour: tuple[int, int, int] = INK,
    size: int = FONT_SIZE,
) -> None:
    draw.text((x, y), text, fill=colour, font=ImageFont.load_default(size))


def to_tensor(picture: Image.Image) -> Tensor:
    """A picture as the host's IMAGE, [1, H, W, 3] in 0..1."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)[None]


def _to_picture(frame: Tensor) -> Image.Image:
    return Image.fromarray((frame.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())


def contact_sheet(rows: Sequence[tuple[str, Tensor, Sequence[str]]]) -> Image.Image:
    """Rows of (title, frames [T, H, W, 3] in 0..1, a caption a frame); at most MOST_FRAMES, spread over the clip."""
    count, height, width = rows[0][1].shape[:3]
    shown = [round(i) for i in np.linspace(0, count - 1, min(count, MOST_FRAMES))]
    scale = CELL / max(width, CELL // 2)
    cell_width, cell_height = round(width * scale), max(1, round(height * scale))
    step = cell_width + MARGIN
    row_height = 2 * LINE + cell_height + MARGIN
    picture, draw = _canvas(MARGIN + step * len(shown), MARGIN + row_height * len(rows))
    for row, (title, frames, captions) in enumerate(rows):
        top = MARGIN + row * row_height
        _write(draw, MARGIN, top, title)
        for column, frame in enumerate(shown):
            left = MARGIN + column * step
            cell = _to_picture(frames[frame]).resize((cell_width, cell_height), Image.Resampling.BILINEAR)
            picture.paste(cell, (left, top + LINE))
            _write(draw, left, top + LINE + cell_height, captions[frame])
    return picture


def curves(
    title: str,
    axis: str,
    lines: Sequence[tuple[str, Tensor]],
    to_one: bool = True,
    width: int = 480,
    height: int = 300,
) -> Image.Image:
    """Curves over whole numbers with a legend: (name, values [n]). to_one: up to 1 at least, else as far as they go."""
    picture, draw = _canvas(width, height)
    left, top, right, bottom = 52, 2 * LINE + MARGIN, width - MARGIN, height - 2 * LINE - MARGIN
    everything = torch.cat([values.double() for _, values in lines])
    low, high = min(0.0, float(everything.min())), max(1.0 if to_one else 1e-6, float(everything.max()))
    _write(draw, left, MARGIN // 2, title)
    for mark in np.linspace(low, high, 5):
        y = bottom - (mark - low) / (high - low) * (bottom - top)
        draw.line((left, y, right, y), fill=FAINT)
        _write(draw, MARGIN, y - LINE / 2, f"{mark:.2f}" if high >= 0.2 else f"{mark:.3f}")
    count = max(len(values) for _, values in lines)
    across = (right - left - 2 * MARGIN) / max(1, count - 1)
    for i in range(0, count, max(1, count // 10)):
        _write(draw, left + MARGIN + i * across - 4, bottom + 2, str(i + 1))
    _write(draw, left, height - LINE - 2, axis)
    for number, (name, values) in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        points = [
            (left + MARGIN + i * across, bottom - (float(v) - low) / (high - low) * (bottom - top))
            for i, v in enumerate(values)
        ]
        if len(points) > 1:
            draw.line(points, fill=colour, width=2)
        for x, y in points:
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
        _write(draw, left + number * (right - left) / len(lines), LINE + MARGIN // 2, name, colour)
    return picture


def trained(losses: Sequence[float]) -> bool:
    """Whether a loss was computed at all: it is NaN in every step where its share was 0."""
    return not all(math.isnan(value) for value in losses)


def loss_curves(losses: dict[str, Sequence[float]], most: int = 60) -> Image.Image:
    """The losses of a training by name, those that were computed; more than `most` steps are drawn as means of some."""
    lines = []
    for name, values in losses.items():
        if trained(values):
            pieces = torch.tensor(values).tensor_split(min(most, len(values)))
            lines.append((name, torch.stack([piece.mean() for piece in pieces])))
    steps = max(len(values) for values in losses.values())
    return curves("loss", f"{steps} steps", lines, to_one=False)


def bars(title: str, names: Sequence[str], measures: dict[str, Sequence[float]], width: int = 560) -> Image.Image:
    """A row a name with a bar for each measure, all to one scale, and its value."""
    thick, gap = 9, 8
    row = len(measures) * (thick + 2) + gap
    top, left, right = 2 * LINE + MARGIN, 150, width - 60
    picture, draw = _canvas(width, top + row * len(names) + MARGIN)
    most = max(max(values) for values in measures.values()) or 1.0
    _write(draw, MARGIN, MARGIN // 2, title)
    for number, (name, values) in enumerate(measures.items()):
        colour = COLOURS[number % len(COLOURS)]
        _write(draw, left + number * (right - left) / len(measures), LINE + MARGIN // 2, name, colour)
        for index, value in enumerate(values):
            y = top + index * row + number * (thick + 2)
            end = left + (right - left) * value / most
            draw.rectangle((left, y, max(left + 1, end), y + thick - 1), fill=colour)
            _write(draw, end + 4, y - 4, f"{value:.3f}")
    for index, name in enumerate(names):
        _write(draw, MARGIN, top + index * row + (row - gap - LINE) // 2, name)
    return picture


def shaded_table(
    title: str,
    names: Sequence[str],
    columns: Sequence[str],
    measures: dict[str, Sequence[Sequence[float]]],
    width: int = 560,
) -> Image.Image:
    """A row a name with the value in each column, measure beside measure, shaded up to the measure's largest value."""
    top, left, side = 3 * LINE + MARGIN // 2, 150, (width - 150) / len(measures)
    across = (side - MARGIN) / len(columns)
    picture, draw = _canvas(width, top + LINE * len(names) + MARGIN)
    _write(draw, MARGIN, MARGIN // 2, title)
    for number, (measure, rows) in enumerate(measures.items()):
        start, colour = left + number * side, COLOURS[number % len(COLOURS)]
        most = max(max(row) for row in rows) or 1.0
        _write(draw, start, LINE + MARGIN // 2, measure, colour)
        for column, label in enumerate(columns):
            x = start + column * across
            _write(draw, x + 2, 2 * LINE + MARGIN // 2, label, size=SMALL)
            for index, row in enumerate(rows):
                y, share = top + index * LINE, 0.7 * row[column] / most  # values stay legible on the darkest
                fill = tuple(round(255 - share * (255 - c)) for c in colour)
                draw.rectangle((x, y, x + across - 2, y + LINE - 2), fill=fill)
                _write(draw, x + 2, y + 2, f"{row[column]:{'.4f' if row[column] < 10 else '.4g'}}", size=SMALL)
    for index, name in enumerate(names):
        _write(draw, MARGIN, top + index * LINE, name)
    return picture


def matrix(title: str, axis: str, values: Tensor, size: int = 300) -> Image.Image:
    """A square matrix of values from -1 (blue) over 0 (white) to 1 (red)."""
    picture, draw = _canvas(size, size)
    side = size - 3 * LINE
    v = values.clamp(-1, 1).float()
    colour = torch.stack([1 + v.clamp(max=0), 1 - v.abs(), 1 - v.clamp(min=0)], -1)
    picture.paste(_to_picture(colour.flip(0)).resize((side, side), Image.Resampling.NEAREST), (MARGIN, int(1.5 * LINE)))
    _write(draw, MARGIN, MARGIN // 2, title)
    _write(draw, MARGIN, size - LINE - 2, axis)
    return picture


def stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures one below the other."""
    picture, _ = _canvas(max(p.width for p in pictures), sum(p.height for p in pictures))
    top = 0
    for part in pictures:
        picture.paste(part, (0, top))
        top += part.height
    return picture


def side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one height next to each other."""
    picture, _ = _canvas(sum(p.width for p in pictures), max(p.height for p in pictures))
    left = 0
    for part in pictures:
        picture.paste(part, (left, 0))
        left += part.width
    return picture
