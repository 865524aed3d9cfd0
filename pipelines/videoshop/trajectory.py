"""The clip at every noise level of an inversion, kept in main memory in a chosen precision."""

from __future__ import annotations

import math

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def trajectory_bytes(shape: tuple[int, ...], steps: int, dtype: torch.dtype) -> int:
    """What a trajectory of a latent's shape takes: one state a step, and the clean one."""
    return (steps + 1) * math.prod(shape) * dtype.itemsize


def empty_trajectory(clean: Tensor, sigmas: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Room for the trajectory [steps + 1, *clean.shape] of an inversion, on the CPU; its first state is the clean clip.

    Taken at once, so that what was told of its memory is all that it takes. sigmas: [steps + 1]. Raises ValueError
    where the noise of the highest level may not fit the precision (float16 ends at 65504).
    """
    # Twice what six standard deviations of noise and the clip come to: an inversion's noise is not always of unit size.
    most = 2 * (float(clean.abs().max()) + 6 * float(sigmas.max()))
    if most > torch.finfo(dtype).max:
        raise ValueError(
            f"the noise levels go up to {float(sigmas.max()):g}, which {str(dtype).removeprefix('torch.')} may not "
            "hold: keep the trajectory in bfloat16 or float32"
        )
    states = torch.empty(len(sigmas), *clean.shape, dtype=dtype)
    states[0] = clean
    return states
