"""Which model something was made with, in a few bytes: the shapes of its layers, and the values of some weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

LAYERS, VALUES = 8, 32  # of so many weights so many values are kept
# Relative distance up to which two models count as one in other precisions: bfloat16 rounds by at most 1 / 256.
TOLERANCE = 0.004


@dataclass(frozen=True)
class Fingerprint:
    """Of a model. kind: its class; architecture: 64 hexadecimal digits; weights: [n] in float32, empty where
    none can be read (some quantised models)."""

    kind: str
    architecture: str
    weights: Tensor

    def check(self, model: Fingerprint, made: str) -> None:
        """ValueError unless `model` is the one that this was taken of, in whatever precision. made: what it made."""
        if (self.kind, self.architecture) != (model.kind, model.architecture):
            other = "a model of other layers" if self.kind == model.kind else f"another kind of model, {self.kind}"
            raise ValueError(f"{made} was made with {other}, and this is {model.kind}: use the model that made it")
        distance = 1.0
        if self.weights.shape == model.weights.shape:
            distance = float((self.weights - model.weights).norm() / self.weights.norm().clamp(min=1e-12))
        if not distance <= TOLERANCE:
            raise ValueError(
                f"{made} was made with other weights of the same architecture ({model.kind}; {distance:.1%} apart): "
                "use the checkpoint that made it, or invert the clip again with this one"
            )


def fingerprint(kind: str, weights: Mapping[str, Tensor]) -> Fingerprint:
    """Take it of a network's weights by name; patches that only sampling puts on (a LoRA) must not be in them.

    The values are taken evenly from the matrices, so that a fine-tuning shows.
    """
    names = sorted(weights)
    shapes = "\n".join(f"{name} {tuple(weights[name].shape)}" for name in names)
    matrices = [name for name in names if weights[name].ndim > 1 and weights[name].is_floating_point()]
    readable = [name for name in matrices if not weights[name].is_meta]
    chosen = readable[:: max(1, -(-len(readable) // LAYERS))]
    values = torch.cat([torch.empty(0), *(_values(weights[name]) for name in chosen)])
    return Fingerprint(kind, hashlib.sha256(shapes.encode()).hexdigest(), values)


def _values(weight: Tensor) -> Tensor:
    """Some values of a weight, evenly from its first to its last."""
    flat = weight.detach().reshape(-1)
    places = torch.linspace(0, len(flat) - 1, VALUES, dtype=torch.float64).round().long()
    return flat[places.to(flat.device)].float().cpu()
