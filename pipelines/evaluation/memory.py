"""How much memory a process has held, and memory in words."""

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
        return int(re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text())[1]) / 2**10
    if sys.platform == "win32":
        return math.nan
    import resource

    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held / 2**20 if sys.platform == "darwin" else held / 2**10


def in_words(size: float) -> str:
    """Bytes as a person reads them: 29 MiB, 3.4 GiB."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.{1 if unit == 2**30 and size < 100 * unit else 0}f} {name}"
    return f"{size:.0f} bytes"
