"""`rewind edit`: the edit of a clip's first frame, carried through the clip by Videoshop."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Generator, Tensor, allclose

from ..pipelines.evaluation.memory import in_words
from ..pipelines.video import read_image, read_video, write_video
from ..pipelines.videoshop.costs import denoising_evaluations, evaluations_in_words, inversion_evaluations
from ..pipelines.videoshop.inversion import Inversion
from ..pipelines.videoshop.inversion_file import file_bytes, load_inversion, save_inversion
from ..pipelines.videoshop.parts import parts
from ..pipelines.videoshop.settings import DEFAULT, PAPER, REFERENCE, VideoshopSettings
from ..pipelines.videoshop.trajectory import DTYPES, trajectory_bytes
from ..pipelines.videoshop.windows import windows
from .files import (
    check_output,
    choose_size,
    free_name,
    given,
    named,
    resized,
    same_proportions,
    say,
    tell_parts,
    tell_reading,
)
from .masks import NONE, check_mask_options, make_mask

if TYPE_CHECKING:
    from ..pipelines.videoshop.pipeline import VideoshopPipeline

PRESETS = {"default": DEFAULT, "paper": PAPER, "reference": REFERENCE}
LONG = ("frames_at_once", "context_length", "context_overlap")  # how a clip longer than the model goes
OF_THE_INVERSION = ("preset", "steps", "strength", "refine", "motion_bucket", *LONG, "seed", "trajectory")
MOST_STEPS = 10_000  # of a schedule that a file asks for
SAME_CLIP = 0.05  # latents of one clip differ by this share at most, on other devices and in other precisions


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
    inversion: Inversion | None  # of this clip, from a file
    save_inversion: Path | None
    decode_at_once: int  # frames
    trajectory: str | None  # the precision that the clip is kept in at every noise level; None keeps none


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


def edit_settings(args: argparse.Namespace, inversion: Inversion | None = None) -> VideoshopSettings:
    """The preset, or the settings of an inversion, with what the command line changes.

    Raises ValueError for a value out of range.
    """
    names = ("steps", "strength", "refine", "fps", "motion_bucket", *LONG)
    changes = {name: getattr(args, name) for name in names if given(args, name)}
    if args.guidance:
        changes |= {"first_guidance": args.guidance[0], "last_guidance": args.guidance[1]}
    start = PRESETS[args.preset or "default"] if inversion is None else VideoshopSettings(**inversion.settings)
    if args.context_overlap is not None and args.context_length is None:
        raise ValueError("--context-overlap is of windows: give --context-length too")
    return replace(start, **changes)


def keeps_trajectory(args: argparse.Namespace) -> bool:
    """Whether the edit inverts the clip and keeps it at every noise level: for a file, or to put it back by a mask."""
    return args.inversion is None and (args.save_inversion is not None or args.mask != NONE)


def read_inversion(args: argparse.Namespace) -> Inversion | None:
    """The inversion of --inversion. Raises for one that cannot be used, and for options that it has settled already."""
    if args.inversion is None:
        if args.trajectory is not None and not keeps_trajectory(args):
            raise ValueError("--trajectory is of what --save-inversion and --mask keep: give one of them too")
        return None
    settled = [name for name in OF_THE_INVERSION if given(args, name)]
    if settled:
        raise ValueError(f"{args.inversion} was made with settings of its own: leave out {named(settled)}")
    inversion = load_inversion(args.inversion)
    try:
        settings = VideoshopSettings(**inversion.settings)
        if inversion.source is None or settings.augmentation and inversion.augmentation_noise is None:
            raise ValueError("it lacks the source or the augmentation noise")
        if settings.steps > MOST_STEPS or len(levels := settings.sigmas()) != len(inversion.sigmas):
            raise ValueError("it has another number of noise levels than its settings")
        if not allclose(levels, inversion.sigmas.to(levels)):
            raise ValueError("its noise levels are not those of its settings")
        if inversion.trajectory is None and args.mask != NONE:
            raise ValueError("it lacks the states that are put back outside a mask")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{args.inversion} was not made by `rewind edit` of this version ({error}): what ComfyUI's nodes saved is "
            "for Load Inversion"
        ) from error
    if args.fps not in (None, settings.fps):
        raise ValueError(f"{args.inversion} was made for {settings.fps} frames a second, not --fps {args.fps}")
    return inversion


def check_clip_of(inversion: Inversion, file: Path, clip: Tensor, pipeline: VideoshopPipeline) -> None:
    """ValueError unless an inversion is of this model and of this clip [T, 3, H, W]; its ends are compared."""
    if inversion.model is not None:
        inversion.model.check(pipeline.fingerprint(), str(file))
    ends = [0, len(clip) - 1]
    encoded, kept = pipeline.encode(clip[ends]).cpu(), inversion.source[ends]
    apart = float((encoded - kept).norm() / kept.norm().clamp(min=1e-12))
    if not apart < SAME_CLIP:
        raise ValueError(
            f"{file} is the inversion of another clip, or of this one otherwise cut ({apart:.0%} apart): give the clip "
            "and --fps of the run that saved it"
        )


def check_files(args: argparse.Namespace) -> None:
    """Raise for results that could not be written."""
    inputs = [path for path in (args.clip, args.edited, args.inversion) if path is not None]
    check_output(args.output, inputs, args.force)
    if args.save_inversion is not None:
        check_output(args.save_inversion, inputs, args.force, (".safetensors",))


def prepare_edit(args: argparse.Namespace) -> EditJob:
    """Check and read all input, and say what is trimmed, resampled, resized or left out. Loads no model."""
    check_files(args)
    check_mask_options(args)
    if args.decode_at_once < 1:
        raise ValueError(f"got --decode-at-once {args.decode_at_once}; the VAE takes at least 1 frame")
    inversion = read_inversion(args)
    settings, facts = edit_settings(args, inversion), model_facts(args.model)
    count = facts.frames if args.frames is None else args.frames
    if args.frames is None and (settings.frames_at_once or settings.context_length):
        count = None  # all of it
    if count is not None and count < 2:
        raise ValueError(f"got --frames {count}; a clip has at least 2")
    read = read_video(args.clip, frames=count, fps=args.fps)
    edited = read_image(args.edited)
    frames, height, width = len(read.frames), *read.frames.shape[2:]
    if frames < 2:
        raise ValueError(f"{args.clip} has one frame; a clip has at least 2")
    if not same_proportions((edited.shape[2], edited.shape[1]), (width, height)):
        raise ValueError(
            f"the edited frame is {edited.shape[2]}x{edited.shape[1]} and the clip {width}x{height}: their proportions "
            "differ; edit the clip's own first frame without cropping it"
        )
    size = choose_size(args.size, width, height, facts.area, facts.multiple)
    if inversion is not None and inversion.latent.shape != (wanted := (frames, 4, size[1] // 8, size[0] // 8)):
        raise ValueError(
            f"{args.inversion} is for latents of shape {tuple(inversion.latent.shape)}, the clip has {wanted}: give "
            "--frames, --size and --fps of the run that saved it"
        )

    tell_reading(read, args.frames, args.fps)
    if read.trimmed and args.frames is None:
        say(f"--context-length {facts.frames} edits all of it")
    tell_parts(frames, facts.frames, settings.frames_at_once or settings.context_length)
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
        seed=args.seed or 0,
        mask=make_mask(args, clip, picture, (width, height)),
        keep_pixels=args.keep_pixels,
        inversion=inversion,
        save_inversion=args.save_inversion,
        decode_at_once=args.decode_at_once,
        trajectory=(args.trajectory or "float32") if keeps_trajectory(args) else None,
    )


def tell_costs(job: EditJob) -> None:
    """Say what the edit costs, before it starts."""
    s, sigmas = job.settings, job.settings.sigmas() if job.inversion is None else job.inversion.sigmas
    steps, found = len(sigmas) - 1, len(parts(len(job.clip), s.frames_at_once))
    in_windows = len(windows(len(job.clip), s.context_length, s.context_overlap))
    times = found * in_windows  # at least one of them is 1
    back = times * denoising_evaluations(sigmas, s.first_guidance, s.last_guidance, s.guidance_interval)
    there = evaluations_in_words(*(times * n for n in inversion_evaluations(steps, s.refine)))
    if job.inversion is not None:
        there = "an inversion that is there"
    told = f"{found} parts of at most {s.frames_at_once} frames: " if found > 1 else ""
    if in_windows > 1:
        told = f"{in_windows} windows of {s.context_length} frames: "
    say(f"{told}{there}, and {evaluations_in_words(back)} for the way back")
    if job.trajectory is not None:
        shape = (len(job.clip), 4, job.clip.shape[2] // 8, job.clip.shape[3] // 8)
        size = trajectory_bytes(shape, steps, DTYPES[job.trajectory])
        say(f"the clip at {steps + 1} noise levels in {job.trajectory} takes {in_words(size)} of main memory")


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
    tell_costs(job)
    started = time.monotonic()
    generator = Generator().manual_seed(job.seed)
    pipeline, inversion = load_pipeline(job.model), job.inversion
    pipeline.chunk = job.decode_at_once
    if inversion is not None:
        check_clip_of(inversion, args.inversion, job.clip, pipeline)
    if job.trajectory is not None:
        inversion = inverted(pipeline, job, generator)
    masked = {"mask": job.mask, "keep_pixels": job.keep_pixels}
    result = pipeline(job.clip, job.edited, job.settings, generator, inversion=inversion, **masked)
    output = free_name(job.output, job.force)
    write_video(output, result.frames, job.fps)
    calls = result.evaluations
    there = calls["inversion"] if job.inversion is None else 0
    say(
        f"{output}: {len(result.frames)} frames at {float(job.fps):g} frames a second, "
        f"{time.monotonic() - started:.0f} s, {there} + {calls['denoising']} network evaluations"
    )
    return 0


def inverted(pipeline: VideoshopPipeline, job: EditJob, generator: Generator) -> Inversion:
    """The clip's inversion with its trajectory, saved where the job says."""
    kept = {"keep_trajectory": True, "trajectory_dtype": DTYPES[job.trajectory]}
    inversion = pipeline.invert(job.clip, job.settings, generator, mask=job.mask, progress=True, **kept)
    if job.save_inversion is not None:
        path = free_name(job.save_inversion, job.force)
        say(f"{path}: {in_words(file_bytes(inversion))}, for --inversion")
        save_inversion(path, inversion)
    return inversion
