"""The command `rewind`: the demonstration, the benchmarks, its parser. What it does to a user's files: `commands/`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from torch import OutOfMemoryError

from .commands.arguments import add_dreamix, add_edit, add_ei2
from .commands.edit import load_pipeline
from .commands.files import say
from .demo.world import EDITS
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
        ("motion-clips", args.motion_clips, 0),
        ("timed-runs", args.timed_runs, 0),
    ):
        if value < least:
            raise ValueError(f"got --{name} {value}; it must be at least {least}")
    if args.python is not None and not args.python.is_file():
        raise FileNotFoundError(
            f"there is no interpreter at {args.python}: --python names the one that the host runs in"
        )
    own = {"runs": runs, "swept_clips": args.tuning_clips, "motion_clips": args.motion_clips}
    costs = {"python": args.python, "cost_runs": args.timed_runs}
    dreamix.main(args.clips or 10, args.seeds or "test", **own, **costs, **common)
    return 0


def benchmark_ei2(args: argparse.Namespace, common: dict[str, Any]) -> int:
    """`rewind benchmark ei2`, which takes hours: all is checked before."""
    from .benchmarks import ei2

    runs = ei2.RUNS if args.runs is None else args.runs
    steps = ei2.TUNING.steps if args.steps is None else args.steps
    for name, value, least in (("runs", runs, 1), ("steps", steps, 1), ("timed-runs", args.timed_runs, 0)):
        if value < least:
            raise ValueError(f"got --{name} {value}; it must be at least {least}")
    own = {"runs": runs, "steps": steps, "timed_runs": args.timed_runs}
    ei2.main(args.clips or ei2.CLIPS, args.seeds or "test", **own, **common)
    return 0


def run_benchmark(args: argparse.Namespace) -> int:
    """`rewind benchmark`."""
    from .benchmarks import chunks, cost, local, long, model, round_trip, stronger, sweep, videoshop

    if args.clips is not None and args.clips < 2:
        raise ValueError(f"got --clips {args.clips}; a spread needs at least 2")
    common: dict[str, Any] = {"workers": args.workers, "output": args.output}
    if args.what == "cost":
        cost.main(args.python, 7 if args.runs is None else args.runs, args.output)
        return 0
    if args.what == "dreamix":
        return benchmark_dreamix(args, common)
    if args.what == "ei2":
        return benchmark_ei2(args, common)
    by_kind = {"local": (local, EDITS), "stronger": (stronger, EDITS), "long": (long, long.KINDS)}
    if args.what in by_kind:
        chosen, kinds = by_kind[args.what]
        chosen.main(args.clips or chosen.CLIPS, args.seeds or "test", args.kinds or kinds, **common)
        return 0
    if args.what == "chunks":
        chunks.main(args.clips or 8, args.seeds or "test", **common)
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


class Parser(argparse.ArgumentParser):
    """Tells bad input in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"rewind: {message} (see {self.prog} --help)\n")


def add_benchmark(commands: Any) -> None:
    bench = commands.add_parser("benchmark", help="measure against the synthetic world's known answers")
    kinds = ("model", "videoshop", "local", "long", "stronger", "chunks", "dreamix", "ei2", "cost")
    bench.add_argument("what", choices=kinds)
    bench.add_argument(
        "--clips",
        type=int,
        help="default: model 64, videoshop 32 (round trip, local, stronger 16), sweep, long, chunks, ei2 8, dreamix 10",
    )
    bench.add_argument("--seeds", choices=("validation", "test"), help="default: test, of a sweep validation")
    bench.add_argument(
        "--kinds",
        nargs="+",
        choices=EDITS,
        help="videoshop, local, stronger, long: kinds of edit (default: all; a sweep: two, long: three)",
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
        help="dreamix, ei2: runs of each side of the tables of costs, 0 for none (default: %(default)s)",
    )
    bench.add_argument(
        "--runs",
        type=int,
        help="cost: interleaved runs of each side (default: 7); dreamix, ei2: seeds of a clip's tuning (default: 1, 3)",
    )
    bench.add_argument("--steps", type=int, help="ei2: of the tuning (default: as the embedded model needs)")
    bench.add_argument(
        "--tuning-clips",
        type=int,
        default=3,
        help="dreamix: validation clips of the table of fine-tuning steps, 0 for none (default: %(default)s)",
    )
    bench.add_argument(
        "--motion-clips", type=int, default=0, help="dreamix: more clips, for motion edits alone (default: %(default)s)"
    )
    bench.add_argument(
        "-o", "--output", type=Path, default=Path("benchmarks/results"), help="folder (default: %(default)s)"
    )
    bench.set_defaults(run=run_benchmark)


def build_parser() -> Parser:
    parser = Parser(prog="rewind", description="Rewind a clip to noise, change one frame, play it again.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="demo | edit | dreamix | ei2 | benchmark")

    demo = commands.add_parser("demo", help="edit the shipped clip with the embedded model; takes less than a minute")
    demo.add_argument("-o", "--output", type=Path, default=Path("output/demo"), help="folder (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(run=run_demo)

    add_edit(commands)
    add_dreamix(commands)
    add_ei2(commands)
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
