"""Long clips in parts: what the host's samplers are given for each, see `pipelines/videoshop/parts.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.samplers
import node_helpers
import torch
from torch import Tensor

from ...pipelines.videoshop.inversion import Inversion
from ...pipelines.videoshop.masks import StoredSource, composite
from ...pipelines.videoshop.parts import Part, normalisation_of, part_of, parts, parts_of
from . import checks, sampling

MakeGuider = Callable[[list, Part], comfy.samplers.CFGGuider]


def check_parts(model: Any, samples: Tensor, at_once: int) -> list[Part]:
    """The parts of a clip [T, C, h, w]; ValueError for a model that is not told of a first frame."""
    if not at_once:
        return [(0, len(samples))]
    if not checks.takes_first_frame(model):
        raise ValueError(
            f"frames_at_once is {at_once}, but this MODEL is not told of a first frame, by which a part goes on from "
            "another: set it to 0, and connect Context Windows (Manual) in front for clips that are too long (Wan "
            "image-to-video is told of the edit in all of them where cond_retain_index_list is 0)"
        )
    return parts(len(samples), at_once)


def told_of(positive: list, frame: Tensor) -> list:
    """A CONDITIONING that is told of another first frame, a latent [1, C, h, w] in the VAE's space."""
    return node_helpers.conditioning_set_values(positive, {"concat_latent_image": frame})


def play(
    model: Any,
    inversion: Inversion,
    positive: list,
    make_guider: MakeGuider,
    *,
    undo: bool = True,
    region: Tensor | None = None,
    following: Tensor | None = None,
) -> Tensor:
    """An inversion played again, part by part: the clip in the VAE's space.

    make_guider: of a part's condition and its frames. undo: the normalisation. region: [1 or T, 1, h, w] of latents,
    outside which the source comes back. following: [T, C, h, w] in the VAE's space, the frames that later parts are
    told of; None takes what was played.
    """
    found, played = parts_of(inversion), []
    if region is not None:
        region = region.expand(len(inversion.latent), -1, -1, -1)
    for number, (start, stop) in enumerate(found):
        part, told = part_of(inversion, number), positive
        masked = None if region is None else region[start:stop]
        if number:
            shared = (
                _clean(model, inversion, played[-1], start, undo) if following is None else following[start : start + 1]
            )
            told = told_of(positive, shared)
        finish = part.normalisation.undo if undo and part.normalisation is not None else None
        result = sampling.sample(
            make_guider(told, (start, stop)),
            sampling.euler_sampler(finish, None if masked is None else StoredSource(part, masked)),
            inversion.sigmas,
            model.model.process_latent_out(part.latent.float()),
            torch.zeros_like(part.latent),
            inversion.settings.get("seed", 0),
            part=(number, len(found)),
        )
        if masked is not None:
            result = composite(result, part.original, masked)
        played.append(result[1:] if number else result)
    return torch.cat(played)


def _clean(model: Any, inversion: Inversion, played: Tensor, frame: int, undone: bool) -> Tensor:
    """The last frame of what was played, [1, C, h, w] in the VAE's space, without the normalisation. frame: its number
    in the clip."""
    last = played[-1:]
    normalisation = normalisation_of(inversion.normalisation, frame, frame + 1)
    if undone or normalisation is None:
        return last
    return model.model.process_latent_out(normalisation.undo(model.model.process_latent_in(last)))
