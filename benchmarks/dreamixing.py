"""Clips of the captioned world edited by prompts, with and without fine-tuning: what the Dreamix tables are made of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..demo.text_edits import KINDS, VARIANTS, Score, TextExample, score, text_example
from ..pipelines.dreamix.finetuning import FineTuning
from ..pipelines.dreamix.pipeline import DreamixPipeline, DreamixSettings
from ..pipelines.dreamix.presets import PRESETS

SETTINGS = DreamixSettings()
TUNING = FineTuning()
SECOND_PASS = 0.3  # s, of the rows that have one

Record = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """One way to edit a clip, a row of a table.

    alpha: of the fine-tuning, None for none. steps: of the fine-tuning. second_pass: also measure its result.
    """

    name: str
    alpha: float | None = None
    steps: int = TUNING.steps
    second_pass: bool = False


@dataclass(frozen=True)
class Job:
    """One clip edited by one method with one seed of fine-tuning and sampling. No method: the reference rows.

    settings: without s, factor and stride, which are those of the preset of each kind of edit, for every method.
    """

    seed: int
    kinds: tuple[str, ...]
    method: Method | None
    run: int = 0
    settings: DreamixSettings = SETTINGS
    tuning: FineTuning = TUNING


# What any method is to be compared with, and what shows that the scores tell right from wrong.
REFERENCES = ("a right answer, through the VAE", "the source itself")


def edits(seed: int, kinds: tuple[str, ...]) -> list[tuple[int, TextExample]]:
    """Every edit of some kinds that a clip has, with its variant's number."""
    return [(variant, text_example(seed, kind, variant)) for kind in kinds for variant in range(VARIANTS[kind])]


def work(pipeline: DreamixPipeline, job: Job) -> list[Record]:
    """Do one job: fine-tune once, then a record for each edit of the clip."""
    chosen = edits(job.seed, job.kinds)
    if job.method is None:
        return [record for variant, example in chosen for record in _references(pipeline, job, variant, example)]
    lora = _fine_tune(pipeline, job, chosen[0][1].source)
    second_pass = SECOND_PASS if job.method.second_pass else 0.0
    records = []
    for variant, example in chosen:
        settings = replace(of_kind(job.settings, example.kind), second_pass=second_pass)
        # The pipeline puts the token into the prompt where there is something that it stands for.
        result = pipeline.edit(example.source, example.prompt(""), settings, _noise_seed(job, variant), lora)
        more = {"evaluations": result.evaluations, "second_pass": None}
        if job.method.second_pass:
            more["second_pass"] = _told(score(example, result.frames))
        records.append(_record(job, job.method.name, variant, example, score(example, result.first_pass)) | more)
    return records


def of_kind(settings: DreamixSettings, kind: str) -> DreamixSettings:
    """Settings with the noise and the degradation of a kind of edit's preset."""
    preset = PRESETS[kind]
    return replace(settings, s=preset.s, factor=preset.factor, stride=preset.stride)


def _noise_seed(job: Job, variant: int) -> int:
    """The same noise for every method, other noise for every edit and run."""
    return 1000 * job.seed + 10 * variant + job.run


def _fine_tune(pipeline: DreamixPipeline, job: Job, source: Tensor) -> dict[str, Tensor] | None:
    method = job.method
    if method.alpha is None or method.steps == 0:
        return None
    tuning = replace(job.tuning, alpha=method.alpha, steps=method.steps, seed=job.run)
    return pipeline.fine_tune(source, job.settings.token, tuning).lora


def _told(result: Score) -> Record:
    """A score as it is kept."""
    return {
        "appearance": result.appearance,
        "accuracy": result.accuracy,
        "success": result.success,
        "right": result.right,
        "colour_error": result.colour_error,
        "background_error": result.background_error,
        "heading_error": result.heading_error,
        "speed": result.speed,
    }


def _record(job: Job, name: str, variant: int, example: TextExample, result: Score) -> Record:
    named = {"seed": job.seed, "run": job.run, "method": name, "kind": example.kind, "variant": variant}
    return named | _told(result)


@torch.no_grad()
def _references(pipeline: DreamixPipeline, job: Job, variant: int, example: TextExample) -> list[Record]:
    family = pipeline.family
    through = family.decode(family.encode_clip(example.target))
    clips = dict(zip(REFERENCES, (through, example.source), strict=True))
    return [_record(job, name, variant, example, score(example, clip)) for name, clip in clips.items()]


def jobs(
    seeds: list[int],
    methods: list[Method],
    runs: int = 1,
    kinds: tuple[str, ...] = KINDS,
    settings: DreamixSettings = SETTINGS,
    tuning: FineTuning = TUNING,
) -> list[Job]:
    """All work, clip by clip, each with its references first."""
    return [
        Job(seed, kinds, method, run, settings, tuning)
        for seed in seeds
        for method in (None, *methods)
        for run in range(runs if method is not None else 1)
    ]
