"""What keeps an edit alive to the last frame, against the known answer, at nearly equal network evaluations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ..demo.clip import SEEDS, Example, example
from ..demo.world import EDITS
from ..pipelines.evaluation.metrics import psnr
from ..pipelines.videoshop.pipeline import VideoshopPipeline
from ..pipelines.videoshop.settings import DEFAULT
from . import runner
from .editing import Variant, counted
from .statistics import estimate, margin, share
from .strengthening import DRAWS, Candidate, edit, not_inverted

CLIPS = 16
OWN = "our default"
VAE = "true edit through the VAE"  # the reference rows: no edit can be nearer than it,
SOURCE = "unedited source"  # and no edit that lives should be further

Record = dict[str, Any]

# What takes two evaluations a level, or guidance, gets fewer levels, so that all cost nearly the default's 26: 9 levels
# in the place of 13, or 11.
NINE = replace(DEFAULT, steps=17)
FURTHER = replace(NINE, strength=0.76)  # 12 levels, from sigma 83, where no inversion is paid for
GUIDED = replace(DEFAULT, first_guidance=1.0, last_guidance=3.0)  # Stable Video Diffusion's own, rising over the frames

CANDIDATES = (
    Candidate(OWN, "default"),
    Candidate("difference of branches, stored trajectory", "difference", "difference", NINE),
    Candidate("difference of branches, drawn noise", "difference", "difference, drawn noise"),
    Candidate("difference of branches, drawn noise from sigma 83", "difference", "difference, drawn noise", FURTHER),
    Candidate("guidance 1 to 3, all levels", "guidance", settings=replace(GUIDED, steps=17)),
    Candidate(
        "guidance 1 to 3, sigma 0.5 to 5", "guidance", settings=replace(GUIDED, steps=20, guidance_interval=(0.5, 5.0))
    ),
    Candidate("source residuals put back outside the edit", "residuals", "residuals", NINE),
    Candidate("stored source put back outside the edit", "residuals", "put back"),
    Candidate("noise renormalised by channel", "noise", "renormalised by channel"),
    Candidate("noise renormalised by frame and channel", "noise", "renormalised by frame"),
    Candidate(
        "normalised by channel, rescaled", "normalisation", settings=replace(DEFAULT, normalise="channel", rescale=1.0)
    ),
    Candidate(
        "normalised by frame, rescaled", "normalisation", settings=replace(DEFAULT, normalise="frame", rescale=1.0)
    ),
    Candidate("not normalised, rescaled", "normalisation", settings=replace(DEFAULT, rescale=1.0)),
)

# What test seeds are spent on: of each family the one whose edited region gained most, or lost least, on 6 validation
# clips (benchmarks/results/stronger_validation.md).
FINALISTS = (
    OWN,
    "difference of branches, drawn noise",
    "guidance 1 to 3, all levels",
    "source residuals put back outside the edit",
    "noise renormalised by frame and channel",
    "not normalised, rescaled",
)


def finalists() -> tuple[Candidate, ...]:
    """The default and the best candidate of each family."""
    return tuple(candidate for candidate in CANDIDATES if candidate.name in FINALISTS)


@dataclass(frozen=True)
class Job:
    """One clip, and how it is edited."""

    seed: int
    kinds: tuple[str, ...]
    candidates: tuple[Candidate, ...]


def measure(frames: Tensor, chosen: Example) -> Record:
    """The measures of a result [T, 3, H, W] in 0..1; PSNR in dB.

    An edit is alive that, on the last frame in the edited region, is nearer to the true edit than to the source, and
    nearer to it than the source itself is: neither has the source come back, nor something else in its place.
    """
    last = [clip[-1:] for clip in (frames, chosen.target, chosen.source)]
    region = chosen.region[-1:]
    to_edit, to_source, untouched = (
        psnr(a, b, region) for a, b in ((last[0], last[1]), (last[0], last[2]), (last[2], last[1]))
    )
    return {
        "psnr_edit": psnr(frames, chosen.target, chosen.region),
        "psnr_last": to_edit,
        "alive": to_edit > to_source and to_edit > untouched,
        "psnr_unedited": psnr(frames, chosen.source, 1 - chosen.region),
    }


@torch.no_grad()
def work(pipeline: VideoshopPipeline, job: Job) -> list[Record]:
    """All rows of one clip: a record for each of its candidates and kinds of edit."""
    examples = [example(job.seed, kind) for kind in job.kinds]
    source, records = examples[0].source, []

    def keep(chosen: Example, name: str, frames: Tensor, evaluations: int = 0) -> None:
        about = {"seed": job.seed, "kind": chosen.kind, "variant": name, "evaluations": evaluations}
        records.append(about | measure(frames, chosen))

    for chosen in examples:
        keep(chosen, VAE, pipeline.decode(pipeline.encode(chosen.target)))
        keep(chosen, SOURCE, chosen.source)

    def shared(candidate: Candidate) -> str:
        return repr((candidate.way == DRAWS, Variant("", candidate.settings).shared))

    for _, group in groupby(sorted(job.candidates, key=shared), key=shared):
        own = list(group)
        if own[0].way == DRAWS:
            inversion = not_inverted(pipeline, source, own[0].settings, job.seed)
        else:
            generator = torch.Generator().manual_seed(job.seed)
            inversion = pipeline.invert(source, own[0].settings, generator, keep_trajectory=True)
        for chosen in examples:
            for candidate in own:
                with counted(pipeline.unet) as calls:
                    latents = edit(pipeline, inversion, chosen, candidate, job.seed)
                keep(chosen, candidate.name, pipeline.decode(latents), inversion.evaluations + len(calls))
    return records


# Column -> (key of a record, digits)
COLUMNS = {
    "edited region to the true edit, dB": ("psnr_edit", 2),
    "the same on the last frame, dB": ("psnr_last", 2),
    "unedited region to the source, dB": ("psnr_unedited", 2),
}


def of(records: Sequence[Record], name: str) -> list[Record]:
    """The records of one row."""
    return [record for record in records if record["variant"] == name]


def results_table(records: Sequence[Record], names: Sequence[str]) -> str:
    """A row a candidate: mean and 95 % interval over clips, and the network evaluations of one edit."""
    rows = []
    for name in (VAE, SOURCE, *names):
        own = of(records, name)
        cells = [estimate(own, key, digits) for key, digits in COLUMNS.values()]
        evaluations = fmean(record["evaluations"] for record in own)
        rows.append([name, *cells, share(own, "alive"), f"{evaluations:g}" if evaluations else "-"])
    return runner.table(["variant", *COLUMNS, "alive on the last frame", "evaluations"], rows)


def wins(own: Sequence[Record], base: Sequence[Record]) -> bool:
    """Whether a candidate is outside the noise better than the base in the edited region, over the clip and on its last
    frame, and not outside the noise worse in the unedited one: the rule by which it may become the default."""
    gained = all(margin(own, base, key)[1] > 0 for key in ("psnr_edit", "psnr_last"))
    return gained and not margin(base, own, "psnr_unedited")[1] > 0


def gain_table(records: Sequence[Record], names: Sequence[str]) -> str:
    """How far each candidate is ahead of the default, clip by clip, with the lower 95 % bound of the mean."""
    base, rows = of(records, OWN), []
    for name in names:
        if name != OWN:
            own = of(records, name)
            gains = [margin(own, base, key) for key in ("psnr_edit", "psnr_last", "psnr_unedited", "alive")]
            cells = [f"{mean:+.2f} ({bound:+.2f})" for mean, bound in gains]
            rows.append([name, *cells, "yes" if wins(own, base) else "no"])
    header = ["variant", "edited region, dB", "on the last frame, dB", "unedited region, dB", "alive", "wins"]
    return runner.table(header, rows)


def report(records: Sequence[Record], names: Sequence[str], seeds: str) -> str:
    """All tables as Markdown: the results, the gains, then each kind of edit."""
    kinds = [kind for kind in EDITS if any(record["kind"] == kind for record in records)]
    clips = len({record["seed"] for record in records})
    text = (
        f"# Stronger edits\n\n{clips} clips of {seeds} seeds, each with one kind of edit in turn, `rewind benchmark "
        f"stronger{'' if seeds == 'test' else f' --seeds {seeds}'} --clips {clips}`: mean and 95 % interval over "
        "clips. An edit is alive that, on the last frame in the edited region, is nearer to the true edit than to the "
        "source, and nearer to it than the source itself is. Evaluations are those of one edit, its inversion "
        "included.\n"
    )
    text += runner.lead(clips, CLIPS)
    text += f"\n{results_table(records, names)}"
    if clips > 1:
        text += (
            f"\n## Gain over {OWN}, clip by clip\n\nMean, and its lower 95 % bound. A candidate wins whose bounds in "
            "the edited region are above 0, over the clip and on its last frame, and whose unedited region is not "
            f"worse outside the noise.\n\n{gain_table(records, names)}"
        )
    for kind in kinds if len(kinds) > 1 else ():
        text += f"\n## {kind}\n\n{results_table([record for record in records if record['kind'] == kind], names)}"
    return text


def main(
    clips: int = CLIPS,
    seeds: str = "test",
    kinds: Sequence[str] = EDITS,
    workers: int | None = None,
    output: Path = runner.RESULTS,
    load: Callable[[], Any] = runner.embedded_pipeline,
    chosen: Sequence[Candidate] | None = None,
) -> list[Record]:
    """Edit by each candidate, measure, print and save.

    chosen: the candidates; by default all of them on validation seeds, and on test seeds what was best there.
    """
    name = "stronger" if seeds == "test" else f"stronger_{seeds}"
    chosen = tuple(chosen or (finalists() if seeds == "test" else CANDIDATES))
    jobs = [Job(SEEDS[seeds] + index, (kinds[index % len(kinds)],), chosen) for index in range(clips)]
    kept = output / f"{name}.partial.jsonl"
    records = [record for part in runner.run(work, jobs, "stronger", workers, load, kept) for record in part]
    data = {
        "seeds": seeds,
        "machine": runner.machine(),
        "candidates": {each.name: {"way": each.way} | asdict(each.settings) for each in chosen},
        "records": records,
    }
    runner.save(name, report(records, [each.name for each in chosen], seeds), data, output)
    kept.unlink()
    return records
