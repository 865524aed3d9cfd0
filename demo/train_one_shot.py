"""EI²'s part of `train.py`: the weights that come with Rewind, of a one-shot tuning on a demo clip and its caption."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from ..pipelines.ei2.family import TextToImage
from ..pipelines.ei2.pipeline import EI2Pipeline
from ..pipelines.ei2.weights import save_weights
from .text_edits import text_example
from .text_to_image import EI2_TUNING, EI2_WEIGHTS, alphas_cumprod, load_image_components

log = logging.getLogger(__name__)

CLIP_SEED = 6  # of the clip that workflows/ei2_load_weights.json edits; it is the same for every edit of it


def tune_one_shot(args, rank: int, device: torch.device) -> None:
    """Tune the embedded text-to-image model on the clip of a seed, and write what it learnt in half precision.

    On the CPU and in one thread wherever it runs, so that equal arguments write equal files.
    """
    torch.set_num_threads(1)
    clip = text_example(args.clip_seed)
    *modules, tokenizer = load_image_components()
    pipeline = EI2Pipeline(TextToImage(*modules, tokenizer, alphas_cumprod()))
    given = {"steps": args.steps, "learning_rate": args.lr}
    tuning = replace(EI2_TUNING, seed=args.seed, **{name: value for name, value in given.items() if value is not None})
    weights, losses = pipeline.tune(clip.source, clip.caption, tuning, callback=_progress, checkpoints=args.folder)
    save_weights(EI2_WEIGHTS, weights)
    log.info("%s: %.1f MB\n%s", EI2_WEIGHTS, EI2_WEIGHTS.stat().st_size / 1e6, weights)


def _progress(step: dict) -> None:
    log.info("step %d, loss %.4f", step["i"] + 1, step["total"])
