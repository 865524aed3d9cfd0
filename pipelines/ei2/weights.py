"""What a one-shot tuning leaves: the temporal modules and the changes of the query projections, as one file.

Tensors go by the host's names: `<block>.temporal.to_q.weight` and so on, spectral normalisation folded in, and
`<block>.attn1.to_q.diff`, `<block>.attn2.to_q.diff`, which are added to the model's own weights and which the host's
LoRA loaders read too. Metadata tells the model's architecture, the settings and the caption.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files import read_tensors, write_tensors
from ..training import State
from .inflation import NO_TEMPORAL, InflationSettings, architecture, transformer_blocks
from .stam import TemporalAttention, folded_shapes

FORMAT = "rewind ei2 weights 1"
PREFIX = "diffusion_model."
QUERIES = ("attn1.to_q", "attn2.to_q")
Shapes = dict[str, tuple[int, ...]]


def query_layers(network: nn.Module) -> dict[str, nn.Linear]:
    """The query projections of self- and cross-attention, by the host's names."""
    blocks = transformer_blocks(network)
    return {f"{name}.{layer}": block.get_submodule(layer) for name, block in blocks.items() for layer in QUERIES}


@dataclass(frozen=True)
class EI2Weights:
    """Tuned weights in float32 on the CPU. architecture: of the model they were tuned on (`inflation.architecture`)."""

    tensors: State
    settings: InflationSettings
    architecture: str
    caption: str = ""
    about: dict[str, Any] = field(default_factory=dict)  # how they were tuned, for the record

    def __str__(self) -> str:
        """What they are of, in three lines: the clip, what was tuned and how, the model."""
        clip = f'"{self.caption}"' if self.caption else "a clip without a caption"
        parts = {"steps": "{} steps", "learning_rate": "learning rate {}", "frames": "{} frames"}
        known = [text.format(self.about[name]) for name, text in parts.items() if name in self.about]
        return f"{clip}\n{', '.join([str(self.settings), *known])}\nfor {_in_short(self.architecture)}"

    def check(self, network: nn.Module) -> None:
        """ValueError unless they fit a text-to-image UNet, of either face: the architecture, and every tensor.

        A tuning leaves all its tensors; without any, and without a temporal module, they are an attention alone.
        """
        wanted = architecture(network)
        if wanted != self.architecture:
            raise ValueError(
                "these EI² weights were tuned on a model of another architecture: they are for "
                f"{_in_short(self.architecture)}, the model has {_in_short(wanted)}"
            )
        if self.tensors or self.settings.temporal != NO_TEMPORAL:
            self._check_tensors(_shapes(network, self.settings.temporal))

    def _check_tensors(self, wanted: Shapes) -> None:
        """ValueError that names the first tensor which is missing, of another shape, or unknown."""
        for key, shape in wanted.items():
            if key not in self.tensors:
                raise ValueError(f"these EI² weights are damaged at {key}: it is missing")
            own = tuple(self.tensors[key].shape)
            if own != shape:
                raise ValueError(f"these EI² weights are damaged at {key}: it has shape {own}, the model needs {shape}")
        for key in self.tensors:
            if key not in wanted:
                raise ValueError(
                    f"these EI² weights are damaged at {key}: neither the model nor its temporal modules "
                    f"({self.settings.temporal}) have such a tensor"
                )

    def temporal(self, network: nn.Module) -> dict[str, TemporalAttention]:
        """The temporal modules by block, ready for inference, on the CPU; none where there are none."""
        self.check(network)
        s, modules = self.settings, {}
        if s.temporal == NO_TEMPORAL:
            return {}
        for name, block in transformer_blocks(network).items():
            start = f"{name}.temporal."
            own = {key.removeprefix(start): t for key, t in self.tensors.items() if key.startswith(start)}
            module = TemporalAttention(block.attn1.to_q.out_features, block.attn1.heads, s.temporal, s.axes, None, True)
            module.load_state_dict(own)
            modules[name] = module.eval().requires_grad_(False)
        return modules

    def queries(self, blocks: list[str] | None = None) -> State:
        """The changes of the query projections of some blocks, or of all, by the names of their layers."""
        diffs = {key.removesuffix(".diff"): t for key, t in self.tensors.items() if key.endswith(".diff")}
        return {name: diff for name, diff in diffs.items() if blocks is None or name.rpartition(".attn")[0] in blocks}


def _shapes(network: nn.Module, temporal: str) -> Shapes:
    """What a tuning of a network leaves, with temporal modules of a kind or "none", block by block."""
    shapes: Shapes = {
        f"{name}.diff": (layer.out_features, layer.in_features) for name, layer in query_layers(network).items()
    }
    if temporal != NO_TEMPORAL:
        for name, block in transformer_blocks(network).items():
            own = folded_shapes(temporal, block.attn1.to_q.out_features)
            shapes |= {f"{name}.temporal.{key}": shape for key, shape in own.items()}
    return shapes


def _in_short(text: str) -> str:
    """An architecture as a user may know it."""
    context, _, blocks = text.partition("; ")
    widths = [int(block.rpartition(":")[2]) for block in blocks.split()]
    spread = f" of widths {min(widths)} to {max(widths)}" if widths else ""
    return f"{len(widths)} blocks{spread}, {context}"


def save_weights(path: Path, weights: EI2Weights, dtype: torch.dtype = torch.float16) -> None:
    """Write them to one safetensors file, whole at any time, in half precision by default."""
    about = {"format": FORMAT, "architecture": weights.architecture, "caption": weights.caption}
    about |= {"settings": json.dumps(asdict(weights.settings)), "about": json.dumps(weights.about)}
    write_tensors(path, {PREFIX + key: tensor.to(dtype) for key, tensor in weights.tensors.items()}, about)


def load_weights(path: Path) -> EI2Weights:
    """Read a file of `save_weights`; nothing in it is executed.

    Raises FileNotFoundError where there is none, ValueError for a broken one, or one that holds something else.
    """
    if not path.exists():
        raise FileNotFoundError(f"there are no EI² weights at {path}")
    read, about = read_tensors(path)
    tensors = {key.removeprefix(PREFIX): tensor.float() for key, tensor in read.items()}
    if about.get("format") != FORMAT:
        raise ValueError(f"{path.name} holds no EI² weights: give a file that EI² Save Weights or `rewind ei2` wrote")
    try:
        settings = InflationSettings(**json.loads(about["settings"]))
        more = json.loads(about["about"])
        return EI2Weights(tensors, settings, about["architecture"], about["caption"], more)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path.name} was written by another version of Rewind, or is damaged: {error}") from error
