"""The gates of the embedded model: is it good enough for what is measured on it to mean anything.

Each gate is a lower 95 % confidence bound on a mean over clips of test seeds. A gate that is not met is printed as
FAILED with its true numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..demo.clip import SEEDS, example
from ..pipelines.evaluation.metrics import colour_transfer, lower_bound, psnr
from ..pipelines.videoshop.settings import DEFAULT, VideoshopSettings
from . import runner


@dataclass(frozen=True)
class Gate:
    """A bound that a mean over clips must reach."""

    key: str  # of what `measure` returns
    text: str
    limit: float
    unit: str


GATES = (
    Gate("vae", "VAE: a clip encoded and decoded", 32.0, "dB"),
    Gate("image_to_video", "image-to-video on predictable clips", 24.0, "dB"),
    Gate("image_to_video_gain", "image-to-video on predictable clips, over a frozen first frame", 5.0, "dB"),
    Gate("colour_transfer", "Videoshop, recolouring: colour transfer on the last frame", 0.8, ""),
    Gate("edit_over_static", "Videoshop, recolouring: edited region, over a static edited frame", 3.0, "dB"),
    Gate("edit_over_random", "Videoshop, recolouring: edited region, over plain image-to-video", 3.0, "dB"),
)


# Plain image-to-video is sampled as SVD's own pipelines sample it, guided from 1 on the first frame to 3 on the last.
# On 12 validation clips that is 1.1 +- 0.3 dB better than without guidance.
GUIDANCE = {"first_guidance": 1.0, "last_guidance": 3.0}


@torch.no_grad()
def measure(pipeline: Any, seed: int, settings: VideoshopSettings = DEFAULT) -> dict[str, float]:
    """All that the gates ask of one seed: a predictable clip, and the recolouring of an unpredictable one."""

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    straight = example(seed, motion="predictable")
    plain = replace(settings, **GUIDANCE)
    told = replace(plain, motion_bucket=round(straight.motion_bucket))
    frames = len(straight.source)
    animated = pipeline.decode(pipeline.image_to_video(straight.source[0], told, generator(), frames))
    frozen = straight.source[:1].expand_as(straight.source)

    wild = example(seed, "recolour", "unpredictable")
    picture = wild.edited_frame
    edited = pipeline(wild.source, picture, settings, generator(), progress=False).frames
    random = pipeline.decode(pipeline.image_to_video(picture, plain, generator(), frames))
    static = wild.target[:1].expand_as(wild.target)
    edit, by_static, by_random = (psnr(clip, wild.target, wild.region) for clip in (edited, static, random))
    transfer = colour_transfer(edited, wild.source, wild.target, wild.target_mask)
    return {
        "vae": psnr(pipeline.decode(pipeline.encode(wild.source)), wild.source),
        "image_to_video": psnr(animated, straight.source),
        "frozen": psnr(frozen, straight.source),
        "image_to_video_gain": psnr(animated, straight.source) - psnr(frozen, straight.source),
        "colour_transfer": float(transfer[-1]),
        "edit": edit,
        "edit_static": by_static,
        "edit_random": by_random,
        "edit_over_static": edit - by_static,
        "edit_over_random": edit - by_random,
    }


def judge(rows: list[dict[str, float]]) -> list[dict[str, Any]]:
    """Each gate with its mean, standard deviation and lower bound over the clips, and whether it is passed."""
    verdicts = []
    for gate in GATES:
        values = [row[gate.key] for row in rows]
        bound = lower_bound(values)
        stats = runner.summary(values)
        told = {"gate": gate.text, "unit": gate.unit, "needed": gate.limit, "lower_bound": bound}
        verdicts.append(told | stats | {"passed": not math.isnan(bound) and bound >= gate.limit})
    return verdicts


def report(verdicts: list[dict[str, Any]], rows: list[dict[str, float]], seeds: str) -> str:
    """The gates as a Markdown table, the numbers behind the differences below it."""

    def line(verdict: dict[str, Any]) -> list[str]:
        unit = f" {verdict['unit']}".rstrip()
        numbers = [f"{verdict['mean']:.2f} ± {verdict['sd']:.2f}{unit}", f"{verdict['lower_bound']:.2f}{unit}"]
        return [verdict["gate"], f"{verdict['needed']:g}{unit}", *numbers, "PASSED" if verdict["passed"] else "FAILED"]

    header = ["gate", "needed", "mean ± sd of clips", "lower 95 % bound", ""]
    behind = {
        "image-to-video, predictable clips": "image_to_video",
        "frozen first frame, predictable clips": "frozen",
        "recolouring, edited region: Videoshop": "edit",
        "recolouring, edited region: static edited frame": "edit_static",
        "recolouring, edited region: plain image-to-video": "edit_random",
    }
    details = [[text, runner.mean_sd((row[key] for row in rows), 2)] for text, key in behind.items()]
    return (
        f"# Gates of the embedded model\n\n{len(rows)} clips of {seeds} seeds, `rewind benchmark model`. Plain "
        f"image-to-video is guided from {GUIDANCE['first_guidance']:g} on the first frame to "
        f"{GUIDANCE['last_guidance']:g} on the last, Videoshop as it is by default.\n\n"
        + runner.table(header, map(line, verdicts))
        + "\n"
        + runner.table(["PSNR to the truth", "dB"], details)
    )


def main(
    clips: int = 64,
    seeds: str = "test",
    workers: int | None = None,
    output: Path = runner.RESULTS,
    load: Callable[[], Any] = runner.embedded_pipeline,
    settings: VideoshopSettings = DEFAULT,
) -> bool:
    """Measure, print and save; True when every gate is passed."""
    chosen = [SEEDS[seeds] + index for index in range(clips)]
    rows = runner.run(partial(measure, settings=settings), chosen, "gates", workers, load)
    verdicts = judge(rows)
    data = {"seeds": seeds, "machine": runner.machine(), "gates": verdicts, "clips": rows}
    runner.save("model", report(verdicts, rows, seeds), data, output)
    return all(verdict["passed"] for verdict in verdicts)
