"""A long clip decoded in chunks, against the same clip decoded at once: what the joins look like beside the middles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..demo import world as W
from ..demo.clip import SEEDS, world_of
from ..pipelines.chunks import decode_in_chunks, decoder, spans
from ..pipelines.evaluation.metrics import psnr
from ..pipelines.videoshop.pipeline import VideoshopPipeline
from . import runner

FRAMES = 32  # four times the embedded model's length
WORLD = world_of(FRAMES)
CHUNKS = {8: (0, 1, 2, 4), 14: (0, 1, 2, 4, 7)}  # frames at once: overlaps


def joins(parts: Sequence[tuple[int, int]]) -> list[range]:
    """The frames of each join: those that two chunks share, and one to each side."""
    return [range(after[0] - 1, before[1] + 1) for before, after in zip(parts, parts[1:])]


def beside(shown: Tensor, whole: Tensor, parts: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Figures of a clip [T, 3, H, W] in chunks against the clip decoded at once, at the joins and in the middles.

    psnr: of the frames there, dB. step: how much the error changes from one frame to the next (root mean square over
    pixels, of 255), in the mean: where that is larger at the joins, a seam is seen.
    """
    at = joins(parts)
    near = {frame for join in at for frame in join}
    far = [frame for frame in range(len(whole)) if frame not in near]
    steps = 255 * (shown - whole).diff(dim=0).square().mean((1, 2, 3)).sqrt()
    across = sorted({i for join in at for i in join[:-1]})
    inside = [i for i in range(len(steps)) if i in far and i + 1 in far]
    return {
        "psnr_joins": psnr(shown[sorted(near)], whole[sorted(near)]),
        "psnr_middles": psnr(shown[far], whole[far]),
        "step_joins": float(steps[across].mean()),
        "step_middles": float(steps[inside].mean()),
    }


@torch.no_grad()
def work(pipeline: VideoshopPipeline, seed: int) -> list[dict[str, Any]]:
    """All ways to cut one clip: a record each."""
    generator = torch.Generator().manual_seed(seed)
    source = W.render(W.sample(1, generator, WORLD, "unpredictable", editable=True))[0][0]
    z = pipeline.encode(source) / pipeline.scaling_factor
    decode = decoder(pipeline.vae)
    whole = decode(z).cpu()
    records = []
    for chunk, overlaps in CHUNKS.items():
        for overlap in overlaps:
            shown, parts = decode_in_chunks(decode, z, chunk, overlap), spans(len(z), chunk, overlap)
            decoded = sum(end - start for start, end in parts)
            row = {"seed": seed, "chunk": chunk, "overlap": overlap, "decoded": decoded / len(z)}
            records.append(row | beside(shown, whole, parts) | {"psnr_vae": psnr(whole, source)})
    return records


# Column -> (key of a record, digits)
COLUMNS = {
    "PSNR to the whole, joins, dB": ("psnr_joins", 1),
    "middles, dB": ("psnr_middles", 1),
    "step of the error, joins, of 255": ("step_joins", 3),
    "middles, of 255": ("step_middles", 3),
}


def report(records: Sequence[dict[str, Any]], seeds: str) -> str:
    """The table as Markdown."""
    rows = []
    for chunk, overlap in dict.fromkeys((r["chunk"], r["overlap"]) for r in records):
        own = [r for r in records if (r["chunk"], r["overlap"]) == (chunk, overlap)]
        cells = [runner.mean_sd((r[key] for r in own), digits) for key, digits in COLUMNS.values()]
        seam = runner.mean_sd((r["step_joins"] / r["step_middles"] for r in own), 1)
        rows.append([f"{chunk} frames", str(overlap), f"{own[0]['decoded']:.2f}", *cells, seam])
    clips, vae = len({r["seed"] for r in records}), runner.mean_sd((r["psnr_vae"] for r in records), 1)
    header = ["chunk", "overlap", "decoded, times the clip", *COLUMNS, "joins to middles"]
    return (
        f"# A clip decoded in chunks\n\n{clips} clips of {FRAMES} frames of {seeds} seeds, `rewind benchmark chunks`: "
        "their latents by the embedded model's VAE, decoded in chunks and at once. A step of the error is how much the "
        "difference between the two changes from a frame to the next. Mean ± standard deviation "
        f"over clips. The whole clip against its source: {vae} dB.\n\n" + runner.table(header, rows)
    )


def main(
    clips: int = 8,
    seeds: str = "test",
    workers: int | None = None,
    output: Path = runner.RESULTS,
    load: Callable[[], Any] = runner.embedded_pipeline,
) -> list[dict[str, Any]]:
    """Measure, print and save."""
    numbers = [SEEDS[seeds] + index for index in range(clips)]
    parts = runner.run(work, numbers, "chunks", workers, load)
    records = [record for part in parts for record in part]
    runner.save(
        "chunks", report(records, seeds), {"seeds": seeds, "machine": runner.machine(), "records": records}, output
    )
    return records
