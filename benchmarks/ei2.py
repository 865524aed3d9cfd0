"""EI² against known answers, and the paper's claims for its two modules: what edits keep, how steady they are, shifts.

Every method is tuned on the same clips with the same number of steps and the same noise. Means are over clips, their
edits and seeds of tuning; intervals and bounds are over clips.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

from ..demo.image_edits import BORDER, EDITS, PATH_ERROR, SEEDS
from ..demo.text_edits import BACKGROUND_ERROR, COLOUR_ERROR, HEADING_ERROR
from ..pipelines.ei2.inflation import InflationSettings
from ..pipelines.ei2.pipeline import EI2Settings
from ..pipelines.ei2.tuning import OneShot
from . import inflation_cost, runner
from .inflating import REFERENCES, SETTINGS, TUNING, Job, Method, Studio, embedded_studio, jobs, work
from .inflation_cost import FFAM, FRAMES, GRIDS, MEMORY_SIDE, PARTS, SIDES, SPARSE
from .statistics import Record, estimate, margin, per_clip, share

PER_FRAME, TUNE_A_VIDEO, STAM_SPARSE = "per-frame editing", "Tune-A-Video", "STAM + sparse-causal"
TUNE_FFAM, OWN = "Tune-A-Video + FFAM", "EI²"
LAYER_NORM, NO_SPECTRAL = "EI², LayerNorm for Instance Centering", "EI², no spectral normalisation"
METHODS = (
    Method(PER_FRAME),
    Method(TUNE_A_VIDEO, InflationSettings(SPARSE, temporal="Tune-A-Video")),
    Method(STAM_SPARSE, InflationSettings(SPARSE, temporal="STAM")),
    Method(TUNE_FFAM, InflationSettings(FFAM, temporal="Tune-A-Video")),
    Method(OWN, InflationSettings(FFAM, temporal="STAM")),
    Method(LAYER_NORM, InflationSettings(FFAM, temporal="STAM with LayerNorm")),
    Method(NO_SPECTRAL, InflationSettings(FFAM, temporal="STAM without spectral normalisation")),
)
CLIPS, RUNS, TIMED_RUNS = 8, 3, 3
NEAR = 0.15  # a cost is near what it should be within this share of it


# --- claims -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """One method is better than another in one measure. lower: less of it is better."""

    text: str
    own: str
    base: str
    key: str
    digits: int
    lower: bool = False


def _both(text: str, key: str, digits: int, lower: bool, *pairs: tuple[str, str]) -> list[Claim]:
    return [Claim(text, own, base, key, digits, lower) for own, base in pairs]


STAM_PAIRS = ((STAM_SPARSE, TUNE_A_VIDEO), (OWN, TUNE_FFAM))
FFAM_PAIRS = ((TUNE_FFAM, TUNE_A_VIDEO), (OWN, STAM_SPARSE))
TUNED_PAIRS = ((TUNE_A_VIDEO, PER_FRAME), (OWN, PER_FRAME))
CLAIMS = (
    *_both("STAM lowers the mean shift", "mean_shift_edit", 3, True, *STAM_PAIRS),
    *_both("STAM lowers the variance shift", "variance_shift_edit", 3, True, *STAM_PAIRS),
    *_both("STAM raises the success of edits at equal tuning", "success", 2, False, *STAM_PAIRS),
    *_both("STAM is more consistent: warp error", "warp_error", 4, True, *STAM_PAIRS),
    *_both("STAM is more consistent: path of the object", "path_error", 2, True, *STAM_PAIRS),
    *_both("STAM is more consistent: similarity of frames", "similarity", 4, False, *STAM_PAIRS),
    Claim("Instance Centering lowers the mean shift", OWN, LAYER_NORM, "mean_shift_edit", 3, True),
    Claim("spectral normalisation lowers the variance shift", OWN, NO_SPECTRAL, "variance_shift_edit", 3, True),
    *_both("FFAM is more consistent: warp error", "warp_error", 4, True, *FFAM_PAIRS),
    *_both("FFAM is more consistent: warp error of the object", "warp_error_object", 4, True, *FFAM_PAIRS),
    *_both("FFAM is more consistent: similarity of frames", "similarity", 4, False, *FFAM_PAIRS),
    *_both("tuning is more consistent than single frames: warp error", "warp_error", 4, True, *TUNED_PAIRS),
    *_both("tuning is more consistent than single frames: path of the object", "path_error", 2, True, *TUNED_PAIRS),
)


def of(records: Sequence[Record], method: str, edits: Sequence[str] = tuple(EDITS)) -> list[Record]:
    """The records of a method, and of some edits."""
    return [r for r in records if r["method"] == method and r["edit"] in edits]


def verdict(bound: float, reverse: float) -> str:
    """By the lower 95 % bounds of how far the claim holds, and how far its reverse does."""
    if bound > 0:
        return "reproduced"
    return "NOT reproduced: the reverse holds" if reverse > 0 else "NOT reproduced: inside the noise"


def claim_row(records: Sequence[Record], claim: Claim) -> list[str]:
    """A claim, the means of both sides, the paired gain (above 0 where the claim holds) with its bound, the verdict."""
    own, base = of(records, claim.own), of(records, claim.base)
    sides = (base, own) if claim.lower else (own, base)
    (mean, bound), (_, reverse) = margin(*sides, claim.key), margin(*sides[::-1], claim.key)
    means = [f"{fmean(per_clip(side, claim.key)):.{claim.digits}f}" for side in (own, base)]
    gain = [f"{mean:+.{claim.digits}f}", f"{bound:+.{claim.digits}f}"]
    return [claim.text, f"{claim.own} against {claim.base}", *means, *gain, verdict(bound, reverse)]


def claims_table(records: Sequence[Record]) -> str:
    """A row a claim."""
    header = ["claim", "sides", "own", "other", "gain, clip by clip", "lower 95 % bound", "verdict"]
    return runner.table(header, [claim_row(records, claim) for claim in CLAIMS])


# --- tables of edits --------------------------------------------------------------------------------------------------


def edits_table(records: Sequence[Record], names: Sequence[str]) -> str:
    """A row a method: how often the edit shows, the rest stays, and both; both of each edit."""
    rows = []
    for name in names:
        cells = [share(of(records, name), key) for key in ("edited", "kept", "success")]
        rows.append([name, *cells, *(share(of(records, name, [edit]), "success") for edit in EDITS)])
    return runner.table(["method", "edit shows", "rest stays", "success", *(f"success, {e}" for e in EDITS)], rows)


@dataclass(frozen=True)
class Column:
    """A measure as a table has it. edits: which count. limits: of the measure."""

    title: str
    key: str
    digits: int
    edits: tuple[str, ...] = tuple(EDITS)
    limits: tuple[float, float] = (0.0, math.inf)


FIDELITY = (
    Column("path, pixels", "path_error", 2),
    Column("object's colour where it stays", "colour_error", 3, ("shape", "background")),
    Column("background's colour where it stays", "background_error", 3, ("colour", "shape")),
    Column("unedited region, dB", "psnr_kept", 1),
)
CONSISTENCY = (
    Column("warp error", "warp_error", 4),
    Column("warp error, object", "warp_error_object", 4),
    Column("similarity of frames", "similarity", 4, limits=(-1.0, 1.0)),
)
SHIFTS = (
    *(Column(f"mean, {when}", f"mean_shift_{when}", 3) for when in ("before", "source", "edit")),
    *(Column(f"variance, {when}", f"variance_shift_{when}", 3) for when in ("before", "source", "edit")),
    Column("loss", "loss", 3),
)


def means_table(records: Sequence[Record], names: Sequence[str], columns: Sequence[Column]) -> str:
    """A row a method: means with intervals."""
    rows = [
        [name, *(estimate(of(records, name, c.edits), c.key, c.digits, c.limits) for c in columns)] for name in names
    ]
    return runner.table(["method", *(column.title for column in columns)], rows)


OVER_SEEDS = {"success": 2, "warp_error": 4, "similarity": 4, "mean_shift_edit": 3, "variance_shift_edit": 3}


def seeds_table(records: Sequence[Record], names: Sequence[str]) -> str:
    """Mean and standard deviation over seeds of tuning of what each method reaches on all clips."""
    rows = []
    for name in names:
        own = of(records, name)
        runs = [[r for r in own if r["run"] == run] for run in sorted({r["run"] for r in own})]
        means = {key: [fmean(per_clip(run, key)) for run in runs] for key in OVER_SEEDS}
        rows.append([name, *(runner.mean_sd(means[key], digits) for key, digits in OVER_SEEDS.items())])
    return runner.table(["method", *(key.replace("_", " ") for key in OVER_SEEDS)], rows)


# --- tables of costs --------------------------------------------------------------------------------------------------


def seconds_table(found: dict[str, dict[str, list[float]]], tuning: OneShot, calls: int) -> str:
    """Seconds of a step and of a call, medians, of Tune-A-Video's, and what a whole tuning and edit come to."""
    rows = []
    for name, parts in found.items():
        cells: list[str] = []
        for part, count in zip(PARTS, (tuning.steps, calls), strict=True):
            if not parts[part]:
                cells += ["-", "-", "-"]
                continue
            one = median(parts[part])
            ratio = one / median(found[TUNE_A_VIDEO][part])
            cells += [f"{one:.3f}", f"{ratio:.2f}", f"{one * count:.0f}"]
        rows.append([name, *cells])
    against = f"of {TUNE_A_VIDEO}'s"
    header = ["a step of tuning, s", against, f"{tuning.steps} steps, s"]
    return runner.table(["method", *header, "a network call, s", against, f"an edit of {calls} calls, s"], rows)


def memory_table(peaks: dict[str, dict[str, dict[str, float]]]) -> str:
    """Peak memory of each method's parts; in the first row that of a process which has only loaded the model."""
    loaded = max(found["before"] for parts in peaks.values() for found in parts.values())
    rows = [["the model loaded, nothing done", *[f"{loaded:.0f}"] * len(PARTS)]]
    for name, parts in peaks.items():
        rows.append([name, *(f"{parts[part]['peak']:.0f}" if part in parts else "-" for part in PARTS)])
    return runner.table(["method", *(f"{part}, MiB" for part in PARTS)], rows)


def attention_ratio(seconds: dict[str, list[float]]) -> float:
    """FFAM's median time of sparse-causal attention's."""
    return median(seconds[FFAM]) / median(seconds[SPARSE])


def attention_table(attention: Sequence[dict[str, Any]]) -> str:
    """A row a size: seconds of both, their ratio, the ratio of operations as counted, and (m + 3) / 8."""
    rows = []
    for row in attention:
        frames, grid = row["frames"], row["grid"]
        counted = [inflation_cost.operations(kind, frames, grid) for kind in (SPARSE, FFAM)]
        cells = [f"{median(row['seconds'][kind]):.3f}" for kind in (SPARSE, FFAM)]
        work_ratio = counted[1] / counted[0]
        ratios = [f"{attention_ratio(row['seconds']):.2f}", f"{work_ratio:.2f}", f"{(frames + 3) / 8:.2f}"]
        rows.append([f"{frames}", f"{grid} x {grid}", *(f"{n / 1e9:.0f}" for n in counted), *cells, *ratios])
    header = ["frames m", "latents", f"GFLOP, {SPARSE}", f"GFLOP, {FFAM}", f"s, {SPARSE}", f"s, {FFAM}"]
    return runner.table([*header, "s, FFAM's share", "FLOP, FFAM's share", "(m + 3) / 8"], rows)


def attention_verdict(attention: Sequence[dict[str, Any]]) -> str:
    """Whether FFAM's time is near (m + 3) / 8 of sparse-causal attention's, for every m over the sizes."""
    off = {}
    for frames in sorted({row["frames"] for row in attention}):
        logs = [math.log(attention_ratio(row["seconds"])) for row in attention if row["frames"] == frames]
        off[frames] = math.exp(fmean(logs)) / ((frames + 3) / 8)
    told = ", ".join(f"{ratio:.2f} times it with {frames} frames" for frames, ratio in off.items())
    met = all(abs(ratio - 1) <= NEAR for ratio in off.values())
    return (
        f"FFAM at a cost near (m + 3) / 8 of sparse-causal attention's (within {NEAR:.0%}, mean over sizes): {told}: "
        f"**{'reproduced' if met else 'NOT reproduced'}**.\n"
    )


# --- the report -------------------------------------------------------------------------------------------------------

EDITS_TOLD = (
    f"The edit shows: the object's new colour (within {COLOUR_ERROR:g} in RGB), its new shape or the new background. "
    f"The rest stays: what else there is of colour, shape, background (within {BACKGROUND_ERROR:g}), style and motion "
    f"(direction within {HEADING_ERROR:g} degrees, speed), and the object less than {PATH_ERROR:g} pixels off its true "
    "path. Success: both."
)
CONSISTENCY_TOLD = (
    "Warp error: mean absolute difference of consecutive frames, brought over each other along the TRUE motion of the "
    f"true answer, in 0..1; occlusions and {BORDER} pixels to each side of the object's edge are left out. Similarity "
    "of frames: mean cosine of consecutive frames' embeddings by the embedded image-to-video model's image encoder. A "
    "result that shows nothing would be perfectly consistent: read them with the edits."
)


def report(
    records: Sequence[Record], settings: EI2Settings, tuning: OneShot, seeds: str, costs: dict[str, Any] | None
) -> str:
    """All tables as Markdown."""
    names = [method.name for method in METHODS]
    rows, tuned = [*REFERENCES, *names], [m.name for m in METHODS if m.inflation is not None]
    clips, runs = len({r["seed"] for r in records}), len({r["run"] for r in records})
    count = len({(r["seed"], r["edit"]) for r in records})
    text = (
        f"# EI² on the synthetic world\n\n{count} edits of {clips} clips of {seeds} seeds, {runs} seeds of tuning "
        f"each, `rewind benchmark ei2`: {tuning.steps} steps of tuning, learning rate {tuning.learning_rate:g}; "
        f"inversion and sampling of {settings.steps} steps, guidance {settings.guidance:g}. Every method is tuned "
        "alike, on the same noise; but for the seed of its tuning nothing in it is drawn. Means with 95 % intervals "
        f"over clips.\n\n## Edits\n\n{EDITS_TOLD}\n\n{edits_table(records, rows)}\n"
        "## Fidelity of the rest\n\nErrors against the true answer, colours as distances in RGB; the unedited region "
        f"against the source.\n\n{means_table(records, rows, FIDELITY)}\n"
        f"## Consistency\n\n{CONSISTENCY_TOLD}\n\n{means_table(records, rows, CONSISTENCY)}\n"
        "## Covariate shift\n\nOf the features that pass a temporal module, mean over modules and noise levels: "
        "before any tuning (a fresh module changes nothing), then on the source's caption and on the edits' prompts. "
        f"The loss is that of the last quarter of the tuning.\n\n{means_table(records, tuned, SHIFTS)}"
    )
    if runs > 1:
        text += f"\n## Seeds of tuning\n\nMean ± standard deviation over {runs} seeds.\n\n{seeds_table(records, tuned)}"
    if clips > 1:
        text += (
            "\n## The paper's claims\n\nA claim is reproduced where the lower 95 % bound of the gain, paired clip by "
            f"clip, is above 0. Shifts are those on the edits' prompts.\n\n{claims_table(records)}"
        )
    if costs is None:
        return text + "\n## Cost\n\nNot measured (`--timed-runs 0`).\n"
    calls = max(record.get("evaluations", 0) for record in records)
    return text + cost_report(costs, tuning, calls)


def cost_report(costs: dict[str, Any], tuning: OneShot, calls: int) -> str:
    """The tables of costs. calls: of the network in an edit."""
    text = (
        f"\n## Cost\n\n{runner.machine()}; medians, the sides in turn in one process. The VAE, which all have alike, "
        f"is left out; the attention is computed by the same kernel in all. Clips of {inflation_cost.CLIP} frames.\n"
    )
    for side, found in costs["seconds"].items():
        text += f"\n### Seconds on latents of {side} x {side}\n\n{seconds_table(found, tuning, calls)}"
    return text + (
        f"\n### Peak memory on latents of {MEMORY_SIDE} x {MEMORY_SIDE}\n\nOf the whole process, one for each "
        f"number.\n\n{memory_table(costs['memory'])}\n### The attention alone\n\nWidth "
        f"{inflation_cost.WIDTH}, {inflation_cost.HEADS} heads, without projections.\n\n"
        f"{attention_table(costs['attention'])}\n{attention_verdict(costs['attention'])}"
    )


# --- the run ----------------------------------------------------------------------------------------------------------


def measure_costs(load: Callable[[], Studio], runs: int, kept: Path | None = None) -> dict[str, Any]:
    """All costs: "memory" by method and part, "attention" as rows, "seconds" by side of the latents, method and part.

    Memory comes first, while this process is small: on Linux a new process begins with the peak of its parent.
    """
    memory = inflation_cost.memory_jobs(METHODS)
    held = runner.run(partial(inflation_cost.memory, load=load), memory, "memory", 1, lambda: None, kept)
    peaks: dict[str, dict[str, dict[str, float]]] = {method.name: {} for method in METHODS}
    for job, found in zip(memory, held, strict=True):
        peaks[job.method.name][job.part] = found
    sizes = [inflation_cost.Attention(frames, grid, runs) for grid in GRIDS for frames in FRAMES]
    timed = runner.run(inflation_cost.attention_seconds, sizes, "attention", 1, lambda: None, kept)
    attention = [
        {"frames": size.frames, "grid": size.grid, "seconds": seconds}
        for size, seconds in zip(sizes, timed, strict=True)
    ]
    sides = [inflation_cost.Timing(side, METHODS, runs) for side in SIDES]
    taken = runner.run(inflation_cost.method_seconds, sides, "seconds", 1, load, kept)
    seconds = {f"{job.side}": found for job, found in zip(sides, taken, strict=True)}
    return {"memory": peaks, "attention": attention, "seconds": seconds}


def main(
    clips: int = CLIPS,
    seeds: str = "test",
    workers: int | None = None,
    output: Path = runner.RESULTS,
    load: Callable[[], Studio] = embedded_studio,
    runs: int = RUNS,
    steps: int | None = None,
    timed_runs: int = TIMED_RUNS,
    settings: EI2Settings = SETTINGS,
    tuning: OneShot = TUNING,
) -> list[Record]:
    """Edit, measure, print and save.

    clips: sources, each with the edits of EDITS. runs: seeds of tuning a clip. steps: of the tuning, where not
    tuning's own. timed_runs: of each side of the tables of costs, none with 0. A run that was interrupted goes on where
    it stopped.
    """
    kept = output / "ei2.partial.jsonl"
    tuning = tuning if steps is None else replace(tuning, steps=steps)
    chosen = [SEEDS[seeds] + index for index in range(clips)]
    items: list[Job] = jobs(chosen, list(METHODS), runs, settings, tuning)
    costs = measure_costs(load, timed_runs, kept) if timed_runs else None
    parts = runner.run(work, items, "ei2", workers, load, kept)
    records = [record for part in parts for record in part]
    data = {
        "seeds": seeds,
        "machine": runner.machine(),
        "settings": asdict(settings),
        "tuning": asdict(tuning),
        "methods": [asdict(method) for method in METHODS],
        "records": records,
        "costs": costs,
    }
    runner.save("ei2", report(records, settings, tuning, seeds, costs), data, output)
    kept.unlink()
    return records
