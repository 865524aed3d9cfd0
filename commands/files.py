"""What the commands share: results checked before any work, inputs brought to a model's size, and all of it told."""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

from torch import Tensor

from ..pipelines.video import Clip, fit, nearest_size, read_video, write_video

VIDEOS = (".mp4", ".mov", ".mkv")
SAME_PROPORTIONS = 0.02  # those of an edited frame, or of a mask, may differ by this share from the clip's


def say(text: str) -> None:
    print(text, flush=True)


# --- what the user asked for ------------------------------------------------------------------------------------------


def given(args: argparse.Namespace, name: str) -> bool:
    return getattr(args, name) is not None


def named(names: Iterable[str]) -> str:
    """Names of options as they are typed."""
    return ", ".join("--" + name.replace("_", "-") for name in names)


def check_request(args: argparse.Namespace) -> None:
    """Raise ValueError for an empty --prompt, or a --guidance or --fps out of range."""
    if not args.prompt.strip():
        raise ValueError("the prompt is empty; say what the result shows")
    if args.guidance is not None and not 0 <= args.guidance < math.inf:
        raise ValueError(f"got --guidance {args.guidance}; it must be at least 0, and 1 is none")
    if args.fps is not None and args.fps < 1:
        raise ValueError(f"got --fps {args.fps}; it must be at least 1")


def frame_count(asked: int | None, own: int, stride: int = 1) -> int:
    """How many frames the result shall have: as asked, or the model's own number.

    Raises ValueError for a number that the model does not take: it must be stride n + 1.
    """
    count = own if asked is None else asked
    if count < 2:
        raise ValueError(f"got --frames {count}; a clip has at least 2")
    if (count - 1) % stride:
        below = (count - 1) // stride * stride + 1
        fitting = f"{below} or {below + stride}" if below > 1 else f"{below + stride}"
        raise ValueError(f"got --frames {count}; this model takes {stride} n + 1: {fitting} for example")
    return count


@contextmanager
def configuration_of(model: str) -> Iterator[None]:
    """Inside, files of a model are read; ValueError where there is no such model."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{model} is not a model in diffusers' layout, neither a folder nor a hub's id within reach ({error})"
        ) from error


# --- results ----------------------------------------------------------------------------------------------------------


def check_folder(folder: Path) -> None:
    """Raise ValueError for a folder that nothing could be written in, or that could not be made."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"{there} is a file, not a folder")
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise ValueError(f"nothing can be written in {there}: {error.strerror}") from error


def check_output(output: Path, inputs: Sequence[Path], force: bool, suffixes: Sequence[str] = VIDEOS) -> None:
    """Raise before any work for a result that could not be written, or that would overwrite something."""
    if output.suffix.lower() not in suffixes:
        raise ValueError(f"the output {output} must end in {', '.join(suffixes)}")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {output.parent} for the output")
    if output.is_dir():
        raise ValueError(f"the output {output} is a folder; give the name of a file")
    check_folder(output.parent)
    if output.exists() and output.resolve() in [path.resolve() for path in inputs]:
        raise ValueError(f"the output {output} is one of the inputs; give another name")
    if output.exists() and not force:
        raise FileExistsError(f"{output} exists already; --force overwrites it")


def free_name(output: Path, force: bool) -> Path:
    """The output, or where a file came there while the model worked, a name beside it."""
    while output.exists() and not force:
        output = output.with_stem(f"{output.stem}-new")
    return output


def write_result(args: argparse.Namespace, frames: Tensor, fps: Fraction, started: float, work: str) -> None:
    """Write the clip, and say where, how long it took since `started` (time.monotonic), and what work it was."""
    output = free_name(args.output, args.force)
    write_video(output, frames, fps)
    say(f"{output}: {len(frames)} frames at {float(fps):g} frames a second, {time.monotonic() - started:.0f} s, {work}")


# --- inputs -----------------------------------------------------------------------------------------------------------


def choose_size(asked: tuple[int, int] | None, width: int, height: int, area: int, multiple: int) -> tuple[int, int]:
    """Width and height of the result: as asked, or about the area, in the proportions of width x height.

    Raises ValueError where the size asked for has sides that are no multiples.
    """
    size = asked or nearest_size(width, height, area, multiple)
    if min(size) < 1 or size[0] % multiple or size[1] % multiple:
        nearest = nearest_size(*(max(1, side) for side in size), max(1, size[0] * size[1]), multiple)
        raise ValueError(
            f"got --size {size[0]}x{size[1]}; both sides must be multiples of {multiple}, "
            f"the nearest is {nearest[0]}x{nearest[1]}"
        )
    return size


def tell_reading(read: Clip, frames: int | None, fps: int | None) -> None:
    """Say what of a file was resampled, missed or trimmed. frames, fps: as the user asked, None where not."""
    if fps:
        repeated = ", which repeats frames" if fps > read.file_fps else ""
        say(f"resampled from {float(read.file_fps):g} to {fps:g} frames a second{repeated}")
    if read.uneven:
        say(f"the clip's frame rate varies; the result plays evenly at {float(read.fps):g}, or resample it with --fps")
    if frames is not None and len(read.frames) < frames:
        say(f"the clip has {len(read.frames)} frames, not the {frames} of --frames")
    if read.trimmed:
        say(f"trimmed to the first {len(read.frames)} frames; --frames takes more, --fps covers more time with as many")


def tell_length(frames: int, own: int) -> None:
    """Say where a clip has another number of frames than the model's own."""
    if frames != own:
        say(f"{frames} frames; the model was trained on {own}, other numbers may look worse")


def tell_parts(frames: int, own: int, at_once: int) -> None:
    """The same of a clip that is edited in parts or windows of at most `at_once` frames; 0 takes all of it at once."""
    if not at_once:
        tell_length(frames, own)
        if frames > own:
            say(f"--context-length {own} edits it in windows, --frames-at-once {own} in parts")
    elif at_once > own:
        say(f"{at_once} frames at once; the model was trained on {own}, more may look worse")


def same_proportions(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes (width, height) have the same proportions, up to SAME_PROPORTIONS."""
    return abs(math.log(one[0] / one[1] * other[1] / other[0])) <= SAME_PROPORTIONS


def resized(name: str, images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images [n, 3, H, W] at a size (width, height), and said where that changes them."""
    old = (images.shape[3], images.shape[2])
    if old != size:
        cropped = 1 - min(size[0] * old[1], size[1] * old[0]) / max(size[0] * old[1], size[1] * old[0])
        told = f", {cropped:.0%} is cropped" if cropped >= 0.005 else ""
        say(f"the {name} is resized from {old[0]}x{old[1]} to {size[0]}x{size[1]}{told}")
    return fit(images, *size)


def read_clip(
    path: Path, args: argparse.Namespace, count: int, area: int, multiple: int, stride: int = 1
) -> tuple[Tensor, Fraction]:
    """The clip of a file [T, 3, H, W], as long as the model can take of it and at its size, and its frames a second.

    args: of which --frames, --fps and --size count. count: at most so many frames; area, multiple: see `choose_size`;
    stride: clips have stride n + 1 frames. Raises for a file that does not open, and ValueError for too few frames.
    """
    read = read_video(path, frames=count, fps=args.fps)
    frames, height, width = len(read.frames), *read.frames.shape[2:]
    fitting = (frames - 1) // stride * stride + 1
    if fitting < 2:
        fewest = f"; this model takes {stride} n + 1" if stride > 1 else ""
        had = f"{frames} frames" if frames > 1 else "one frame"
        raise ValueError(f"{path} has {had}; a clip has at least {stride + 1}{fewest}")
    size = choose_size(args.size, width, height, area, multiple)
    tell_reading(read, args.frames, args.fps)
    if fitting < frames:
        say(f"the last {frames - fitting} of {frames} frames are left out: this model takes {stride} n + 1")
    if read.has_audio:
        say("the audio track is left out")
    return resized("clip", read.frames[:fitting], size), read.fps
