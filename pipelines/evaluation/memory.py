"""How much memory a process has held."""

from __future__ import annotations

import math
import sys

import torch


def peak_memory() -> float:
    """The most that this process has held so far, MiB: the GPU's where there is one, NaN where nobody tells it."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "win32":
        return math.nan
    import resource

    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held / 2**20 if sys.platform == "darwin" else held / 2**10
