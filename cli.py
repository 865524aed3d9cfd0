"""The command `rewind`: a demonstration, the edit of a user's own clip, the benchmarks."""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn

from torch import Generator, OutOfMemoryError, Tensor

from .demo.world import EDITS
from .pipelines.evaluation.metrics import colour_transfer, psnr
from .pipelines.video import contact_sheet, fit, nearest_size, read_image, read_video, write_image, write_video
from .pipelines.videoshop.settings import DEFAULT, PAPER, REFERENCE, VideoshopSettings

PRESETS = {"default": DEFAULT, "paper": PAPER, "reference": REFERENCE}
SUFFIXES = (".mp4", ".mov", ".mkv")
ENLARGE = 4  # the demo world's clips are small: a pixel becomes 4 x 4
SAME_PROPORTIONS = 0.02  # the edited frame's may differ by this share from the clip's


def say(text: str) -> None:
    print(text, flush=True)


# --- rewind edit ------------------------------------------------------------------------------------------------------


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


def model_facts(model: str | None) -> ModelFacts:
    """Read them from the UNet's configuration, of a folder or on the hub; no weights are read.

    Raises ValueError where there is no such model, or one of another kind.
    """
    from .demo.models import ImageToVideoConfig

    if model is None:
        own = ImageToVideoConfig()
        return ModelFacts(own.frames, own.size**2, 8 * 2 ** (len(own.unet_channels) - 1))
    from .pipelines.videoshop.pipeline import unet_config

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


def check_output(args: argparse.Namespace) -> None:
    """Raise before any work for a result that could not be written, or that would overwrite something."""
    output: Path = args.output
    if output.suffix.lower() not in SUFFIXES:
        raise ValueError(f"the output {output} must end in {', '.join(SUFFIXES)}")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {output.parent} for the output")
    if output.is_dir():
        raise ValueError(f"the output {output} is a folder; give the name of a file")
    try:
        tempfile.TemporaryFile(dir=output.parent).close()
    except OSError as error:
        raise ValueError(f"nothing can be written in {output.parent}: {error.strerror}") from error
    if output.exists() and output.resolve() in (args.clip.resolve(), args.edited.resolve()):
        raise ValueError(f"the output {output} is one of the inputs; give another name")
    if output.exists() and not args.force:
        raise FileExistsError(f"{output} exists already; --force overwrites it")


def prepare_edit(args: argparse.Namespace) -> EditJob:
    """Check and read all input, and say what is trimmed, resampled, resized or left out. Loads no model."""
    check_output(args)
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
    size = args.size or nearest_size(width, height, facts.area, facts.multiple)
    if min(size) < 1 or size[0] % facts.multiple or size[1] % facts.multiple:
        nearest = nearest_size(*(max(1, side) for side in size), max(1, size[0] * size[1]), facts.multiple)
        raise ValueError(
            f"got --size {size[0]}x{size[1]}; both sides must be multiples of {facts.multiple}, "
            f"the nearest is {nearest[0]}x{nearest[1]}"
        )

    if args.fps:
        repeated = ", which repeats frames" if args.fps > read.file_fps else ""
        say(f"resampled from {float(read.file_fps):g} to {args.fps:g} frames a second{repeated}")
    if read.uneven:
        say(f"the clip's frame rate varies; the result plays evenly at {float(read.fps):g}, or resample it with --fps")
    if args.frames is not None and frames < args.frames:
        say(f"the clip has {frames} frames, not the {args.frames} of --frames")
    if read.trimmed:
        say(f"trimmed to the first {frames} frames; --frames takes more, --fps covers more time with as many")
    if frames != facts.frames:
        say(f"{frames} frames; the model was trained on {facts.frames}, other numbers may look worse")
    if read.has_audio:
        say("the audio track is left out")
    for name, old in (("clip", (width, height)), ("edited frame", (edited.shape[2], edited.shape[1]))):
        if old != size:
            cropped = 1 - min(size[0] * old[1], size[1] * old[0]) / max(size[0] * old[1], size[1] * old[0])
            told = f", {cropped:.0%} is cropped" if cropped >= 0.005 else ""
            say(f"the {name} is resized from {old[0]}x{old[1]} to {size[0]}x{size[1]}{told}")
    return EditJob(
        clip=fit(read.frames, *size),
        edited=fit(edited[None], *size)[0],
        fps=read.fps,
        settings=settings,
        output=args.output,
        force=args.force,
        model=args.model,
        seed=args.seed,
    )


def load_pipeline(model: str | None):
    """The model of an edit: the embedded one, or Stable Video Diffusion from a folder or the hub."""
    import torch

    from .benchmarks.runner import embedded_pipeline
    from .pipelines.videoshop.pipeline import VideoshopPipeline

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
    result = load_pipeline(job.model)(job.clip, job.edited, job.settings, generator)
    output = job.output
    while output.exists() and not job.force:  # it came while the model worked
        output = output.with_stem(f"{output.stem}-new")
    write_video(output, result.frames, job.fps)
    calls = result.evaluations
    say(
        f"{output}: {len(result.frames)} frames at {float(job.fps):g} frames a second, "
        f"{time.monotonic() - started:.0f} s, {calls['inversion']} + {calls['denoising']} network evaluations"
    )
    return 0


# --- rewind demo ------------------------------------------------------------------------------------------------------


def run_demo(args: argparse.Namespace) -> int:
    """`rewind demo`: the shipped clip, read from disk as a user's own, and the known answer beside the result."""
    if args.output.is_dir() and any(args.output.iterdir()) and not (args.output / "report.json").is_file():
        raise ValueError(f"the folder {args.output} holds files that are not the demonstration's; give another one")
    started = time.monotonic()
    from .benchmarks.editing import ClipEditor
    from .demo.clip import CLIP, EDITED, shipped

    read, picture, truth = read_video(CLIP), read_image(EDITED), shipped()
    pipeline = load_pipeline(None)
    editor, settings = ClipEditor(pipeline, read.frames, args.seed), DEFAULT
    inversion = editor.invert(settings)
    latents, calls = editor.play(inversion, picture, settings)
    edited = editor.finish(latents, picture, settings)
    random = pipeline.decode(editor.animate(picture, settings)[0])
    back, _ = editor.play(inversion, read.frames[0], replace(settings, first_guidance=1.0, last_guidance=1.0))
    through = pipeline.decode(pipeline.encode(read.frames))

    transfer = colour_transfer(edited, truth.source, truth.target, truth.target_mask).tolist()
    static = truth.target[:1].expand_as(truth.target)
    report = {
        "seconds": None,
        "evaluations": inversion.evaluations + calls,
        "evaluations_inversion": inversion.evaluations,
        "evaluations_denoising": calls,
        "colour_transfer": transfer[-1],
        "colour_transfer_per_frame": transfer,
        "psnr_edit": psnr(edited, truth.target, truth.region),
        "psnr_edit_random_noise": psnr(random, truth.target, truth.region),
        "psnr_edit_static": psnr(static, truth.target, truth.region),
        "psnr_unedited": psnr(edited, read.frames, 1 - truth.region),
        "psnr_round_trip": psnr(pipeline.decode(back), read.frames),
        "psnr_vae": psnr(through, read.frames),
    }
    rows = {
        "source": read.frames,
        "result: Videoshop": edited,
        "plain image-to-video from random noise": random,
        "the true edit": truth.target,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    for name, clip in (("source", read.frames), ("edited", edited)):
        large = clip.repeat_interleave(ENLARGE, -1).repeat_interleave(ENLARGE, -2)
        write_video(args.output / f"{name}.mp4", large, read.fps)
    write_image(args.output / "comparison.png", contact_sheet(rows, scale=2))
    report["seconds"] = round(time.monotonic() - started, 2)
    (args.output / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    say(
        f"the edit reached the last frame to {transfer[-1]:.2f} (1 is the true colour); in the edited region "
        f"{report['psnr_edit']:.1f} dB to the true edit, plain image-to-video {report['psnr_edit_random_noise']:.1f} dB"
    )
    say(f"{args.output}: source.mp4, edited.mp4, comparison.png, report.json, in {report['seconds']:.0f} s")
    return 0


# --- rewind benchmark -------------------------------------------------------------------------------------------------


def run_benchmark(args: argparse.Namespace) -> int:
    """`rewind benchmark`."""
    from .benchmarks import cost, model, round_trip, sweep, videoshop

    if args.clips is not None and args.clips < 2:
        raise ValueError(f"got --clips {args.clips}; a spread needs at least 2")
    common: dict[str, Any] = {"workers": args.workers, "output": args.output}
    if args.what == "cost":
        cost.main(args.python, args.runs, args.output)
        return 0
    if args.what == "model":
        passed = model.main(args.clips or 64, args.seeds or "test", **common)
        return int(args.strict and not passed)
    if args.sweep is not None:
        sweep.main(args.sweep, args.clips or 8, args.seeds or "validation", args.kinds or sweep.KINDS, **common)
        return 0
    if args.only != "round-trip":
        clips, kinds = args.clips or videoshop.MINIMUM_CLIPS, args.kinds or EDITS
        videoshop.main(clips, args.seeds or "test", kinds, in_turn=args.in_turn, **common)
    if args.only != "edits":
        round_trip.main(args.clips or 16, args.seeds or "test", **common)
    return 0


# --- the command line -------------------------------------------------------------------------------------------------


def size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    return int(width), int(height)


class Parser(argparse.ArgumentParser):
    """Tells bad input in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"rewind: {message} (see {self.prog} --help)\n")


def add_edit(commands: Any) -> None:
    edit = commands.add_parser("edit", help="carry the edit of a clip's first frame through the clip")
    edit.add_argument("clip", type=Path, metavar="CLIP.mp4")
    edit.add_argument("edited", type=Path, metavar="EDITED.png", help="the clip's first frame after your edit")
    edit.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.mp4")
    edit.add_argument(
        "--model",
        help="Stable Video Diffusion in diffusers' layout: a folder or a hub's id (default: the embedded model)",
    )
    edit.add_argument(
        "--preset", choices=PRESETS, default="default", help="settings to start from (default: %(default)s)"
    )
    edit.add_argument("--steps", type=int, help="of the schedule; more return the clip more exactly")
    edit.add_argument("--strength", type=float, help="0..1: higher leaves the edit more room, lower keeps the source")
    edit.add_argument("--refine", type=int, help="repetitions of each inversion step: a more exact round trip")
    edit.add_argument(
        "--guidance",
        type=float,
        nargs=2,
        metavar=("FIRST", "LAST"),
        help="of the first and the last frame; 1 1 is none",
    )
    edit.add_argument("--frames", type=int, help="use so many, from the start (default: the model's own number)")
    edit.add_argument(
        "--size", type=size, metavar="WxH", help="of the result (default: the model's area, the clip's shape)"
    )
    edit.add_argument(
        "--fps", type=int, help="resample the clip to it and tell the model (default: every frame as it is)"
    )
    edit.add_argument("--motion-bucket", type=int, help="how much motion the model is told of")
    edit.add_argument("--seed", type=int, default=0)
    edit.add_argument("--force", action="store_true", help="overwrite the output")
    edit.set_defaults(run=run_edit)


def add_benchmark(commands: Any) -> None:
    bench = commands.add_parser("benchmark", help="measure against the synthetic world's known answers")
    bench.add_argument("what", choices=("model", "videoshop", "cost"))
    bench.add_argument("--clips", type=int, help="default: model 64, videoshop 32 (round trip 16), sweep 8")
    bench.add_argument("--seeds", choices=("validation", "test"), help="default: test, of a sweep validation")
    bench.add_argument(
        "--kinds", nargs="+", choices=EDITS, help="videoshop: kinds of edit (default: all; of a sweep two)"
    )
    bench.add_argument("--in-turn", action="store_true", help="videoshop: one kind a clip, a sixth of the time")
    bench.add_argument("--only", choices=("edits", "round-trip"), help="videoshop: one part")
    bench.add_argument(
        "--sweep", nargs="*", metavar="SETTING=A,B", help="videoshop: rank all combinations; none named: one at a time"
    )
    bench.add_argument("--workers", type=int, help="processes (default: one a core, or one on a GPU)")
    bench.add_argument("--strict", action="store_true", help="model: exit code 1 when a gate FAILED")
    bench.add_argument("--python", type=Path, help="cost: the interpreter that the host runs in")
    bench.add_argument("--runs", type=int, default=7, help="cost: interleaved runs of each side (default: %(default)s)")
    bench.add_argument(
        "-o", "--output", type=Path, default=Path("benchmarks/results"), help="folder (default: %(default)s)"
    )
    bench.set_defaults(run=run_benchmark)


def build_parser() -> Parser:
    parser = Parser(prog="rewind", description="Rewind a clip to noise, change one frame, play it again.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="demo | edit | benchmark")

    demo = commands.add_parser("demo", help="edit the shipped clip with the embedded model; takes less than a minute")
    demo.add_argument("-o", "--output", type=Path, default=Path("output/demo"), help="folder (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(run=run_demo)

    add_edit(commands)
    add_benchmark(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; 2 and one line on stderr for bad input."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"rewind: {' '.join(str(error).split())}", file=sys.stderr)
    except (OutOfMemoryError, MemoryError) as error:
        told = " ".join(str(error).split())
        print(f"rewind: not enough memory: use fewer --frames or a smaller --size ({told})", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
