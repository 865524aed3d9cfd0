"""What a node is about to cost, said before it starts: network evaluations, and memory as ComfyUI itself reckons it.

ComfyUI loads models by these same estimates (`model.memory_required`, a VAE's `memory_used_decode`): they err on the
side of too much, and what it cannot hold beside the weights it moves out of the way.
"""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Sequence
from typing import Any

import comfy.model_management
import comfy.patcher_extension
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

from ...pipelines.evaluation.memory import in_words
from ...pipelines.videoshop.costs import denoising_evaluations, evaluations_in_words, inversion_evaluations
from ...pipelines.videoshop.parts import Part
from ...pipelines.videoshop.trajectory import trajectory_bytes
from .sampling import plainly_guided, without_negative
from .schema import show_text

logger = logging.getLogger(__name__)

WINDOWS = "ContextWindows_prepare_sampling"  # by which the host's context windows reckon with one window


def tell(node_id: str | None, node: str, text: str, whole: bool = False) -> None:
    """Say a text in the log and on a node, which shows two lines: what stands in brackets is for the log alone.

    node: its name. whole: show the brackets too, which may belong to the name of a file.
    """
    logger.info("%s: %s", node, text)
    show_text(node_id, text if whole else re.sub(r" \([^()]*\)", "", text))


def sampling_bytes(guider: comfy.samplers.CFGGuider, samples: Tensor, guided: bool) -> int:
    """What ComfyUI reckons that one network call of a guider takes beside the weights.

    guided: whether both sides of the guidance are computed. Context windows and ControlNet count as the host counts
    them.
    """
    patcher, options = guider.model_patcher, guider.model_options

    def reckon(model: Any, shape: list[int], conds: dict[str, list], *_: Any, **__: Any) -> float:
        both, one = comfy.sampler_helpers.estimate_memory(model, shape, conds)
        _, more = comfy.sampler_helpers.get_additional_models(conds, model.model_dtype())
        return (both if guided else one) + more

    # The host's own wrapper alone: other packs' may load what they wrap.
    kind = comfy.patcher_extension.WrappersMP.PREPARE_SAMPLING
    wrappers = patcher.wrappers.get(kind, {}).get(WINDOWS, [])
    executor = comfy.patcher_extension.WrapperExecutor.new_executor(reckon, wrappers)
    return int(executor.execute(patcher, list(samples.shape), guider.original_conds, model_options=options))


def longest(samples: Tensor, found: Sequence[Part]) -> Tensor:
    """As much of a clip as its longest part has."""
    return samples if len(found) < 2 else samples[: max(stop - start for start, stop in found)]


def window_counts(
    guider: comfy.samplers.CFGGuider, samples: Tensor, steps: int, found: Sequence[Part]
) -> list[list[int]]:
    """How many context windows each part of a clip goes in at each step, 1 where the host uses none.

    The host's uniform schedules move the windows from step to step, and with it their number may change.
    """
    handler = copy.copy(guider.model_options.get("context_handler"))
    clips = [samples] if len(found) < 2 else [samples[start:stop] for start, stop in found]

    def count(clip: Tensor, step: int) -> int:
        # As in the host's `should_use_context`, which logs as well.
        known = hasattr(handler, "get_context_windows") and handler.dim < clip.ndim
        if not known or clip.shape[handler.dim] <= handler.context_length:
            return 1
        handler._step = step  # of the copy
        return len(handler.get_context_windows(guider.model_patcher.model, clip, guider.model_options))

    return [[count(clip, step) for step in range(steps)] for clip in clips]


def division_in_words(guider: comfy.samplers.CFGGuider, found: Sequence[Part], windows: list[list[int]]) -> str:
    """ " in 4 parts (of at most 14 frames) of 2 windows (of 8 latent frames)", or what there is of it.

    windows: see `window_counts`.
    """
    longest_part = max((stop - start for start, stop in found), default=0)
    words = "" if len(found) < 2 else f" in {len(found)} parts (of at most {longest_part} frames)"
    fewest, most = min(map(min, windows)), max(map(max, windows))
    if most < 2:
        return words
    number = f"{most}" if fewest == most else f"{fewest} to {most}"
    length = guider.model_options["context_handler"].context_length
    return f"{words} {'of' if words else 'in'} {number} windows (of {length} latent frames)"


def sampling_in_words(guider: comfy.samplers.CFGGuider, samples: Tensor, guided: bool) -> str:
    """The most that a sampling takes on its device."""
    model = guider.model_patcher
    weights, work = model.model_size(), sampling_bytes(guider, samples, guided)
    if (other := getattr(guider, "uncond_model_patcher", None)) is not None:  # of DualModelGuider
        weights += other.model_size()
    return (
        f"at most about {in_words(weights + work)} on {model.load_device} ({in_words(weights)} of weights and "
        f"{in_words(work)} to compute, as ComfyUI reckons)"
    )


def sides(guider: comfy.samplers.CFGGuider) -> tuple[int, int]:
    """The fewest and the most sides of the guidance that one network call of a guider computes.

    A guidance of another pack's, or of DualCFGGuider, may leave sides out; so may what is wrapped around the plain one
    (CFGOverride), or take them in again.
    """
    most, kind = len(guider.original_conds), comfy.patcher_extension.WrappersMP.PREDICT_NOISE
    wrapped = comfy.patcher_extension.get_all_wrappers(kind, guider.model_options, is_model_options=True)
    if wrapped or not plainly_guided(guider):
        return 1, most
    return (1, 1) if without_negative(guider, guider.model_options) else (most, most)


def tell_sampling(
    node_id: str | None, node: str, refine: int, guider: comfy.samplers.CFGGuider, samples: Tensor, sigmas: Tensor
) -> None:
    """Say what a SAMPLER costs under a guider, there or back, on levels [steps + 1].

    refine: most repetitions of a step.
    """
    windows, (fewest, most) = window_counts(guider, samples, len(sigmas) - 1, ()), sides(guider)
    calls = sum(map(sum, windows))
    evaluations = inversion_evaluations(calls, refine, fewest)[0], inversion_evaluations(calls, refine, most)[1]
    tell(
        node_id,
        node,
        f"{evaluations_in_words(*evaluations)}{division_in_words(guider, (), windows)}; "
        f"{sampling_in_words(guider, samples, most > 1)}",
    )


def tell_inversion(
    node_id: str | None,
    guider: comfy.samplers.CFGGuider,
    samples: Tensor,
    steps: int,
    refine: int,
    guided: bool,
    dtype: torch.dtype,
    found: Sequence[Part],
) -> None:
    """Say what an inversion of EDM Inversion costs. dtype: of the trajectory; found: the parts of the clip."""
    windows = window_counts(guider, samples, steps, found)
    evaluations = inversion_evaluations(sum(map(sum, windows)), refine, 2 if guided else 1)
    size = trajectory_bytes(samples.shape, steps, dtype)
    tell(
        node_id,
        "EDM Inversion",
        f"{evaluations_in_words(*evaluations)}{division_in_words(guider, found, windows)}; "
        f"{sampling_in_words(guider, longest(samples, found), guided)}; {in_words(size)} of main "
        f"memory (the clip at {steps + 1} noise levels in {str(dtype).removeprefix('torch.')})",
    )


def tell_way_back(
    node_id: str | None,
    node: str,
    guider: comfy.samplers.CFGGuider,
    samples: Tensor,
    sigmas: Tensor,
    first: float = 1.0,
    last: float = 1.0,
    interval: tuple[float, float] = (0.0, math.inf),
    more: str = "",
    found: Sequence[Part] = (),
) -> None:
    """Say what the way back on levels [steps + 1] costs.

    first, last, interval: its guidance. more: what else the node does. found: the parts of the clip.
    """
    each = [denoising_evaluations(sigmas[i : i + 2], first, last, interval) for i in range(len(sigmas) - 1)]
    windows = window_counts(guider, samples, len(each), found)
    evaluations = sum(count * n for counts in windows for count, n in zip(counts, each, strict=True))
    tell(
        node_id,
        node,
        f"{evaluations_in_words(evaluations)}{division_in_words(guider, found, windows)}; "
        f"{sampling_in_words(guider, longest(samples, found), max(each) > 1)}{more}",
    )
