"""Clips and pictures on disk, and how they are brought to the size that a model takes.

In memory a clip is [T, 3, H, W] and a picture [3, H, W], float in 0..1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .files import written_whole

BT709 = 1  # of ISO/IEC 23091-4: colorspace, primaries and transfer alike
UNEVEN = 0.5  # frames' durations may differ by this share of the mean one before a clip counts as uneven


@dataclass(frozen=True)
class Clip:
    """Frames of a video file."""

    frames: Tensor  # [T, 3, H, W] in 0..1, upright, square pixels
    fps: Fraction  # of these frames
    file_fps: Fraction  # of the file
    has_audio: bool
    trimmed: bool  # the file goes on after the last frame
    uneven: bool = False  # the file shows its frames for different lengths of time


def check_frames(frames: Tensor, multiple: int = 8, name: str = "clip", least: int = 1) -> None:
    """ValueError unless frames are [T >= least, 3, H, W] in 0..1 with both sides multiples of what the model takes."""
    if frames.ndim != 4 or frames.shape[1] != 3 or len(frames) == 0:
        shape = tuple(frames.shape)
        raise ValueError(f"got a {name} of shape {shape}; it must be [frames, 3, height, width], not empty")
    height, width = frames.shape[-2:]
    if height < multiple or width < multiple or height % multiple or width % multiple:
        raise ValueError(
            f"got frames of {width}x{height}; both sides must be multiples of {multiple}: resize or crop the clip, to "
            f"{max(1, width // multiple) * multiple}x{max(1, height // multiple) * multiple} for example"
        )
    check_pixels(frames, name)
    if len(frames) < least:
        raise ValueError(f"got {len(frames)} frames; a {name} has at least {least}")


def check_pixels(pixels: Tensor, name: str) -> None:
    """ValueError unless pixels are finite floating point values in 0..1."""
    if not pixels.is_floating_point():
        raise ValueError(f"the {name} is of {pixels.dtype}; pixels must be floating point, 0 to 1: divide bytes by 255")
    if not torch.isfinite(pixels).all():
        raise ValueError(f"the {name} holds NaN or infinite values")
    if pixels.min() < -1e-3 or pixels.max() > 1 + 1e-3:
        low, high = float(pixels.min()), float(pixels.max())
        raise ValueError(f"the {name} has values from {low:.3g} to {high:.3g}; pixels must be 0 to 1")


def _decode(container, stream, rate: Fraction) -> Iterator[tuple[float, np.ndarray]]:
    """Time in seconds from the first frame, and pixels [H, W, 3] in 0..255, of each frame in turn."""
    stream.thread_type = "AUTO"
    start = None
    for index, frame in enumerate(container.decode(stream)):
        time = frame.time if frame.time is not None else float(index / rate)
        start = time if start is None else start
        aspect = float(stream.sample_aspect_ratio or 1)
        pixels = frame.to_ndarray(format="rgb24", width=max(1, round(frame.width * aspect)), height=frame.height)
        yield time - start, np.rot90(pixels, round(frame.rotation / 90))


def _timed(source: Iterator[tuple[float, np.ndarray]], times: list[float]) -> Iterator[np.ndarray]:
    """The frames as they are; their times are noted."""
    for time, pixels in source:
        times.append(time)
        yield pixels


def _resample(source: Iterator[tuple[float, np.ndarray]], rate: Fraction, fps: float) -> Iterator[np.ndarray]:
    """The frame that a player shows at each instant, 1 / fps seconds apart."""
    shown, time, count = None, 0.0, 0
    for time, pixels in source:
        # 1 ms forgives rounded time stamps.
        while shown is not None and count / fps < time - 1e-3:
            yield shown
            count += 1
        shown = pixels
    while shown is not None and count / fps < time + 1 / rate - 1e-3:
        yield shown
        count += 1


def read_video(path: str | Path, frames: int | None = None, fps: float | None = None) -> Clip:
    """Read a video file, as a player shows it (rotation and pixel aspect applied; its audio is left out).

    frames: read at most so many. fps: instead of all frames take so many a second, at each instant the one that a
    player shows; frames are repeated where the file has fewer. Raises FileNotFoundError, and ValueError where the file
    holds no video or does not decode.
    """
    import av

    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path} holds no video")
            stream = container.streams.video[0]
            rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
            decoded = _decode(container, stream, rate)
            times: list[float] = []
            source = _resample(decoded, rate, fps) if fps else _timed(decoded, times)
            kept = list(islice(source, frames))
            trimmed = next(source, None) is not None
            has_audio = bool(container.streams.audio)
    except av.error.FFmpegError as error:
        raise ValueError(f"{path} does not decode as a video: {error.strerror}") from error
    if not kept:
        raise ValueError(f"{path} holds no frames")
    if len({pixels.shape for pixels in kept}) > 1:
        raise ValueError(f"the frames of {path} change their size; convert it to one size first")
    pixels = torch.from_numpy(np.stack(kept)).permute(0, 3, 1, 2).float() / 255
    steps = np.diff(times)
    uneven = len(steps) > 1 and float(steps.max() - steps.min()) > UNEVEN / float(rate)
    return Clip(pixels, Fraction(fps).limit_denominator(65535) if fps else rate, rate, has_audio, trimmed, uneven)


def write_video(path: str | Path, frames: Tensor, fps: float | Fraction, chroma: str = "420", crf: int = 12) -> None:
    """Write a clip as H.264, tagged BT.709.

    frames: [T, 3, H, W] in 0..1 (clamped). chroma: "420" plays everywhere, with half the resolution of colour and even
    sides only; "444" keeps small coloured objects, but browsers do not play it. crf: 0 is the best, 12 looks lossless.
    Equal frames make equal files. A file that is there already is replaced only by a whole new one.
    Raises ValueError for another shape, another chroma or an odd side.
    """
    import av

    if frames.ndim != 4 or frames.shape[1] != 3 or not len(frames):
        raise ValueError(f"got frames of shape {tuple(frames.shape)}; a clip is [T, 3, H, W]")
    if chroma not in ("420", "444"):
        raise ValueError(f'chroma is "{chroma}"; it must be "420" or "444"')
    height, width = frames.shape[2:]
    if chroma == "420" and (height % 2 or width % 2):
        raise ValueError(f"got frames of {width}x{height}; H.264 with 4:2:0 chroma takes even sides: crop a pixel")
    with written_whole(Path(path)) as partial, av.open(partial, "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(65535))
        stream.width, stream.height, stream.pix_fmt = width, height, f"yuv{chroma}p"
        # x264's mbtree reads memory that nobody wrote: with it equal clips now and then made other files.
        stream.options = {"crf": str(crf), "preset": "slow", "x264-params": "mbtree=0"}
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = context.color_range = BT709
        for picture in _to_bytes(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(frame.reformat(format=stream.pix_fmt, dst_colorspace=BT709)))
        container.mux(stream.encode(None))


def _to_bytes(frames: Tensor) -> np.ndarray:
    """[..., 3, H, W] in 0..1 to [..., H, W, 3] in 0..255."""
    return (
        (frames.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).movedim(-3, -1).cpu().contiguous().numpy()
    )


def read_image(path: str | Path) -> Tensor:
    """Read a picture, upright: [3, H, W] in 0..1. What is transparent is laid on black.

    Raises FileNotFoundError, and ValueError where the file is not a picture.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
            if picture.mode.startswith("I;16") or picture.mode == "I":  # 16-bit grey
                grey = torch.from_numpy(np.asarray(picture).astype(np.float32) / 65535)
                return grey.clamp(0, 1).expand(3, -1, -1).clone()
            rgba = picture.convert("RGBA")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} does not open as a picture") from error
    pixels = torch.from_numpy(np.array(rgba)).permute(2, 0, 1).float() / 255
    return pixels[:3] * pixels[3:]


def write_image(path: str | Path, picture: Tensor) -> None:
    """Write a picture [3, H, W] in 0..1; the suffix says in which format."""
    from PIL import Image

    Image.fromarray(_to_bytes(picture)).save(path)


def nearest_size(width: int, height: int, area: int, multiple: int) -> tuple[int, int]:
    """The sides, multiples of `multiple`, with about the proportions of width x height and about `area` pixels.

    Proportions count four times as much as the area. Raises ValueError for a size or an area below one pixel.
    """
    if min(width, height, area, multiple) < 1:
        raise ValueError(f"got {width}x{height}, {area} pixels, multiples of {multiple}; all must be at least 1")
    sides = range(multiple, 2 * max(multiple, area // multiple) + 1, multiple)

    def cost(size: tuple[int, int]) -> float:
        w, h = size
        return abs(math.log(w * height / (h * width))) + 0.25 * abs(math.log(w * h / area))

    return min(((w, h) for w in sides for h in sides if w * h <= 2 * max(area, multiple**2)), key=cost)


def fit(images: Tensor, width: int, height: int) -> Tensor:
    """Scale images [n, 3, H, W] to cover width x height, keeping their proportions, and crop what stands out evenly."""
    scale = max(width / images.shape[3], height / images.shape[2])
    rows, columns = max(height, round(images.shape[2] * scale)), max(width, round(images.shape[3] * scale))
    if (rows, columns) != tuple(images.shape[2:]):
        images = interpolate(images, size=(rows, columns), mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (rows - height) // 2, (columns - width) // 2
    return images[:, :, top : top + height, left : left + width]


def contact_sheet(rows: dict[str, Tensor], scale: int = 1, gap: int = 4) -> Tensor:
    """One picture [3, H, W] of clips of one shape below each other, a label above each row.

    rows: label -> [T, 3, H, W]. scale: each pixel becomes scale x scale pixels. Raises ValueError for clips of
    different shapes.
    """
    from PIL import Image, ImageDraw, ImageFont

    shapes = {tuple(clip.shape) for clip in rows.values()}
    if len(shapes) != 1:
        raise ValueError(f"got clips of shapes {sorted(shapes)}; the rows of a sheet are of one shape")
    frames, _, height, width = shapes.pop()
    height, width, letters = height * scale, width * scale, 18
    line = letters + 2 * gap + height + gap
    sheet = Image.new("RGB", (gap + frames * (width + gap), gap + len(rows) * line), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(letters)
    for row, (label, clip) in enumerate(rows.items()):
        top = gap + row * line
        draw.text((gap, top), label, fill="black", font=font)
        for column, pixels in enumerate(_to_bytes(clip)):
            enlarged = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (gap + column * (width + gap), top + letters + 2 * gap))
    return torch.from_numpy(np.array(sheet)).permute(2, 0, 1).float() / 255
