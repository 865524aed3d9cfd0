"""What an inversion, the way back and a mask cost in network evaluations or memory, told before they start."""

from __future__ import annotations

import math

from torch import Tensor

from ..motion import FINEST, RAFT_LEAST, RAFT_MULTIPLE

FLOAT = 4  # bytes


def inversion_evaluations(steps: int, refine: int = 0, sides: int = 1) -> tuple[int, int]:
    """The fewest and the most evaluations of `sample_edm_inversion`: its refinement ends early where it converges.

    sides: 2 with classifier-free guidance, whose two sides count one each.
    """
    return steps * sides * (1 + min(refine, 1)), steps * sides * (1 + refine)


def denoising_evaluations(
    sigmas: Tensor, first: float = 1.0, last: float = 1.0, interval: tuple[float, float] = (0.0, math.inf)
) -> int:
    """The evaluations of the way back on levels [steps + 1], descending to 0, under `GuidedDenoiser`'s guidance.

    The two sides of guidance count one each; where it would change nothing, or sigma lies outside the interval, there
    is one.
    """
    levels = sigmas[:-1].tolist()
    low, high = interval
    guided = 0 if first == last == 1.0 else sum(low <= level <= high for level in levels)
    return len(levels) + guided


def evaluations_in_words(fewest: int, most: int | None = None) -> str:
    """A number of evaluations, or a range of it."""
    most = fewest if most is None else most
    return f"{fewest if fewest == most else f'{fewest} to {most}'} network evaluation{'s' if most != 1 else ''}"


def mask_bytes(frames: int, height: int, width: int, feather: int = 0) -> int:
    """About the most that `masks.edit_mask` holds of a clip of that size, without the flow: the clip and its masks.

    Numbers a pixel as they were measured, rounded up.
    """
    return FLOAT * height * width * (frames * (9 if feather else 6) + 4)


def flow_bytes(height: int, width: int, learned: bool = False) -> int:
    """About the most that an estimate of the motion between two frames takes, by `motion.lucas_kanade` or RAFT.

    RAFT's grows with the square of the pixels: it keeps how each patch of a frame agrees with each of the other, at
    four sizes. Without its weights. Numbers a pixel as they were measured, rounded up.
    """
    pixels, shorter = height * width, min(height, width)
    if not learned:
        return FLOAT * (12 * pixels + 40 * round(pixels * min(1.0, FINEST / shorter) ** 2))
    pixels = round(pixels * max(1.0, RAFT_LEAST / shorter) ** 2)
    patches = pixels // RAFT_MULTIPLE**2
    return FLOAT * (200 * pixels + round(patches**2 * (1 + 1 / 4 + 1 / 16 + 1 / 64)))
