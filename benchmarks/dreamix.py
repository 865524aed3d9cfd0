"""Dreamix against known answers: how often each way of fine-tuning does what a prompt asks and keeps what it must."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from ..demo.text_edits import BACKGROUND_ERROR, COLOUR_ERROR, HEADING_ERROR, KINDS, SEEDS
from ..pipelines.dreamix.finetuning import FineTuning
from ..pipelines.dreamix.pipeline import DreamixSettings
from . import cost, runner
from .dreamixing import REFERENCES, SECOND_PASS, SETTINGS, TUNING, Method, Record, jobs, of_kind, work
from .statistics import margin, share

MIXED = "mixed, alpha 0.5"
ALONE = "video alone, alpha 1"
METHODS = (
    Method("no fine-tuning"),
    Method(ALONE, 1.0),
    Method(MIXED, 0.5, second_pass=True),
)
STEPS = (0, 25, 50, 100, 200, 400)  # of fine-tuning, of which the default is chosen
MEASURES = ("appearance", "accuracy", "success")


# --- tables -----------------------------------------------------------------------------------------------------------


def of(records: Sequence[Record], method: str, kind: str | None = None) -> list[Record]:
    """The records of a method, and of a kind of edit."""
    return [r for r in records if r["method"] == method and kind in (None, r["kind"])]


def after_second_pass(records: Sequence[Record]) -> list[Record]:
    """The records with their second pass in the place of the first."""
    return [r | r["second_pass"] for r in records if r.get("second_pass")]


def results_table(records: Sequence[Record], names: Sequence[str], kind: str) -> str:
    """A row a method: appearance, accuracy and both, on one kind of edit."""
    rows = [[name, *(share(of(records, name, kind), key) for key in MEASURES)] for name in names]
    return runner.table(["method", *MEASURES], rows)


def lead_table(records: Sequence[Record], names: Sequence[str], kind: str = "motion") -> str:
    """How far the mixed fine-tuning succeeds more often than each other method, clip by clip."""
    rows = []
    for name in names:
        if name == MIXED:
            continue
        mean, bound = margin(of(records, MIXED, kind), of(records, name, kind))
        rows.append([name, f"{mean:+.2f}", f"{bound:+.2f}", "yes" if bound > 0 else "NO"])
    return runner.table(["method", f"{MIXED} over it", "lower 95 % bound", "outside the noise"], rows)


def second_pass_table(records: Sequence[Record]) -> str:
    """The mixed fine-tuning's results before and after the second pass, and its paired gain."""
    rows = []
    for kind in KINDS:
        before = [r for r in of(records, MIXED, kind) if r["second_pass"]]
        if not before:
            continue
        after = after_second_pass(before)
        mean, bound = margin(after, before)
        shares = [share(side, key) for key in MEASURES for side in (before, after)]
        rows.append([kind, *shares, f"{mean:+.2f}", f"{bound:+.2f}"])
    header = [f"{key}, {side}" for key in MEASURES for side in ("before", "after")]
    return runner.table(["kind", *header, "gain in success", "lower 95 % bound"], rows)


def steps_table(records: Sequence[Record], counts: Sequence[int]) -> str:
    """Success of motion edits against the number of fine-tuning steps, mixed and on the clip alone."""
    rows = [
        [f"{count}", *(share(of(records, steps_name(count, name)), key) for name in (MIXED, ALONE) for key in MEASURES)]
        for count in counts
    ]
    header = [f"{key}, {name.split(',')[0]}" for name in (MIXED, ALONE) for key in MEASURES]
    return runner.table(["steps of fine-tuning", *header], rows)


def cost_table(costs: dict[str, list[dict[str, Any]]]) -> str:
    """Seconds a step and the growth of the peak memory of each way, runs by its name, against the host's own."""
    rows = []
    base = median(seconds for run in costs[HOST] for seconds in run["seconds"])
    for name, runs in costs.items():
        seconds = [second for run in runs for second in run["seconds"]]
        low, _, high = quantiles(seconds, n=4)
        share = f"{median(seconds) / base:.2f}"
        peak = max(run["peak_mib"] for run in runs)
        rows.append([name, f"{median(seconds):.3f}", f"{low:.3f} to {high:.3f}", share, f"{peak:.0f}"])
    header = ["a step of", "median, s", "quartiles, s", f"of {HOST}", "peak memory, MiB more"]
    return runner.table(header, rows)


def steps_name(count: int, name: str) -> str:
    """The name of the method that fine-tunes for so many steps; no steps are the same for all."""
    return f"{count} steps, {name}" if count else "0 steps"


def step_methods(steps: Sequence[int]) -> list[Method]:
    """What the table of steps compares."""
    alphas = {MIXED: 0.5, ALONE: 1.0}
    tuned = [Method(steps_name(n, name), alphas[name], n) for n in steps if n for name in alphas]
    return ([Method(steps_name(0, MIXED), None, 0)] if 0 in steps else []) + tuned


def report(
    records: Sequence[Record],
    swept: Sequence[Record],
    settings: DreamixSettings,
    tuning: FineTuning,
    seeds: str,
    costs: dict[str, list[dict[str, Any]]] | None = None,
) -> str:
    """All tables as Markdown."""
    names = [method.name for method in METHODS]
    clips, runs = len({r["seed"] for r in records}), len({r["run"] for r in records})
    count = len({(r["seed"], r["kind"], r["variant"]) for r in records})
    alone = clips - len({r["seed"] for r in records if r["kind"] != "motion"})
    text = (
        f"# Dreamix on the synthetic world\n\n{count} edits of {clips} clips of {seeds} seeds"
        f"{f' ({alone} of them for motion edits alone)' if alone else ''}, {runs} run{'s' if runs > 1 else ''} of "
        f"fine-tuning and sampling each, `rewind benchmark dreamix`: {settings.steps} steps, guidance "
        f"{settings.guidance:g}; LoRA of rank {tuning.rank}, {tuning.steps} steps, learning rate "
        f"{tuning.learning_rate:g}, mask {tuning.mask}.\n\n"
        "Appearance: all that must stay is as in the source, of the object's colour (within "
        f"{COLOUR_ERROR:g} in RGB), its shape, the background (within {BACKGROUND_ERROR:g}), the style and the motion, "
        "without what the edit changes. Accuracy: what the prompt asks for shows; of motion the direction (within "
        f"{HEADING_ERROR:g} degrees) and the speed. Success: both. Shares with 95 % intervals over clips.\n"
    )
    for kind in KINDS:
        own = of_kind(settings, kind)
        degraded = f"s {own.s:g}, downsampled {own.factor:g} times, stride {own.stride}"
        text += f"\n## {kind} ({degraded})\n\n{results_table(records, [*REFERENCES, *names], kind)}"
    if clips > 1:
        text += (
            "\n## The paper's ordering on motion edits\n\nSuccess, clip by clip. The paper's raters preferred mixed "
            "fine-tuning in 47 % of motion edits, the clip alone in 25 % and none in 17 %; of style edits none in "
            "67 %.\n\n" + lead_table(records, names)
        )
    again = len({r["seed"] for r in records if r.get("second_pass")})
    text += (
        f"\n## The second pass ({settings.scale:g} times as large, s {SECOND_PASS:g}, of {MIXED}; {again} clips)\n\n"
    )
    text += second_pass_table(records)
    if swept:
        counts = sorted({int(r["method"].split()[0]) for r in swept})
        of_swept = len({r["seed"] for r in swept})
        text += f"\n## Steps of fine-tuning (motion edits of {of_swept} clips of validation seeds)\n\n"
        text += steps_table(swept, counts)
    text += "\n## Cost of fine-tuning\n\n"
    if not costs:
        return text + "Not measured here: there is no ComfyUI to measure it in.\n"
    first = next(iter(costs.values()))[0]
    return text + (
        f"In ComfyUI {first['host']}, torch {first['torch']}, {first['device']}: each way in a process of its own, in "
        f"turn, {len(next(iter(costs.values())))} times, one clip of 8 frames as a batch, float32, LoRA of rank "
        f"{tuning.rank}. The host's own is on every layer, ours on the attention; the mixed ways train on the clip and "
        "on its 8 frames in each step.\n\n" + cost_table(costs)
    )


# --- the cost, in a host ----------------------------------------------------------------------------------------------

HOST = "the host's Train LoRA"
# alpha (None: the host's own) and gradient checkpointing.
WAYS = {
    HOST: (None, False),
    "the clip alone": (1.0, False),
    "mixed": (0.5, False),
    HOST + ", gradient checkpointing": (None, True),
    "the clip alone, gradient checkpointing": (1.0, True),
    "mixed, gradient checkpointing": (0.5, True),
}
TRAINING = """
timing = importlib.import_module("rewind_timed.nodes.host.training_timing")
found = timing.measure(*json.loads(given[0]))
"""


def measure_costs(python: Path | None = None, runs: int = 3, steps: int = 8) -> dict[str, list[dict[str, Any]]] | None:
    """Each way of WAYS, in turn, in processes of the host's interpreter; None where there is no host.

    Raises ValueError if the host fails.
    """
    try:
        cost.host_folder()
    except FileNotFoundError:
        return None
    costs: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    for _ in range(runs):
        for name, way in WAYS.items():
            costs[name].append(cost.in_host(TRAINING, [json.dumps([*way, steps])], python))
    return costs


# --- the run ----------------------------------------------------------------------------------------------------------


def main(
    clips: int = 10,
    seeds: str = "test",
    workers: int | None = None,
    output: Path = runner.RESULTS,
    load: Callable[[], Any] = runner.embedded_text_pipeline,
    runs: int = 1,
    swept_clips: int = 3,
    steps: Sequence[int] = STEPS,
    settings: DreamixSettings = SETTINGS,
    tuning: FineTuning = TUNING,
    python: Path | None = None,
    cost_runs: int = 3,
    motion_clips: int = 0,
) -> list[Record]:
    """Edit, measure, print and save.

    clips: sources, each with nine edits; motion_clips: more of them, with their motion edits alone. runs: seeds of
    fine-tuning and sampling a clip. swept_clips: validation clips of the table of steps, 0 for none. python, cost_runs:
    of `measure_costs`; no table of costs with 0 runs.
    """
    kept = output / "dreamix.partial.jsonl"
    chosen = [SEEDS[seeds] + index for index in range(clips + motion_clips)]
    validation = [SEEDS["validation"] + index for index in range(swept_clips)]
    tuned = [Method(m.name, m.alpha, tuning.steps, m.second_pass) for m in METHODS]
    items = jobs(chosen[:clips], tuned, runs, KINDS, settings, tuning)
    items += jobs(chosen[clips:], tuned, runs, ("motion",), settings, tuning)
    swept_items = [
        j for j in jobs(validation, step_methods(steps), 1, ("motion",), settings, tuning) if j.method is not None
    ]
    parts = runner.run(work, [*items, *swept_items], "dreamix", workers, load, kept)
    records = [record for part in parts[: len(items)] for record in part]
    swept = [record for part in parts[len(items) :] for record in part]
    costs = measure_costs(python, cost_runs) if cost_runs else None
    data = {
        "seeds": seeds,
        "machine": runner.machine(),
        "settings": asdict(settings),
        "tuning": asdict(tuning),
        "records": records,
        "steps": swept,
        "costs": costs,
    }
    runner.save("dreamix", report(records, swept, settings, tuning, seeds, costs), data, output)
    kept.unlink()
    return records
