"""What the inflations cost: the attention alone, and seconds and memory of tuning and sampling with each method.

Seconds are taken in one process, the sides in turn, so that a busy machine hits all alike; memory, of which a process
only tells the most that it ever held, in a process of its own each.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from ..pipelines.ei2.family import TextToImage
from ..pipelines.ei2.ffam import attend, frame_attention
from ..pipelines.ei2.inflation import InflationSettings
from ..pipelines.ei2.pipeline import EI2Pipeline, EI2Result, EI2Settings
from ..pipelines.ei2.tuning import OneShot
from ..pipelines.ei2.weights import EI2Weights
from ..pipelines.evaluation.memory import peak_memory
from .inflating import Method, Studio

FFAM, SPARSE = "FFAM", "sparse-causal"
FRAMES = (4, 8, 16, 24)
GRIDS = (32, 48, 64)  # latents of 256 to 512 pixels, as SD's first level attends to them
WIDTH, HEADS = 320, 8  # of SD's first level
CLIP = 8  # frames
SIDES = (12, 32)  # of the latents with which the embedded model is timed: its own, and those of 256 pixels
MEMORY_SIDE = 48  # of those with which memory is measured: of 384 pixels
PARTS = ("tuning", "sampling")
PLAIN = InflationSettings("own frame", temporal="none")  # the model as it was
CAPTION, PROMPT = (f"a {colour} circle moves right on a blue background" for colour in ("red", "green"))


# --- the attention alone ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attention:
    """Both attentions on clips of so many frames, latents of grid x grid, `runs` times each."""

    frames: int
    grid: int
    runs: int
    width: int = WIDTH
    heads: int = HEADS


def operations(kind: str, frames: int, grid: int, width: int = WIDTH) -> int:
    """Floating point operations of Q K^T and of its product with V, counted as the code asks for them."""
    counted = 0

    def count(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        nonlocal counted
        counted += 2 * q.shape[0] * q.shape[1] * k.shape[1] * (q.shape[2] + v.shape[2])
        return q

    tokens = torch.empty(frames, grid * grid, width, device="meta")
    frame_attention(tokens, tokens, tokens, frames, (grid, grid), 1, kind, attend=count)
    return counted


@torch.no_grad()
def attention_seconds(model: Any, job: Attention) -> dict[str, list[float]]:
    """Seconds of each attention, run by run, in turn; a first run of each is not counted. model: not needed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, job.frames, job.grid**2, job.width, generator=generator).to(device)
    seconds: dict[str, list[float]] = {FFAM: [], SPARSE: []}
    for run in range(job.runs + 1):
        for kind, taken in seconds.items():
            started = time.perf_counter()
            frame_attention(q, k, v, job.frames, (job.grid, job.grid), job.heads, kind, attend=attend)
            _synchronise()
            if run:
                taken.append(time.perf_counter() - started)
    return seconds


# --- tuning and sampling ----------------------------------------------------------------------------------------------


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def without_vae(pipeline: EI2Pipeline) -> EI2Pipeline:
    """The same with random latents for every clip, and no pictures: what is measured is the network.

    The VAE is the same for all methods, and a small network's memory is less than its VAE's.
    """
    family: TextToImage = copy.copy(pipeline.family)

    def encode(frames: Tensor) -> Tensor:
        shape = (len(frames), 4, frames.shape[-2] // 8, frames.shape[-1] // 8)
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(family.device)

    family.encode_clip, family.decode = encode, lambda latents: latents
    return EI2Pipeline(family)


@dataclass(frozen=True)
class Timing:
    """All methods on latents of side x side, `runs` times each. steps: of a tuning and of an edit."""

    side: int
    methods: tuple[Method, ...]
    runs: int
    steps: int = 2


def method_seconds(studio: Studio, job: Timing) -> dict[str, dict[str, list[float]]]:
    """Seconds of each method's steps of tuning, and of each network call of its edits, by PARTS, in turn.

    The first run of each method is not counted, nor is the first step of a tuning.
    """
    pipeline, clip = without_vae(studio.pipeline), torch.zeros(CLIP, 3, 8 * job.side, 8 * job.side)
    found: dict[str, dict[str, list[float]]] = {method.name: {part: [] for part in PARTS} for method in job.methods}
    for run in range(job.runs + 1):
        for method in job.methods:
            steps, call = _timed(pipeline, clip, method, job.steps)
            if run:
                found[method.name]["tuning"] += steps
                found[method.name]["sampling"].append(call)
    return found


def _timed(pipeline: EI2Pipeline, clip: Tensor, method: Method, steps: int) -> tuple[list[float], float]:
    """Seconds of each step of a tuning but the first, none without one, and of a network call of an edit."""
    times: list[float] = []

    def tick(step: dict[str, Any]) -> None:
        _synchronise()
        times.append(time.perf_counter())

    weights = None
    if method.inflation is not None:
        weights, _ = pipeline.tune(clip, CAPTION, OneShot(steps=steps + 1), method.inflation, tick)
    started = time.perf_counter()
    result = _edit(pipeline, clip, method, steps, weights)
    _synchronise()
    call = (time.perf_counter() - started) / result.evaluations
    return [later - earlier for earlier, later in zip(times, times[1:])], call


def _edit(pipeline: EI2Pipeline, clip: Tensor, method: Method, steps: int, weights: EI2Weights | None) -> EI2Result:
    """An edit. Frame by frame too the attention is the inflation's own, so that all have the same kernel."""
    return pipeline.edit(clip, PROMPT, EI2Settings(steps=steps, guidance=3.0), weights, method.inflation or PLAIN)


@dataclass(frozen=True)
class Memory:
    """One part of one method's work on latents of side x side."""

    side: int
    method: Method
    part: str  # one of PARTS


def peaks(studio: Studio, job: Memory) -> dict[str, float]:
    """The most memory that this process has held before a part of a method's work, and after it, MiB."""
    pipeline, clip = without_vae(studio.pipeline), torch.zeros(CLIP, 3, 8 * job.side, 8 * job.side)
    inflation, weights = job.method.inflation, None
    if inflation is not None:
        weights, _ = pipeline.tune(clip, CAPTION, OneShot(steps=0), inflation)
    before = peak_memory()
    if job.part == "tuning":
        pipeline.tune(clip, CAPTION, OneShot(steps=2), inflation)
    else:
        _edit(pipeline, clip, job.method, 1, weights)
    return {"before": before, "peak": peak_memory()}


def _peaks_anew(load: Callable[[], Studio], job: Memory) -> dict[str, float]:
    return peaks(load(), job)


def memory(model: Any, job: Memory, load: Callable[[], Studio]) -> dict[str, float]:
    """`peaks` in a process of its own, which loads the model for itself. model: not needed."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_peaks_anew, (load, job))


def memory_jobs(methods: Sequence[Method], side: int = MEMORY_SIDE) -> list[Memory]:
    """Tuning and sampling of every method; of what is not tuned the sampling alone."""
    return [
        Memory(side, method, part)
        for method in methods
        for part in PARTS
        if method.inflation is not None or part == "sampling"
    ]
