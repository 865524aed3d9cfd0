"""An inversion as one safetensors file, so that it serves edits of another day.

All that the way back needs is kept in its own precision, bit for bit; the trajectory in that which it was stored in.
Tensors go by the names of `Inversion`'s fields. What is read is checked as what a stranger wrote.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..denoiser import NoisePath
from ..files import read_tensors, write_tensors
from ..fingerprint import Fingerprint
from .inversion import Inversion
from .latents import NORMALISATIONS, Normalisation, check_clip
from .parts import AT_ONCE, parts_of

FORMAT = "rewind inversion 1"
TENSORS = ("latent", "sigmas", "trajectory", "source", "augmentation_noise", "original", "joins")
SHIFT, SCALE, WEIGHTS = "normalisation.shift", "normalisation.scale", "model.weights"
ADVICE = "invert the clip again, or give a file that Save Inversion or `rewind edit --save-inversion` wrote"


def file_bytes(inversion: Inversion) -> int:
    """What the tensors of an inversion take, in memory and in its file."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(inversion).values())


def _tensors(inversion: Inversion) -> dict[str, Tensor]:
    kept = {name: getattr(inversion, name) for name in TENSORS}
    if inversion.normalisation is not None:
        kept |= {SHIFT: inversion.normalisation.shift, SCALE: inversion.normalisation.scale}
    if inversion.model is not None:
        kept[WEIGHTS] = inversion.model.weights
    return {name: tensor.detach().cpu() for name, tensor in kept.items() if tensor is not None}


def save_inversion(path: Path, inversion: Inversion) -> None:
    """Write an inversion, whole at any time. ValueError for one that holds NaN or infinite values."""
    tensors = _tensors(inversion)
    _check_finite(tensors)
    model, normalisation = inversion.model, inversion.normalisation
    settings = {
        key: asdict(value) if isinstance(value, NoisePath) else value for key, value in inversion.settings.items()
    }
    about = {
        "evaluations": inversion.evaluations,
        "residuals": inversion.residuals,
        "settings": settings,
        "normalisation": None if normalisation is None else normalisation.kind,
        "model": None if model is None else [model.kind, model.architecture],
    }
    write_tensors(path, tensors, {"format": FORMAT, "about": json.dumps(about)})


def load_inversion(path: Path) -> Inversion:
    """Read a file of `save_inversion`; nothing in it is executed.

    That it fits a model is for its `model` to check, `Fingerprint.check`. Raises FileNotFoundError where there is no
    file, ValueError for a broken one, one that holds something else, or one whose parts do not fit each other.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no inversion at {path}")
    tensors, words = read_tensors(path)
    if words.get("format") != FORMAT:
        raise ValueError(f"{path.name} holds no inversion of this version: {ADVICE}")
    try:
        return _read(tensors, json.loads(words["about"]))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path.name} is damaged ({error}): {ADVICE}") from error


def _read(tensors: dict[str, Tensor], about: dict[str, Any]) -> Inversion:
    """The inversion; an error of any kind that `load_inversion` names for what does not fit."""
    unknown = set(tensors) - {*TENSORS, SHIFT, SCALE, WEIGHTS}
    if unknown:
        raise ValueError("it holds tensors that are no part of an inversion")
    _check_finite(tensors)
    latent, sigmas, trajectory = tensors["latent"], tensors["sigmas"], tensors.get("trajectory")
    check_clip(latent)
    if sigmas.ndim != 1 or len(sigmas) < 2 or sigmas[-1] != 0 or not (sigmas.diff() < 0).all():
        raise ValueError("its noise levels do not fall to 0")
    if trajectory is not None and trajectory.shape != (len(sigmas), *latent.shape):
        raise ValueError(f"its trajectory is {tuple(trajectory.shape)} for {len(sigmas)} levels of a latent")
    source, noise, original = (tensors.get(name) for name in ("source", "augmentation_noise", "original"))
    if any(clean is not None and clean.shape != latent.shape for clean in (source, original)):
        raise ValueError("its source is of another size than its latent")
    if noise is not None and noise.shape != (3, 8 * latent.shape[-2], 8 * latent.shape[-1]):
        raise ValueError("its augmentation noise is of another size than its frames")
    settings = _settings(about["settings"])
    _check_joins(tensors.get("joins"), latent, sigmas, settings)
    return Inversion(
        latent=latent,
        sigmas=sigmas,
        normalisation=_normalisation(tensors, about["normalisation"], latent),
        trajectory=trajectory,
        residuals=tuple(_number(value) for value in about["residuals"]),
        evaluations=_whole(about["evaluations"]),
        settings=settings,
        source=source,
        augmentation_noise=noise,
        original=original,
        joins=tensors.get("joins"),
        model=_model(tensors.get(WEIGHTS), about["model"]),
    )


def _check_joins(joins: Tensor | None, latent: Tensor, sigmas: Tensor, settings: dict[str, Any]) -> None:
    at_once = _whole(settings.get(AT_ONCE, 0))
    shared = len(parts_of(Inversion(latent, sigmas, settings={AT_ONCE: at_once}))) - 1
    wanted = (len(sigmas), shared, *latent.shape[1:]) if shared else None
    if (None if joins is None else tuple(joins.shape)) != wanted:
        raise ValueError("the frames that its parts share are not those of its parts")


def _check_finite(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.element_size() < 2 or not torch.isfinite(tensor).all():
            raise ValueError(f"its {name} is not made of finite numbers")


def _normalisation(tensors: dict[str, Tensor], kind: str | None, latent: Tensor) -> Normalisation | None:
    if kind is None:
        return None
    if kind not in NORMALISATIONS:
        raise ValueError("its normalisation is of no known kind")
    normalisation = Normalisation(kind, tensors[SHIFT], tensors[SCALE])
    if normalisation.shift.shape != normalisation.scale.shape or not (normalisation.scale > 0).all():
        raise ValueError("its normalisation cannot be undone")
    normalisation.undo(latent)  # raises for statistics of another size
    return normalisation


def _model(weights: Tensor | None, about: list | None) -> Fingerprint | None:
    if about is None:
        return None
    kind, architecture = about
    if weights is None or weights.ndim != 1 or not re.fullmatch(r"\w{1,100}", kind):
        raise ValueError("what it says of its model is not whole")
    if not re.fullmatch(r"[0-9a-f]{64}", architecture):
        raise ValueError("what it says of its model's layers is not whole")
    return Fingerprint(kind, architecture, weights.float())


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise ValueError("a number in it is none")
    return value


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**64:
        raise ValueError("a whole number in it is none")
    return value


def _settings(settings: dict[str, Any]) -> dict[str, Any]:
    """How it was made: plain values, of which the nodes read seed, cfg and path."""
    made = {}
    for name, value in settings.items():
        if name == "path":
            made[name] = _path(value)
        elif isinstance(value, list):
            made[name] = tuple(_number(part) for part in value)
        elif isinstance(value, str):
            made[name] = value[:100]
        else:
            made[name] = value if isinstance(value, bool) else _number(value)
    if "seed" in made:
        _whole(made["seed"])
    if "cfg" in made:
        _number(made["cfg"])
    return made


def _path(value: dict[str, Any]) -> NoisePath:
    path = NoisePath(**value)
    if path.kind not in ("ve", "flow") or not all(type(flag) is bool for flag in (path.rectified, path.preserving)):
        raise ValueError("its noise path is of no known kind")
    if path.sigma_data is not None and not _number(path.sigma_data) > 0:
        raise ValueError("its noise path is of no known kind")
    return path
