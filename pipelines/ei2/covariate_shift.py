"""How far a temporal module shifts the features that pass it: what STAM is meant to keep small (arXiv 2305.17431).

Over frames, space and batch, channel by channel, from X in front of a module to Y = X + residual behind it:

    mean shift      |mean(Y) - mean(X)|_2 / |sd(X)|_2
    variance shift  mean over channels of |ln(var(Y) / var(X))|

The paper's own measure is not public; these are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from .inflation import Observer


@torch.no_grad()
def shift(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Mean shift and variance shift from x to y, [B, n, C] each. A channel that never varies counts nothing."""
    x, y = x.double().flatten(0, -2), y.double().flatten(0, -2)
    mean_x, mean_y, var_x, var_y = x.mean(0), y.mean(0), x.var(0, False), y.var(0, False)
    floor = 1e-12 * var_x.mean().clamp(min=1e-12)
    moved = (mean_y - mean_x).norm() / var_x.sum().clamp(min=1e-24).sqrt()
    return float(moved), float(((var_y + floor) / (var_x + floor)).log().abs().mean())


@dataclass(frozen=True)
class Reading:
    """One module at one noise level."""

    block: str
    sigma: float
    mean_shift: float
    variance_shift: float


@dataclass
class Probe:
    """Collects readings; `observer` goes into an `Inflation`, `sigma` is set before each network call."""

    sigma: float = 0.0
    readings: list[Reading] = field(default_factory=list)

    @property
    def observer(self) -> Observer:
        def observe(block: str, x: Tensor, y: Tensor) -> None:
            self.readings.append(Reading(block, self.sigma, *shift(x, y)))

        return observe

    def blocks(self) -> list[str]:
        """The blocks in the order in which they were passed."""
        return list(dict.fromkeys(reading.block for reading in self.readings))


def by_block(readings: Sequence[Reading]) -> dict[str, tuple[float, float]]:
    """Mean and variance shift of each block, averaged over noise levels."""
    return {name: overall(own) for name, own in _grouped(readings, "block").items()}


def by_level(readings: Sequence[Reading]) -> dict[float, tuple[float, float]]:
    """Mean and variance shift at each noise level, in the order in which they were taken, averaged over blocks."""
    return {sigma: overall(own) for sigma, own in _grouped(readings, "sigma").items()}


def by_block_and_level(readings: Sequence[Reading]) -> dict[str, dict[float, tuple[float, float]]]:
    """Mean and variance shift of each block at each noise level."""
    return {name: by_level(own) for name, own in _grouped(readings, "block").items()}


def _grouped(readings: Sequence[Reading], key: str) -> dict[Any, list[Reading]]:
    groups: dict[Any, list[Reading]] = {}
    for reading in readings:
        groups.setdefault(getattr(reading, key), []).append(reading)
    return groups


def overall(readings: Sequence[Reading]) -> tuple[float, float]:
    """Mean and variance shift over all readings; ValueError where there are none."""
    if not readings:
        raise ValueError("nothing was measured: the model has no temporal modules, connect one with EI² weights")
    return fmean(r.mean_shift for r in readings), fmean(r.variance_shift for r in readings)
