"""The gates of the embedded models: are they good enough for what is measured on them to mean anything.

Each gate is a lower 95 % confidence bound on a mean over clips of test seeds; those of the text models are in
`text_to_video.py` and `text_to_image.py`. A gate that is not met is printed as FAILED with its true numbers.
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
from ..pipelines.dreamix.pipeline import DreamixSettings
from ..pipelines.evaluation.metrics import colour_transfer, lower_bound, psnr
from ..pipelines.videoshop.settings import DEFAULT, VideoshopSettings
from . import runner, text_to_image, text_to_video


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


def report(
    verdicts: list[dict[str, Any]],
    rows: list[dict[str, float]],
    shares: list[text_to_video.Share],
    guidances: tuple[float, float],
    seeds: str,
) -> str:
    """The gates as a Markdown table, the numbers behind the differences below it.

    shares: of the text models; guidances: those of text-to-video and text-to-image.
    """

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
    gates = [*map(line, verdicts), *(share.cells() for share in shares if share.verdict)]
    return (
        f"# Gates of the embedded models\n\n{len(rows)} clips of {seeds} seeds, `rewind benchmark model`. Plain "
        f"image-to-video is guided from {GUIDANCE['first_guidance']:g} on the first frame to "
        f"{GUIDANCE['last_guidance']:g} on the last, Videoshop as it is by default, text-to-video (as many captions "
        f"that name everything) by {guidances[0]:g}, text-to-image ({text_to_image.PICTURES} times as many, without "
        f"motion) by {guidances[1]:g}; of their shares the bound is Wilson's.\n\n"
        + runner.table(header, gates)
        + "\n"
        + runner.table(["PSNR to the truth", "dB"], details)
        + "\n"
        + runner.table(header[:-1], [share.cells()[:-1] for share in shares if not share.verdict])
    )


def main(
    clips: int = 64,
    seeds: str = "test",
    workers: int | None = None,
    output: Path = runner.RESULTS,
    load: Callable[[], Any] = runner.embedded_pipeline,
    settings: VideoshopSettings = DEFAULT,
    load_text: Callable[[], Any] = runner.embedded_text_pipeline,
    text_settings: DreamixSettings = text_to_video.SETTINGS,
    load_image: Callable[[], Any] = runner.embedded_image_model,
    image_settings: text_to_image.Sampling = text_to_image.SETTINGS,
) -> bool:
    """Measure, print and save; True when every gate is passed."""
    chosen = [SEEDS[seeds] + index for index in range(clips)]
    rows = runner.run(partial(measure, settings=settings), chosen, "gates", workers, load)
    said = runner.run(
        partial(text_to_video.measure, settings=text_settings),
        text_to_video.seeds_of(seeds, clips),
        "text-to-video gates",
        workers,
        load_text,
    )
    drawn = runner.run(
        partial(text_to_image.measure, settings=image_settings),
        text_to_image.seeds_of(seeds, clips),
        "text-to-image gates",
        workers,
        load_image,
    )
    verdicts, shares = judge(rows), [*text_to_video.judge(said), *text_to_image.judge(drawn)]
    data = {"seeds": seeds, "machine": runner.machine(), "gates": verdicts, "clips": rows}
    data |= {"captions": said, "pictures": drawn}
    guidances = (text_settings.guidance, image_settings.guidance)
    runner.save("model", report(verdicts, rows, shares, guidances, seeds), data, output)
    return all(verdict["passed"] for verdict in verdicts) and all(share.verdict != "FAILED" for share in shares)
