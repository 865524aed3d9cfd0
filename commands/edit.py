"""`rewind edit`: the edit of a clip's first frame, carried through the clip by Videoshop."""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from torch import Generator, Tensor

from ..pipelines.video import read_image, read_video, write_video
from ..pipelines.videoshop.settings import DEFAULT, PAPER, REFERENCE, VideoshopSettings
from .files import check_output, choose_size, free_name, resized, say, tell_length, tell_reading
from .masks import check_mask_options, make_mask

PRESETS = {"default": DEFAULT, "paper": PAPER, "reference": REFERENCE}
SAME_PROPORTIONS = 0.02  # the edited frame's may differ by this share from the clip's


@dataclass(frozen=True)
class ModelFacts:
    """What must be known of a model before it is loaded."""

    frames: int  # it was trained on
    area: int  # pixels of the frames it was trained on
    multiple: int  # both sides must be multiples of it


@dataclass(frozen=True)
class EditJob:
    """An edit with all its input read and checked."""

    clip: Tensor  # [T, 3, H, W], at the model's size
    edited: Tensor  # [3, H, W]
    fps: Fraction
    settings: VideoshopSettings
    output: Path
    force: bool  # overwrite it
    model: str | None
    seed: int
    mask: Tensor | None  # [T, H, W], where the edit may show
    keep_pixels: bool


def model_facts(model: str | None) -> ModelFacts:
    """Read them from the UNet's configuration, of a folder or on the hub; no weights are read.

    Raises ValueError where there is no such model, or one of another kind.
    """
    from ..demo.models import ImageToVideoConfig

    if model is None:
        own = ImageToVideoConfig()
        return ModelFacts(own.frames, own.size**2, 8 * 2 ** (len(own.unet_channels) - 1))
    from ..pipelines.videoshop.pipeline import unet_config

    try:
        config = unet_config(model)
    except OSError as error:
        raise ValueError(
            f"{model} is not a model in diffusers' layout, neither a folder nor a hub's id within reach ({error})"
        ) from error
    levels = len(config["block_out_channels"])
    return ModelFacts(
        config.get("num_frames") or 14, (8 * (config.get("sample_size") or 96)) ** 2, 8 * 2 ** (levels - 1)
    )


def edit_settings(args: argparse.Namespace) -> VideoshopSettings:
    """The preset with what the command line changes. Raises ValueError for a value out of range."""
    named = ("steps", "strength", "refine", "fps", "motion_bucket")
    changes = {name: getattr(args, name) for name in named if getattr(args, name) is not None}
    if args.guidance:
        changes |= {"first_guidance": args.guidance[0], "last_guidance": args.guidance[1]}
    return replace(PRESETS[args.preset], **changes)


def prepare_edit(args: argparse.Namespace) -> EditJob:
    """Check and read all input, and say what is trimmed, resampled, resized or left out. Loads no model."""
    check_output(args.output, (args.clip, args.edited), args.force)
    check_mask_options(args)
    settings, facts = edit_settings(args), model_facts(args.model)
    count = facts.frames if args.frames is None else args.frames
    if count < 2:
        raise ValueError(f"got --frames {count}; a clip has at least 2")
    read = read_video(args.clip, frames=count, fps=args.fps)
    edited = read_image(args.edited)
    frames, height, width = len(read.frames), *read.frames.shape[2:]
    if frames < 2:
        raise ValueError(f"{args.clip} has one frame; a clip has at least 2")
    if abs(math.log(edited.shape[2] / edited.shape[1] * height / width)) > SAME_PROPORTIONS:
        raise ValueError(
            f"the edited frame is {edited.shape[2]}x{edited.shape[1]} and the clip {width}x{height}: their proportions "
            "differ; edit the clip's own first frame without cropping it"
        )
    size = choose_size(args.size, width, height, facts.area, facts.multiple)

    tell_reading(read, args.frames, args.fps)
    tell_length(frames, facts.frames)
    if read.has_audio:
        say("the audio track is left out")
    clip, picture = resized("clip", read.frames, size), resized("edited frame", edited[None], size)[0]
    return EditJob(
        clip=clip,
        edited=picture,
        fps=read.fps,
        settings=settings,
        output=args.output,
        force=args.force,
        model=args.model,
        seed=args.seed,
        mask=make_mask(args, clip, picture, (width, height)),
        keep_pixels=args.keep_pixels,
    )


def load_pipeline(model: str | None):
    """The model of an edit: the embedded one, or Stable Video Diffusion from a folder or the hub."""
    import torch

    from ..benchmarks.runner import embedded_pipeline
    from ..pipelines.videoshop.pipeline import VideoshopPipeline

    if model is None:
        # So small a model gains little from more threads, and loses much where other work shares the cores.
        torch.set_num_threads(1)
        return embedded_pipeline()
    on_gpu = torch.cuda.is_available()
    half_files = any(Path(model).glob("unet/*.fp16.safetensors"))
    return VideoshopPipeline.from_pretrained(
        model,
        torch_dtype=torch.float16 if on_gpu else torch.float32,
        device="cuda" if on_gpu else "cpu",
        variant="fp16" if half_files else None,
    )


def run_edit(args: argparse.Namespace) -> int:
    """`rewind edit`."""
    job = prepare_edit(args)
    if job.model is None:
        say("no --model: the embedded model is only a demonstration, it knows nothing but clips of its synthetic world")
    started = time.monotonic()
    generator = Generator().manual_seed(job.seed)
    pipeline, masked = load_pipeline(job.model), {"mask": job.mask, "keep_pixels": job.keep_pixels}
    result = pipeline(job.clip, job.edited, job.settings, generator, **masked)
    output = free_name(job.output, job.force)
    write_video(output, result.frames, job.fps)
    calls = result.evaluations
    say(
        f"{output}: {len(result.frames)} frames at {float(job.fps):g} frames a second, "
        f"{time.monotonic() - started:.0f} s, {calls['inversion']} + {calls['denoising']} network evaluations"
    )
    return 0
