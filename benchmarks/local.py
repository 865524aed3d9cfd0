"""Edits under a mask against the known answer: what of the frame comes back, and what shows at the mask's edge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..demo.clip import SEEDS, Example, example
from ..demo.world import EDITS
from ..pipelines.evaluation.metrics import psnr, seam_error
from ..pipelines.videoshop.masks import DEFAULT_MASK, composite_pixels, edit_mask, latent_mask, soften
from ..pipelines.videoshop.pipeline import VideoshopPipeline
from ..pipelines.videoshop.settings import DEFAULT, VideoshopSettings
from . import runner
from .statistics import estimate

CLIPS = 16
FEATHER = 8  # pixels of the feathered variants
VAE = "true edit through the VAE"  # the reference row: no edit can be nearer than it, unless pixels are kept

Record = dict[str, Any]


@dataclass(frozen=True)
class Masking:
    """A row of the table."""

    name: str
    mask: Literal["true", "propagated"]
    latents: bool = True  # the source's are put back outside the mask
    pixels: bool = False  # the source's are kept outside the mask
    match: bool = True  # the colours are shifted to the source's around the mask
    feather: int = 0


VARIANTS = (
    Masking("no mask", "true", latents=False),
    Masking("true mask", "true"),
    Masking("propagated mask", "propagated"),
    Masking("propagated mask, feathered", "propagated", feather=FEATHER),
    Masking("no mask, pixels kept outside the true one", "true", latents=False, pixels=True),
    Masking("true mask, pixels kept", "true", pixels=True),
    Masking("no mask, pixels kept outside the propagated one", "propagated", latents=False, pixels=True),
    Masking("propagated mask, pixels kept, colours as they are", "propagated", pixels=True, match=False),
    Masking("propagated mask, pixels kept", "propagated", pixels=True),
    Masking("propagated mask, feathered, pixels kept", "propagated", pixels=True, feather=FEATHER),
)


@dataclass(frozen=True)
class Job:
    """One clip, which is inverted once, and its edits."""

    seed: int
    kinds: tuple[str, ...]
    settings: VideoshopSettings = DEFAULT


def mask_of(chosen: Example) -> Tensor:
    """The mask that a user would make of an edit, [T, H, W]: one too faint for the default threshold gets half its own.

    That is a background of nearly the old one's colours.
    """
    most = float((chosen.edited_frame - chosen.source[0]).abs().max())
    own = DEFAULT_MASK if most > DEFAULT_MASK.threshold else replace(DEFAULT_MASK, threshold=most / 2)
    return edit_mask(chosen.source, chosen.edited_frame, own)


def make_masks(chosen: Example) -> dict[tuple[str, int], Tensor]:
    """The masks of an edit by their origin and feather, [T, H, W]: the truth's, and the one made of the difference."""
    propagated = mask_of(chosen)
    hard = {"true": chosen.region, "propagated": propagated}
    return {(name, feather): soften(mask, 0, feather) for name, mask in hard.items() for feather in (0, FEATHER)}


def iou(mask: Tensor, truth: Tensor) -> float:
    """Intersection over union of two masks, over the whole clip."""
    mask, truth = mask > 0, truth > 0
    return float((mask & truth).sum() / (mask | truth).sum())


def edge(row: Masking, mask: Tensor, shape: torch.Size) -> Tensor:
    """The mask at whose edge the result changes from one to the other, in pixels: of latents their whole patches."""
    if row.pixels or not row.latents:
        return mask
    return interpolate(latent_mask(mask, shape), mask.shape[1:], mode="nearest")[:, 0]


def measure(frames: Tensor, chosen: Example, edged: Tensor) -> Record:
    """The measures of a result [T, 3, H, W]; edged: the mask at whose edge the seam is looked for."""
    return {
        "psnr_edit": psnr(frames, chosen.target, chosen.region),
        "psnr_unedited": psnr(frames, chosen.source, 1 - chosen.region),
        "seam": seam_error(frames, chosen.target, edged),
    }


@torch.no_grad()
def work(pipeline: VideoshopPipeline, job: Job) -> list[Record]:
    """All rows of one clip: a record for each of its variants and kinds of edit."""
    examples = [example(job.seed, kind) for kind in job.kinds]
    source = examples[0].source
    generator = torch.Generator().manual_seed(job.seed)
    inversion = pipeline.invert(source, job.settings, generator, keep_trajectory=True)
    records = []
    for chosen in examples:
        masks, decoded = make_masks(chosen), {}
        about = {"seed": job.seed, "kind": chosen.kind}
        through = pipeline.decode(pipeline.encode(chosen.target))
        records.append(about | {"variant": VAE, "iou": 1.0} | measure(through, chosen, chosen.region))
        for row in VARIANTS:
            mask = masks[row.mask, row.feather]
            key = (row.mask, row.feather) if row.latents else None
            if key not in decoded:
                kept = mask if row.latents else None
                decoded[key] = pipeline.decode(
                    pipeline.denoise(inversion, chosen.edited_frame, job.settings, mask=kept)
                )
            frames = composite_pixels(decoded[key], source, mask, row.match) if row.pixels else decoded[key]
            found = measure(frames, chosen, edge(row, mask, inversion.latent.shape))
            records.append(about | {"variant": row.name, "iou": iou(mask, chosen.region)} | found)
    return records


# Column -> (key of a record, digits)
COLUMNS = {
    "edited region to the true edit, dB": ("psnr_edit", 2),
    "unedited region to the source, dB": ("psnr_unedited", 2),
    "seam, levels of 255": ("seam", 2),
    "mask over the true one, IoU": ("iou", 2),
}


def results_table(records: Sequence[Record]) -> str:
    """A row a variant: mean and 95 % interval over clips."""
    rows = []
    for name in (VAE, *(row.name for row in VARIANTS)):
        own = [record for record in records if record["variant"] == name]
        rows.append([name, *(estimate(own, key, digits) for key, digits in COLUMNS.values())])
    return runner.table(["variant", *COLUMNS], rows)


def report(records: Sequence[Record], seeds: str) -> str:
    """All tables as Markdown: the mean over the kinds of edit, then each kind."""
    kinds = [kind for kind in EDITS if any(record["kind"] == kind for record in records)]
    clips = len({record["seed"] for record in records})
    text = (
        f"# Edits under a mask\n\n{clips} clips of {seeds} seeds, `rewind benchmark local`: mean and 95 % interval "
        "over clips. The true mask is where the true edit may show; the propagated one is made of the edited first "
        f"frame and followed through the source (threshold {DEFAULT_MASK.threshold:g}, grown by {DEFAULT_MASK.grow} "
        f"pixels, feathered by {FEATHER} where it says so). The seam is the mean error of the step across the mask's "
        "edge against the true edit's; without a mask it is looked for at the true mask's edge. 100 dB is equal to the "
        "bit.\n"
    )
    text += runner.lead(clips, CLIPS)
    if len(kinds) > 1:
        text += f"\n## Mean of {', '.join(kinds)}\n\n{results_table(records)}"
    for kind in kinds:
        text += f"\n## {kind}\n\n{results_table([record for record in records if record['kind'] == kind])}"
    return text


def main(
    clips: int = CLIPS,
    seeds: str = "test",
    kinds: Sequence[str] = EDITS,
    workers: int | None = None,
    output: Path = runner.RESULTS,
    load: Callable[[], Any] = runner.embedded_pipeline,
    settings: VideoshopSettings = DEFAULT,
) -> list[Record]:
    """Edit under each mask, measure, print and save."""
    jobs = [Job(SEEDS[seeds] + index, tuple(kinds), settings) for index in range(clips)]
    kept = output / "local.partial.jsonl"
    records = [record for part in runner.run(work, jobs, "local", workers, load, kept) for record in part]
    data = {
        "seeds": seeds,
        "machine": runner.machine(),
        "settings": asdict(settings),
        "mask": asdict(DEFAULT_MASK) | {"feathered": FEATHER},
        "records": records,
    }
    runner.save("local", report(records, seeds), data, output)
    kept.unlink()
    return records
