"""Videoshop against the known answer: each variant of the method on each kind of edit."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ..demo.clip import SEEDS
from ..demo.world import EDITS
from ..pipelines.videoshop.settings import DEFAULT, NAIVE, PAPER, REFERENCE
from . import runner
from .editing import REFERENCES, Variant, jobs, work

OWN = "our default"  # the variant that the others are compared with
REFINEMENTS = 2  # of the variant "our default, refined"
MINIMUM_CLIPS = 32  # for a figure in the README

Record = dict[str, Any]


def variants() -> list[Variant]:
    """The rows of the table: the methods, then each inverting one with its normalisation and its rescaling turned.

    Turned is off where the method has it, on where it has not.
    """
    methods = [
        Variant("plain image-to-video, random noise", replace(DEFAULT, rescale=0.0), "noise"),
        Variant("naive, the host's own nodes", replace(NAIVE, normalise="off", rescale=0.0), "host"),
        Variant("naive, the paper's form", NAIVE),
        Variant("reference code", REFERENCE),
        Variant("paper", PAPER),
        Variant(OWN, DEFAULT),
        Variant(f"{OWN}, refined {REFINEMENTS} times", replace(DEFAULT, refine=REFINEMENTS)),
    ]
    turned = []
    for method in methods[1:]:
        has, settings = method.settings.normalise != "off", method.settings
        other = {"normalise": "off", "normalise_condition": False} if has else {"normalise": "channel"}
        turned.append(_turn(method, has, "normalisation", other))
        turned.append(_turn(method, settings.rescale > 0, "rescaling", {"rescale": 0.0 if settings.rescale else 1.0}))
    return methods + turned


def _turn(method: Variant, has: bool, what: str, other: dict[str, Any]) -> Variant:
    name = f"{method.name}, {'without' if has else 'with'} {what}"
    return replace(method, name=name, settings=replace(method.settings, **other))


# Column -> (key of a record, digits, unit)
COLUMNS = {
    "edited region to the true edit, dB": ("psnr_edit", 2),
    "edited region to the source, dB": ("psnr_source", 2),
    "colour transfer, last frame": ("colour_transfer", 2),
    "unedited region, dB": ("psnr_unedited", 2),
    "flow error, pixels": ("flow_error", 2),
    "SSIM, whole frame": ("ssim", 3),
}


def per_clip(records: Sequence[Record], key: str) -> list[float]:
    """One number a clip: the mean over its kinds of edit where there is one; of colour transfer the last frame's."""
    clips: dict[int, list[float]] = {}
    for record in records:
        value = record[key][-1] if isinstance(record[key], list) else record[key]
        if value is not None and not math.isnan(value):
            clips.setdefault(record["seed"], []).append(value)
    return [fmean(values) for values in clips.values()]


def results_table(records: Sequence[Record], names: Sequence[str]) -> str:
    """A row a variant: mean ± standard deviation over clips of each measure, and the network evaluations."""
    rows = []
    for name in names:
        own = [record for record in records if record["variant"] == name]
        cells = [runner.mean_sd(per_clip(own, key), digits) for key, digits in COLUMNS.values()]
        there, back = (fmean(r[f"evaluations_{way}"] for r in own) for way in ("inversion", "denoising"))
        rows.append([name, *cells, "-" if name in REFERENCES else f"{there:g} + {back:g}"])
    return runner.table(["variant", *COLUMNS, "evaluations, inversion + denoising"], rows)


def gain(own: Sequence[Record], base: Sequence[Record]) -> tuple[float, float]:
    """Mean and standard error of the edited-region PSNR over the base's, clip by clip."""
    pairs = zip(per_clip(own, "psnr_edit"), per_clip(base, "psnr_edit"), strict=True)
    differences = [a - b for a, b in pairs]
    error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return fmean(differences), error


def lead_table(records: Sequence[Record], names: Sequence[str], own: str = OWN) -> str:
    """How far one variant's edited region is ahead of each other one's, clip by clip."""
    of = {name: [record for record in records if record["variant"] == name] for name in names}
    leads = [(name, *gain(of[own], of[name])) for name in names if name != own]
    return runner.table(
        ["variant", f"{own} over it, dB ± standard error"], [[n, f"{m:+.2f} ± {e:.2f}"] for n, m, e in leads]
    )


def report(records: Sequence[Record], names: Sequence[str], seeds: str) -> str:
    """All tables as Markdown: the mean over the kinds of edit, then each kind."""
    kinds = [kind for kind in EDITS if any(record["kind"] == kind for record in records)]
    clips = len({record["seed"] for record in records})
    pairs = len({(record["seed"], record["kind"]) for record in records})
    rows = [*REFERENCES, *names]
    text = (
        f"# Videoshop on the synthetic world\n\n{clips} clips of {seeds} seeds with unpredictable motion, "
        "`rewind benchmark videoshop`. Mean ± standard deviation over clips. The edited region is the dilated union of "
        "the source's and the true edit's masks; the flow error counts on the object, and the row of the true edit "
        "shows the error of the estimator itself.\n"
    )
    if "remove" in kinds:
        text += "\nWhere the object is removed, a static edited frame IS the true edit: that row says nothing there.\n"
    if pairs < clips * len(kinds):
        text += "\nOne kind of edit a clip, the kinds in turn (`--in-turn`).\n"
    text += runner.lead(clips, MINIMUM_CLIPS)
    if len(kinds) > 1:
        text += f"\n## Mean of {', '.join(kinds)}\n\n{results_table(records, rows)}"
    if clips > 1 and OWN in names:
        text += f"\n## Edited region, clip by clip\n\n{lead_table(records, names)}"
    for kind in kinds:
        text += f"\n## {kind}\n\n{results_table([r for r in records if r['kind'] == kind], rows)}"
    return text


def has_flow() -> bool:
    """Whether optical flow can be estimated here; says so where not."""
    known = find_spec("cv2") is not None
    if not known:
        print("flow error is not measured: pip install opencv-python-headless", file=sys.stderr)
    return known


def main(
    clips: int = MINIMUM_CLIPS,
    seeds: str = "test",
    kinds: Sequence[str] = EDITS,
    workers: int | None = None,
    output: Path = runner.RESULTS,
    load: Callable[[], Any] = runner.embedded_pipeline,
    chosen: Sequence[Variant] | None = None,
    in_turn: bool = False,
) -> list[Record]:
    """Edit, measure, print and save. chosen: the variants, all of `variants()` by default.

    in_turn: each clip gets one kind of edit, the kinds in turn, which takes a sixth of the time.
    """
    chosen = list(chosen or variants())
    numbers = [SEEDS[seeds] + index for index in range(clips)]
    work_list = jobs(numbers, tuple(kinds), chosen, has_flow(), in_turn)
    kept = output / "videoshop.partial.jsonl"
    parts = runner.run(work, work_list, "videoshop", workers, load, kept)
    records = [record for part in parts for record in part]
    names = [variant.name for variant in chosen]
    settings = {variant.name: asdict(variant.settings) for variant in chosen}
    data = {"seeds": seeds, "machine": runner.machine(), "settings": settings, "records": records}
    runner.save("videoshop", report(records, names, seeds), data, output)
    kept.unlink()
    return records
