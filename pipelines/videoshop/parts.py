"""Clips that are longer than the model: rewound and played in parts, each of which goes on where the last one ended.

The paper makes long clips by repeating itself: the last edited frame is the first frame of what follows (section
"Extension to Other Models and Longer Videos", known to us by its heading and a review; the authors' code has none of
it). Ours is how: neighbouring parts share one frame, the last of one and the first of the next. On the way to noise the
next part is told of the source's, on the way back of the edited one, both as latents, without another pass through the
VAE; and all parts use the same random direction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..chunks import spans
from .inversion import Inversion
from .latents import Normalisation
from .trajectory import empty_trajectory

AT_ONCE = "frames_at_once"  # the name of the setting

Part = tuple[int, int]  # the first frame, which all parts but the first share, and the one after the last


def check_at_once(at_once: int) -> None:
    """ValueError for a number of frames that parts cannot have; 0 is the whole clip."""
    if at_once < 0 or at_once == 1:
        raise ValueError(f"frames_at_once is {at_once}; it must be at least 2, or 0 for the whole clip at once")


def parts(frames: int, at_once: int) -> list[Part]:
    """As few parts as cover a clip, of at most `at_once` frames each and as even as can be; 0 gives one part."""
    check_at_once(at_once)
    return spans(frames, at_once, 1) if at_once else [(0, frames)]


def own(part: Part) -> slice:
    """The frames of a part that are its alone, without the one that it shares with the part before it."""
    start, stop = part
    return slice(start + 1 if start else 0, stop)


def parts_of(inversion: Inversion) -> list[Part]:
    """The parts that an inversion of latents [T, C, h, w] was made in; a clip of another kind is one part."""
    at_once = inversion.settings.get(AT_ONCE, 0) if inversion.latent.ndim == 4 else 0
    return parts(len(inversion.latent), int(at_once))


def part_of(inversion: Inversion, number: int) -> Inversion:
    """The inversion of one of `parts_of` alone, with the frame that it shares; of a single part the whole."""
    part = parts_of(inversion)[number]
    if part == (0, len(inversion.latent)):
        return inversion
    start, stop = part

    def cut(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[start:stop]

    latent, states = inversion.latent[own(part)], inversion.trajectory
    states = None if states is None else states[:, own(part)]
    if start:
        shared = inversion.joins[:, number - 1 : number]
        latent = torch.cat([shared[-1].to(latent), latent])
        states = None if states is None else torch.cat([shared.to(states), states], 1)
    return replace(
        inversion,
        latent=latent,
        trajectory=states,
        source=cut(inversion.source),
        original=cut(inversion.original),
        normalisation=normalisation_of(inversion.normalisation, start, stop),
        joins=None,
        settings={**inversion.settings, AT_ONCE: 0},
    )


class Recorder:
    """Keeps what an inversion passes through, part by part.

    clean: the clip at level 0, [T, C, h, w] (of another kind in one part); sigmas: [steps + 1]; found: its parts.
    dtype: of the trajectory, None keeps none. Raises as `empty_trajectory` does.
    """

    def __init__(self, clean: Tensor, sigmas: Tensor, found: list[Part], dtype: torch.dtype | None):
        self.found, self.steps = found, len(sigmas) - 1
        self.trajectory = None if dtype is None else empty_trajectory(clean, sigmas, dtype)
        self.joins: Tensor | None = None
        if len(found) > 1:
            self.joins = torch.empty(len(sigmas), len(found) - 1, *clean.shape[1:])
            self.joins[0] = clean[[start for start, _ in found[1:]]]
        self.residuals: list[float] = []
        self.evaluations = 0
        self.inverted: list[Tensor] = []

    def of(self, number: int) -> Callable[[dict[str, Any]], None]:
        """The sampler's callback for a part."""

        def keep(step: dict[str, Any]) -> None:
            x, at = step["x"].detach(), step["i"] + 1
            if number:
                self.joins[at, number - 1], x = x[0], x[1:]
            if self.trajectory is not None:
                self.trajectory[at, own(self.found[number])] = x
            if step["residual"] is not None:
                self.residuals.append(step["residual"])
            if at == self.steps:
                self.inverted.append(x.float().cpu())
                self.evaluations += step["evaluations"]

        return keep

    def inversion(self, **more: Any) -> Inversion:
        """All of it, when every part is done. more: the fields that it does not know."""
        return Inversion(
            # Contiguous, as a file gives it back: another layout is another last digit.
            latent=torch.cat(self.inverted).contiguous(),
            trajectory=self.trajectory,
            residuals=tuple(self.residuals),
            evaluations=self.evaluations,
            joins=self.joins,
            **more,
        )


def normalisation_of(normalisation: Normalisation | None, start: int, stop: int) -> Normalisation | None:
    """What was applied to some of a clip's frames."""
    if normalisation is None or len(normalisation.scale) == 1:  # the same for all frames
        return normalisation
    return replace(normalisation, shift=normalisation.shift[start:stop], scale=normalisation.scale[start:stop])


def guidance_of(first: float, last: float, part: Part, frames: int) -> tuple[float, float]:
    """The guidance of a part's first and last frame, of one that runs linearly over all frames of a clip."""
    slope = (last - first) / max(frames - 1, 1)
    start, stop = part
    return first + slope * start, first + slope * (stop - 1)
