"""Clips of the captioned world edited by EI² and by what it is compared with: what the EI² tables are made of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..demo.image_edits import EDITS, ImageEdit, image_edit, score, warp_error
from ..demo.text_to_image import EI2_SETTINGS
from ..demo.text_to_image import EI2_TUNING as TUNING
from ..pipelines.ei2.covariate_shift import overall
from ..pipelines.ei2.inflation import InflationSettings
from ..pipelines.ei2.pipeline import EI2Pipeline, EI2Settings
from ..pipelines.ei2.tuning import OneShot
from ..pipelines.ei2.weights import EI2Weights
from ..pipelines.videoshop.latents import clip_preprocess
from . import runner
from .statistics import Record

# Rewound further than by default: at 0.7 all six edits of two validation clips succeeded, nothing is left to compare.
SETTINGS = replace(EI2_SETTINGS, strength=0.8)


@dataclass(frozen=True)
class Method:
    """One way to edit a clip, a row of a table. inflation: what is tuned on the clip; None is the model as it was."""

    name: str
    inflation: InflationSettings | None = None


@dataclass(frozen=True)
class Job:
    """One clip edited by one method, tuned with one seed. No method: the reference rows."""

    seed: int
    method: Method | None
    run: int = 0
    settings: EI2Settings = SETTINGS
    tuning: OneShot = TUNING


# What any method is to be compared with, and what shows that the scores tell right from wrong.
REFERENCES = ("a right answer, through the VAE", "the source itself")


@dataclass(frozen=True)
class Studio:
    """A text-to-image model that edits, and an image encoder that looks at the results.

    image_encoder: a CLIPVisionModelWithProjection of the embedded image-to-video model; it took no part in any editing.
    """

    pipeline: EI2Pipeline
    image_encoder: Any

    @torch.no_grad()
    def similarity(self, frames: Tensor) -> float:
        """Cosine of the embeddings of consecutive frames [T, 3, H, W], their mean: frame-to-frame consistency."""
        device, dtype = self.image_encoder.device, self.image_encoder.dtype
        pixels = clip_preprocess(frames.float(), self.image_encoder.config.image_size).to(device, dtype)
        features = self.image_encoder(pixels).image_embeds.float()
        return float(F.cosine_similarity(features[1:], features[:-1]).mean())


def embedded_studio() -> Studio:
    """The embedded text-to-image model and the image-to-video model's encoder, on a GPU where there is one."""
    from ..demo.models import load_components

    family = runner.embedded_image_model()
    return Studio(EI2Pipeline(family), load_components()[2].to(family.device))


def work(studio: Studio, job: Job) -> list[Record]:
    """Do one job: tune once, then a record for each edit of the clip."""
    edits = [image_edit(job.seed, name) for name in EDITS]
    if job.method is None:
        return [record for edit in edits for record in _references(studio, job, edit)]
    source, settings = edits[0].example.source, job.settings
    weights, told = None, {}
    if job.method.inflation is None:
        settings = replace(settings, patch_strength=0.0)
    else:
        weights, told = _tune(studio, job, edits[0])
    records = []
    for edit in edits:
        # Nothing is drawn in an edit: inversion and the way back are deterministic.
        result = studio.pipeline.edit(source, edit.prompt, settings, weights)
        record = _record(studio, job, job.method.name, edit, result.frames) | told
        if weights is not None:
            record |= _shift(studio, job, edit, edit.prompt, weights, "edit")
        records.append(record | {"evaluations": result.evaluations})
    return records


def _tune(studio: Studio, job: Job, edit: ImageEdit) -> tuple[EI2Weights, Record]:
    """Weights tuned on a clip; the loss of the last quarter of the steps, and the shifts on the clip's own caption."""
    clip, caption, inflation = edit.example.source, edit.caption, job.method.inflation
    tuning = replace(job.tuning, seed=job.run)
    fresh, _ = studio.pipeline.tune(clip, caption, replace(tuning, steps=0), inflation)
    weights, losses = studio.pipeline.tune(clip, caption, tuning, inflation)
    told = {"loss": fmean(losses[-max(1, len(losses) // 4) :])}
    told |= _shift(studio, job, edit, caption, fresh, "before")
    return weights, told | _shift(studio, job, edit, caption, weights, "source")


def _shift(studio: Studio, job: Job, edit: ImageEdit, prompt: str, weights: EI2Weights, when: str) -> Record:
    """Mean and variance shift over all modules and noise levels, with the same noise for every method."""
    readings = studio.pipeline.covariate_shift(edit.example.source, prompt, weights, seed=job.seed)
    mean_shift, variance_shift = overall(readings)
    return {f"mean_shift_{when}": mean_shift, f"variance_shift_{when}": variance_shift}


def _record(studio: Studio, job: Job, name: str, edit: ImageEdit, frames: Tensor) -> Record:
    """What a result is worth, as it is kept."""
    result = score(edit, frames)
    warp, warp_object = warp_error(edit, frames)
    named = {"seed": job.seed, "run": job.run, "method": name, "edit": edit.name}
    return named | {
        "edited": result.edited,
        "kept": result.kept,
        "success": result.success,
        "right": result.right,
        "colour_error": result.colour_error,
        "background_error": result.background_error,
        "path_error": result.path_error,
        "psnr_kept": result.psnr_kept,
        "warp_error": warp,
        "warp_error_object": warp_object,
        "similarity": studio.similarity(frames),
    }


def _references(studio: Studio, job: Job, edit: ImageEdit) -> list[Record]:
    family = studio.pipeline.family
    through = family.decode(family.encode_clip(edit.example.target))
    clips = dict(zip(REFERENCES, (through, edit.example.source), strict=True))
    return [_record(studio, job, name, edit, clip) for name, clip in clips.items()]


def jobs(
    seeds: list[int],
    methods: list[Method],
    runs: int = 1,
    settings: EI2Settings = SETTINGS,
    tuning: OneShot = TUNING,
) -> list[Job]:
    """All work, clip by clip, each with its references first. What is not tuned has no seed, and one run."""
    return [
        Job(seed, method, run, settings, tuning)
        for seed in seeds
        for method in (None, *methods)
        for run in range(runs if method is not None and method.inflation is not None else 1)
    ]
