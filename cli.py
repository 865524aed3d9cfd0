"""The command `rewind`: its parser, the demonstration, the benchmarks. What it does to a user's files: `commands/`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from torch import OutOfMemoryError

from .commands.dreamix import KINDS, run_dreamix
from .commands.edit import PRESETS, load_pipeline, run_edit
from .commands.files import say
from .demo.world import EDITS
from .pipelines.dreamix.coarse_video import MOVES
from .pipelines.dreamix.temporal import MASKS
from .pipelines.evaluation.metrics import colour_transfer, psnr
from .pipelines.video import contact_sheet, read_image, read_video, write_image, write_video
from .pipelines.videoshop.settings import DEFAULT

ENLARGE = 4  # the demo world's clips are small: a pixel becomes 4 x 4
INTERRUPTED = 130  # the exit code of a command that Ctrl-C ended


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


def benchmark_dreamix(args: argparse.Namespace, common: dict[str, Any]) -> int:
    """`rewind benchmark dreamix`, which takes hours: all is checked before."""
    from .benchmarks import dreamix

    runs = 1 if args.runs is None else args.runs
    for name, value, least in (
        ("runs", runs, 1),
        ("tuning-clips", args.tuning_clips, 0),
        ("timed-runs", args.timed_runs, 0),
    ):
        if value < least:
            raise ValueError(f"got --{name} {value}; it must be at least {least}")
    if args.python is not None and not args.python.is_file():
        raise FileNotFoundError(
            f"there is no interpreter at {args.python}: --python names the one that the host runs in"
        )
    own = {"runs": runs, "swept_clips": args.tuning_clips, "python": args.python, "cost_runs": args.timed_runs}
    dreamix.main(args.clips or 10, args.seeds or "test", **own, **common)
    return 0


def run_benchmark(args: argparse.Namespace) -> int:
    """`rewind benchmark`."""
    from .benchmarks import cost, model, round_trip, sweep, videoshop

    if args.clips is not None and args.clips < 2:
        raise ValueError(f"got --clips {args.clips}; a spread needs at least 2")
    common: dict[str, Any] = {"workers": args.workers, "output": args.output}
    if args.what == "cost":
        cost.main(args.python, 7 if args.runs is None else args.runs, args.output)
        return 0
    if args.what == "dreamix":
        return benchmark_dreamix(args, common)
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


def move_name(text: str) -> str:
    """The move as it is listed; on the command line a hyphen may stand for its space."""
    return text.replace("-", " ")


def add_dreamix(commands: Any) -> None:
    dreamix = commands.add_parser("dreamix", help="edit a clip, animate a picture or film a subject, by a prompt")
    dreamix.add_argument("clip", type=Path, nargs="+", metavar="CLIP.mp4", help="or pictures, see the tasks")
    dreamix.add_argument("-p", "--prompt", required=True, help="what the result shows")
    dreamix.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.mp4")
    dreamix.add_argument(
        "--model",
        help="Wan or ModelScope (text to video) in diffusers' layout: folder or hub's id (default: the embedded model)",
    )
    dreamix.add_argument("--frames", type=int, help="of the result (default: the model's own number)")
    dreamix.add_argument("--size", type=size, metavar="WxH", help="of the result (default: the model's, as the input)")
    dreamix.add_argument("--fps", type=int, help="resample the clip to it; of pictures, the result's")
    dreamix.add_argument("--seed", type=int, default=0)
    dreamix.add_argument("--force", action="store_true", help="overwrite what is written")
    add_dreamix_task(dreamix)
    add_dreamix_sampling(dreamix.add_argument_group("the edit", "defaults: as the task and --kind have them"))
    add_dreamix_tuning(dreamix.add_argument_group("the fine-tuning", "defaults: as the task and --kind have them"))
    dreamix.set_defaults(run=run_dreamix)


def add_dreamix_task(dreamix: argparse.ArgumentParser) -> None:
    group = dreamix.add_argument_group("the task", "one of these, each with its own defaults")
    task = group.add_mutually_exclusive_group()
    task.add_argument("--kind", choices=KINDS, help=f"what the prompt changes in the clip (default: {KINDS[0]})")
    moves = ", ".join(name.replace(" ", "-") for name in MOVES)
    task.add_argument(
        "--animate", type=move_name, choices=MOVES, metavar="MOVE", help=f"one picture, first moved by: {moves}"
    )
    task.add_argument("--subject", action="store_true", help="a new clip of what the pictures show")


def add_dreamix_sampling(group: Any) -> None:
    group.add_argument("--noise", type=float, metavar="S", help="0..1: higher follows the prompt, lower keeps the clip")
    group.add_argument("--factor", type=float, help="how far the clip is downsampled a side, 1 is not at all")
    group.add_argument("--stride", type=int, help="keep the motion of every so many frames, 1 is all of them")
    group.add_argument("--steps", type=int, help="of the schedule from pure noise on")
    group.add_argument("--guidance", type=float, help="by the prompt, 1 is none")
    group.add_argument("--negative", metavar="PROMPT", help="what guidance leads away from")
    group.add_argument("--second-pass", type=float, metavar="S", help="the noise of an edit of the result, 0 for none")
    group.add_argument("--scale", type=float, help="how much larger the second pass makes the frames")


def add_dreamix_tuning(group: Any) -> None:
    group.add_argument("--fine-tune-steps", type=int, help="0 for none")
    group.add_argument("--alpha", type=float, help="0 learns from the frames alone, 1 from the clip alone")
    group.add_argument("--learning-rate", type=float)
    group.add_argument("--rank", type=int, help="of the LoRA")
    group.add_argument("--mask", choices=MASKS, help="how the frames' part leaves out the motion")
    group.add_argument("--token", help="the rare word that stands for what is learnt (default: sks, or the LoRA's own)")
    group.add_argument("--save-lora", type=Path, metavar="FILE.safetensors", help="keep the fine-tuning")
    group.add_argument("--lora", type=Path, metavar="FILE.safetensors", help="use a kept one instead")
    group.add_argument("--checkpoints", type=Path, metavar="FOLDER", help="of a run that may be interrupted")


def add_benchmark(commands: Any) -> None:
    bench = commands.add_parser("benchmark", help="measure against the synthetic world's known answers")
    bench.add_argument("what", choices=("model", "videoshop", "dreamix", "cost"))
    bench.add_argument("--clips", type=int, help="default: model 64, videoshop 32 (round trip 16), sweep 8, dreamix 10")
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
    bench.add_argument("--python", type=Path, help="cost, dreamix: the interpreter that the host runs in")
    bench.add_argument(
        "--timed-runs",
        type=int,
        default=3,
        help="dreamix: runs of each side in the host, of the table of costs, 0 for none (default: %(default)s)",
    )
    bench.add_argument(
        "--runs",
        type=int,
        help="cost: interleaved runs of each side (default: 7); dreamix: seeds of each clip's fine-tuning (default: 1)",
    )
    bench.add_argument(
        "--tuning-clips",
        type=int,
        default=3,
        help="dreamix: validation clips of the table of fine-tuning steps, 0 for none (default: %(default)s)",
    )
    bench.add_argument(
        "-o", "--output", type=Path, default=Path("benchmarks/results"), help="folder (default: %(default)s)"
    )
    bench.set_defaults(run=run_benchmark)


def build_parser() -> Parser:
    parser = Parser(prog="rewind", description="Rewind a clip to noise, change one frame, play it again.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="demo | edit | dreamix | benchmark")

    demo = commands.add_parser("demo", help="edit the shipped clip with the embedded model; takes less than a minute")
    demo.add_argument("-o", "--output", type=Path, default=Path("output/demo"), help="folder (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(run=run_demo)

    add_edit(commands)
    add_dreamix(commands)
    add_benchmark(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; 2 and one line on stderr for bad input, 130 for an interruption that tells how to go on."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"rewind: {' '.join(str(error).split())}", file=sys.stderr)
    except KeyboardInterrupt as stop:
        if not stop.args:
            raise
        print(f"rewind: {stop}", file=sys.stderr)
        return INTERRUPTED
    except (OutOfMemoryError, MemoryError) as error:
        told = " ".join(str(error).split())
        print(f"rewind: not enough memory: use fewer --frames or a smaller --size ({told})", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
