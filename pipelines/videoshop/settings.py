"""The settings of the whole Videoshop job, and the named sets of them.

Of Videoshop we know reviews, third-party notes and the authors' released code, not the paper in full. Where the paper
and the code differ (fifteen places were found), each is a named choice here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..denoiser import karras_sigmas, truncate_sigmas
from .inversion import GUESSES
from .latents import NORMALISATIONS
from .parts import check_at_once
from .windows import OVERLAP, check_context


@dataclass(frozen=True)
class VideoshopSettings:
    """How a clip is rewound and played again. Raises ValueError for a value out of range.

    steps, sigma_min, sigma_max, rho: the Karras schedule; SVD's by default.
    strength: the share of the schedule that is rewound, 0..1; 1 goes to pure noise, 0.55 of 25 steps to sigma 15.6,
        0.76 to 135. Higher leaves the edit more room, lower holds closer to the source.
    guess_above, guess_below, threshold, refine, damping, tolerance: see `sample_edm_inversion`.
    normalise: "channel" (paper), "frame" (the authors' code) or "off"; see `latents.normalise`.
    normalise_condition: whiten the SOURCE condition in the inversion only (the authors' code).
    denormalise: undo the normalisation before rescaling (the authors' code does not).
    rescale: 0..1, how far to bring the result to the edited frame's channel statistics.
    first_guidance, last_guidance: classifier-free guidance on the way back, linear over the frames; 1 is none. The
        inversion always runs without guidance (the authors' code).
    guidance_interval: noise levels (sigma) within which guidance applies.
    augmentation: noise on the first frame, in the units of pixels in -1..1; shared_augmentation: the same noise for the
        source's and the edited first frame (ours), instead of fresh noise (the authors' code).
    fps, motion_bucket: what the model is told of the clip.
    frames_at_once: for a clip longer than the model, rewind and play it in parts of at most so many frames; 0 for the
        whole clip at once. See `parts`.
    context_length, context_overlap: the same in windows of so many frames, of which neighbours share some; 0 for none.
        See `windows`. On the embedded model they hold an edit better than parts.
    """

    steps: int = 25
    strength: float = 0.55
    sigma_min: float = 0.002
    sigma_max: float = 700.0
    rho: float = 7.0
    guess_above: str = "extrapolation"
    guess_below: str = "random"
    threshold: float = 1.0
    refine: int = 0
    damping: float = 0.5
    tolerance: float = 1e-4
    normalise: str = "off"
    normalise_condition: bool = False
    denormalise: bool = True
    rescale: float = 0.0
    first_guidance: float = 1.0
    last_guidance: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, math.inf)
    augmentation: float = 0.02
    shared_augmentation: bool = True
    fps: int = 7
    motion_bucket: int = 127
    frames_at_once: int = 0
    context_length: int = 0
    context_overlap: int = OVERLAP

    def __post_init__(self) -> None:
        low, high = self.guidance_interval
        rules = (
            (self.steps >= 1, f"steps is {self.steps}; it must be at least 1"),
            (0 < self.strength <= 1, f"strength is {self.strength}; it must be above 0 and at most 1"),
            (
                0 < self.sigma_min < self.sigma_max,
                f"sigma_min is {self.sigma_min} and sigma_max {self.sigma_max}; they must satisfy 0 < min < max",
            ),
            (self.rho > 0, f"rho is {self.rho}; it must be above 0"),
            (self.guess_above in GUESSES, f'guess_above is "{self.guess_above}"; one of {", ".join(GUESSES)}'),
            (self.guess_below in GUESSES, f'guess_below is "{self.guess_below}"; one of {", ".join(GUESSES)}'),
            (self.threshold >= 0, f"threshold is {self.threshold}; it must be at least 0"),
            (self.refine >= 0, f"refine is {self.refine}; it must be at least 0"),
            (0 <= self.damping < 1, f"damping is {self.damping}; it must be at least 0 and below 1"),
            (self.tolerance >= 0, f"tolerance is {self.tolerance}; it must be at least 0"),
            (self.normalise in NORMALISATIONS, f'normalise is "{self.normalise}"; one of {", ".join(NORMALISATIONS)}'),
            (0 <= self.rescale <= 1, f"rescale is {self.rescale}; it must be 0 to 1"),
            (
                self.first_guidance >= 0 and self.last_guidance >= 0,
                f"guidance is {self.first_guidance} to {self.last_guidance}; it must be at least 0",
            ),
            (0 <= low <= high, f"guidance_interval is {self.guidance_interval}; it must be two sigmas, low first"),
            (0 <= self.augmentation <= 10, f"augmentation is {self.augmentation}; it must be 0 to 10"),
            (self.fps >= 1, f"fps is {self.fps}; it must be at least 1"),
            (0 <= self.motion_bucket <= 1023, f"motion_bucket is {self.motion_bucket}; it must be 0 to 1023"),
            (
                not (self.frames_at_once and self.context_length),
                f"frames_at_once is {self.frames_at_once} and context_length {self.context_length}: a clip goes in "
                "parts or in windows, set one of them to 0",
            ),
        )
        for holds, message in rules:
            if not holds:
                raise ValueError(message)
        check_at_once(self.frames_at_once)
        check_context(self.context_length, self.context_overlap)

    def guesses(self) -> dict[str, Any]:
        """What `sample_edm_inversion` takes of these settings."""
        names = ("guess_above", "guess_below", "threshold", "refine", "damping", "tolerance")
        return {name: getattr(self, name) for name in names}

    def sigmas(self) -> Tensor:
        """The noise levels of the way back, [steps + 1] in float64, descending to 0: the schedule's rewound share."""
        return truncate_sigmas(karras_sigmas(self.steps, self.sigma_min, self.sigma_max, self.rho), self.strength)


# What the validation seeds of the embedded model show best for edits, at no more network evaluations than the reference
# takes (`rewind benchmark videoshop --sweep`; benchmarks/results/sweep.md).
DEFAULT = VideoshopSettings()

# The paper's method, as far as it is known: rewound to pure noise, extrapolation above the threshold and the random
# direction below, channel normalisation, rescaling; without the quirks of the released code.
PAPER = VideoshopSettings(
    strength=1.0,
    guess_above="extrapolation",
    guess_below="random",
    normalise="channel",
    rescale=1.0,
)

# The authors' released code (run.py, model_utils.py, euler_discrete_inverse.py): per-frame whitening, a whitened
# condition in the inversion only, threshold 1.0 on the lower level, one fixed noise below it, guidance 1 then a flat
# 4, fresh augmentation noise of 0.2. What differs from it still: their fixed noise is scaled by the whitened clip's
# deviation (within 2e-5 of 1 at SVD's size); the picture is prepared for CLIP bicubically (theirs: bilinear); clips
# are not stretched to 1024x576; the draws are another generator's.
REFERENCE = VideoshopSettings(
    strength=0.55,
    guess_above="extrapolation",
    guess_below="random",
    threshold=1.0,
    normalise="frame",
    normalise_condition=True,
    denormalise=False,
    rescale=1.0,
    first_guidance=4.0,
    last_guidance=4.0,
    augmentation=0.2,
    shared_augmentation=False,
)

# Naive inversion in the paper's form (equation 5): the current latent is the guess at every level.
NAIVE = VideoshopSettings(guess_above="current", guess_below="current")
