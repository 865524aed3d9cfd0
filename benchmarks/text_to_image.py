"""The gates of the embedded text-to-image model: does it show what a caption says.

Captions of test seeds without their words of motion, one picture each from pure noise, read from its pixels. A gate is
a lower 95 % confidence bound on the share of pictures that are right (Wilson's score).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..demo import captions
from ..demo.recognition import recognise
from ..demo.text_edits import SEEDS
from ..demo.text_to_image import without_motion
from ..pipelines.ei2.family import TextToImage
from ..pipelines.videoshop.denoising import GuidedDenoiser, sample_euler
from .text_to_video import Share, shares


@dataclass(frozen=True)
class Sampling:
    """How a picture is made: steps of the whole schedule, and classifier-free guidance (1 is none)."""

    steps: int = 25
    guidance: float = 3.0


SETTINGS = Sampling()
LIMIT = 0.9
PICTURES = 4  # for each clip of the other gates: of 256 the bound reaches the limit if 239 are right
# What is read from a picture, and whether it is a gate.
READ = {"colour": True, "shape": True, "background": False, "object": False}


@torch.no_grad()
def generate(model: TextToImage, prompt: str, seed: int, settings: Sampling = SETTINGS, world=captions.WORLD) -> Tensor:
    """A picture [1, 3, H, W] in 0..1 of a prompt, from the noise of a seed."""
    side, sigmas = world.size // 8, model.schedule(settings.steps)
    noise = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(seed))
    x = noise.to(model.device) * (1 + float(sigmas[0]) ** 2) ** 0.5
    context, empty = model.embed([prompt]), model.embed([""])
    guided = GuidedDenoiser(
        lambda x, sigma: model.denoise(x, sigma, context),
        lambda x, sigma: model.denoise(x, sigma, empty),
        settings.guidance,
        settings.guidance,
    )
    return model.decode(sample_euler(guided, x, sigmas, disable=True))


def measure(model: TextToImage, seed: int, settings: Sampling = SETTINGS) -> dict[str, Any]:
    """A caption of a seed, and which of its words its picture shows. "object": there is one."""
    words = captions.draw_words(1, torch.Generator().manual_seed(seed), styled=0.0)
    caption = without_motion(captions.caption(words, 0))
    seen = recognise(generate(model, caption, seed, settings))
    right = {
        "colour": seen.colour == words.colour,
        "shape": seen.shape == words.shape,
        "background": seen.hue == words.hue,
        "object": True,
    }
    told = {key: bool(met) and (seen.present or key == "background") for key, met in right.items()}
    return {"caption": caption, "likeness": seen.likeness} | told


def judge(rows: list[dict[str, Any]]) -> list[Share]:
    """The share of each thing that is read; all pictures count."""
    return shares(rows, READ, "text-to-image", "one object", LIMIT)


def seeds_of(name: str, clips: int) -> list[int]:
    """The seeds of a set, "validation" or "test", for so many clips of the other gates."""
    return [SEEDS[name] + index for index in range(PICTURES * clips)]
