"""The gates of the embedded text-to-video model: does it show what a caption says.

Captions of test seeds that name all there is to name, clips from pure noise, read from their pixels. A gate is a lower
95 % confidence bound on the share of clips that are right (Wilson's score).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..demo import captions
from ..demo.recognition import recognise
from ..demo.text_edits import SEEDS
from ..pipelines.dreamix.pipeline import DreamixPipeline, DreamixSettings
from ..pipelines.evaluation.metrics import share_bound

# From pure noise, over the whole schedule.
SETTINGS = DreamixSettings(s=1.0, factor=1.0, steps=25, guidance=4.0)
LIMIT = 0.8
# What is read from a clip, and whether it is a gate.
READ = {"colour": True, "shape": True, "direction": True, "speed": False, "background": False, "object": False}


def generate(
    pipeline: DreamixPipeline,
    prompt: str,
    seed: int,
    settings: DreamixSettings = SETTINGS,
    lora: dict[str, Tensor] | None = None,
    world=captions.WORLD,
) -> Tensor:
    """A clip [T, 3, H, W] in 0..1 of a prompt, from the noise of a seed. lora: the adapters of a fine-tuning."""
    shape = torch.zeros(world.frames, 3, world.size, world.size)
    return pipeline.edit(shape, prompt, settings, seed, lora).frames


@torch.no_grad()
def measure(pipeline: DreamixPipeline, seed: int, settings: DreamixSettings = SETTINGS) -> dict[str, Any]:
    """A caption of a seed, and which of its words its clip shows. "object": one is in every frame."""
    words = captions.draw_words(1, torch.Generator().manual_seed(seed), styled=0.0)
    caption = captions.caption(words, 0)
    seen = recognise(generate(pipeline, caption, seed, settings))
    right = {
        "colour": seen.colour == words.colour,
        "shape": seen.shape == words.shape,
        "direction": seen.direction == words.direction,
        "speed": seen.quick == words.speed,
        "background": seen.hue == words.hue,
        "object": True,
    }
    told = {key: bool(met) and (seen.present or key == "background") for key, met in right.items()}
    return {"caption": caption, "likeness": seen.likeness} | told


@dataclass(frozen=True)
class Share:
    """How many clips, or pictures, are right in one thing. limit: of the bound of a gate; None where it is no gate."""

    key: str
    what: str  # as the table names it
    right: int
    count: int
    limit: float | None

    @property
    def bound(self) -> float:
        return share_bound(self.right, self.count)

    @property
    def verdict(self) -> str:
        if self.limit is None:
            return ""
        return "PASSED" if self.bound >= self.limit else "FAILED"

    def cells(self) -> list[str]:
        """Its row of the table."""
        return [
            self.what,
            "-" if self.limit is None else f"{self.limit:g}",
            f"{self.right / self.count:.2f} ({self.right} of {self.count})",
            f"{self.bound:.2f}",
            self.verdict,
        ]


def shares(rows: list[dict[str, Any]], read: dict[str, bool], model: str, one: str, limit: float) -> list[Share]:
    """The share of each thing that is read, and whether it is a gate; all rows count. one: how "object" is named."""
    found = []
    for key, gate in read.items():
        what = one if key == "object" else f"the caption's {key}"
        right = sum(row[key] for row in rows)
        found.append(Share(key, f"{model}: {what}", right, len(rows), limit if gate else None))
    return found


def judge(rows: list[dict[str, Any]]) -> list[Share]:
    """The share of each thing that is read; all clips count."""
    return shares(rows, READ, "text-to-video", "one object in every frame", LIMIT)


def seeds_of(name: str, clips: int) -> list[int]:
    """The seeds of a set, "validation" or "test"."""
    return [SEEDS[name] + index for index in range(clips)]
