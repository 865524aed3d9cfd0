"""Which settings edit best: chosen on validation seeds, never on test seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from ..demo.clip import SEEDS
from ..pipelines.videoshop.settings import DEFAULT, VideoshopSettings
from . import runner
from .editing import Variant, jobs, work
from .videoshop import Record, gain, per_clip

KINDS = ("recolour", "reshape")  # by default: colour and outline, the two that fade on the way

# Tried one at a time where the command line names nothing.
ONE_AT_A_TIME = (
    "guess=extrapolation:random,extrapolation:current,extrapolation:last_direction,last_direction:random,"
    "last_direction:last_direction,current:random,current:current",
    "threshold=0.3,1,3",
    "strength=0.4,0.55,0.7,0.85,1",
    "sigma_max=80,700",
    "guidance=1:1,1:2,2:2,1:3,3:3",
    "normalise=off,channel,frame",
    "rescale=0,1",
    "augmentation=0,0.02,0.1",
    "refine=0,1",
)


def parse(choice: str) -> list[dict[str, Any]]:
    """ "threshold=0.3,1" as [{"threshold": 0.3}, {"threshold": 1.0}].

    The names are VideoshopSettings' fields, and two that set a pair of them: "guidance=1:1,1:3" (first and last
    frame) and "guess=extrapolation:random" (above and below the threshold). Raises ValueError for an unknown name or a
    value of another type.
    """
    name, _, values = choice.partition("=")
    if name == "guidance":
        pairs = [_pair(value) for value in values.split(",")]
        return [{"first_guidance": first, "last_guidance": last} for first, last in pairs]
    if name == "guess":
        named = [value.partition(":") for value in values.split(",")]
        return [{"guess_above": above, "guess_below": below} for above, _, below in named]
    known = [field.name for field in fields(VideoshopSettings)]
    if name not in known:
        raise ValueError(f'there is no setting "{name}"; the settings are guidance, guess, {", ".join(known)}')
    return [{name: _value(getattr(DEFAULT, name), value)} for value in values.split(",")]


def _pair(text: str) -> tuple[float, float]:
    first, _, last = text.partition(":")
    return float(first), float(last or first)


def _value(like: Any, text: str) -> Any:
    if isinstance(like, bool):
        if text not in ("true", "false"):
            raise ValueError(f'"{text}" is neither true nor false')
        return text == "true"
    return _pair(text) if isinstance(like, tuple) else type(like)(text)


def name_of(settings: VideoshopSettings, base: VideoshopSettings) -> str:
    """What settings change of the base."""
    changed = [f"{key} {value}" for key, value in asdict(settings).items() if value != getattr(base, key)]
    return ", ".join(changed) or "base"


def candidates(choices: Sequence[str], base: VideoshopSettings) -> list[Variant]:
    """The base, and every combination of the choices; without choices ONE_AT_A_TIME."""
    if choices:
        grid = [{k: v for part in parts for k, v in part.items()} for parts in product(*map(parse, choices))]
    else:
        grid = [change for choice in ONE_AT_A_TIME for change in parse(choice)]
    settings = dict.fromkeys([base, *(replace(base, **change) for change in grid)])
    return [Variant(name_of(each, base), each) for each in settings]


def ranking(records: Sequence[Record], variants: Sequence[Variant]) -> str:
    """A Markdown table, best first: by the edited region's PSNR, then by the last frame's colour transfer."""
    by_name = {v.name: [r for r in records if r["variant"] == v.name] for v in variants}
    rows = []
    for name, own in by_name.items():
        edit, transfer = (runner.summary(per_clip(own, key))["mean"] for key in ("psnr_edit", "colour_transfer"))
        mean, error = gain(own, by_name["base"])
        cells = [f"{edit:.2f}", f"{mean:+.2f} ± {error:.2f}", "-" if math.isnan(transfer) else f"{transfer:.3f}"]
        cells.append(f"{runner.summary(per_clip(own, 'psnr_unedited'))['mean']:.2f}")
        cells.append(
            " + ".join(f"{fmean(r[f'evaluations_{way}'] for r in own):g}" for way in ("inversion", "denoising"))
        )
        rows.append((-edit, -transfer, [name, *cells]))
    header = ["settings", "edited region, dB", "over the base ± standard error", "colour transfer, last frame"]
    header += ["unedited region, dB", "evaluations"]
    return runner.table(header, (row for *_, row in sorted(rows, key=lambda row: row[:2])))


def main(
    choices: Sequence[str] = (),
    clips: int = 8,
    seeds: str = "validation",
    kinds: Sequence[str] = KINDS,
    workers: int | None = None,
    output: Path = runner.RESULTS,
    load: Callable[[], Any] = runner.embedded_pipeline,
    base: VideoshopSettings = DEFAULT,
) -> list[Record]:
    """Edit with every candidate, rank, print and save. Raises ValueError for test seeds: they are for the figures."""
    if seeds == "test":
        raise ValueError("a sweep chooses settings, so it takes validation seeds; test seeds are for the figures")
    variants = candidates(choices, base)
    work_list = jobs([SEEDS[seeds] + index for index in range(clips)], tuple(kinds), variants, with_flow=False)
    work_list = [job for job in work_list if job.variants]
    records = [record for part in runner.run(work, work_list, "sweep", workers, load) for record in part]
    base_text = ", ".join(f"{key} {value}" for key, value in asdict(base).items())
    command = " ".join(["rewind benchmark videoshop --sweep", *choices, "--clips", str(clips), "--kinds", *kinds])
    text = f"# Sweep\n\n`{command}`: {clips} clips of {seeds} seeds. Base: {base_text}.\n\n"
    data = {"seeds": seeds, "settings": {v.name: asdict(v.settings) for v in variants}, "records": records}
    runner.save("sweep", text + ranking(records, variants), data, output)
    return records
