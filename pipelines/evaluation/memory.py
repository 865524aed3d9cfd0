"""How much memory a process holds and has held, and memory in words."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")


def peak_memory() -> float:
    """The most that this process has held so far, MiB: the GPU's where there is one, NaN where nobody tells it."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if STATUS.exists():
        # What getrusage tells on Linux begins at what the PARENT held when it started this process.
        return _status("VmHWM")
    if sys.platform == "win32":
        return math.nan
    import resource

    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held / 2**20 if sys.platform == "darwin" else held / 2**10


def held_memory() -> float:
    """What this process holds now, MiB, as `peak_memory` counts; NaN outside Linux without a GPU.

    What work takes is the peak after it above this, not above the peak before it: a process holds more for a moment
    while it loads its weights than when it has.
    """
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 2**20
    return _status("VmRSS") if STATUS.exists() else math.nan


def _status(name: str) -> float:
    return int(re.search(rf"{name}:\s*(\d+) kB", STATUS.read_text())[1]) / 2**10


def in_words(size: float) -> str:
    """Bytes as a person reads them: 29 MiB, 3.4 GiB."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.{1 if unit == 2**30 and size < 100 * unit else 0}f} {name}"
    return f"{size:.0f} bytes"
