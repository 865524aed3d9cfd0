"""Where EI²'s modules go into a text-to-image UNet, on the host's network and on diffusers'.

Every spatial transformer block gets FFAM in place of its self-attention and STAM between self- and cross-attention:

    x = x + FFAM(norm1 x);  x = x + STAM(x);  x = x + CA(norm2 x);  x = x + FF(norm3 x)

Blocks go by the host's names in both faces, "input_blocks.1.1.transformer_blocks.0", so that weights are the same file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .ffam import Attend, attend, check_attention, frame_attention
from .stam import AXES, TEMPORALS, TemporalAttention

NO_TEMPORAL = "none"
PLACES = ("all", "input", "middle", "output")
# (name of the block, what enters the temporal module, what leaves it), tokens [B frames, n, C]
Observer = Callable[[str, Tensor, Tensor], None]


@dataclass(frozen=True)
class InflationSettings:
    """What goes into the blocks: one of `ffam.ATTENTIONS`, its coarse factor, and one of `stam.TEMPORALS` or "none"."""

    attention: str = "FFAM"
    factor: int = 2
    temporal: str = "STAM"
    axes: str = "frames"

    def __post_init__(self) -> None:
        """Raises ValueError for what is not one of them."""
        check_attention(self.attention, self.factor)
        if self.temporal not in (*TEMPORALS, NO_TEMPORAL):
            options = ", ".join((*TEMPORALS, NO_TEMPORAL))
            raise ValueError(f'the temporal module is "{self.temporal}"; it must be one of {options}')
        if self.axes not in AXES:
            raise ValueError(f'the centring is over "{self.axes}"; it must be one of {", ".join(AXES)}')

    def __str__(self) -> str:
        """In words: "STAM and FFAM by 2", "first frame"."""
        attention = f"FFAM by {self.factor}" if self.attention == "FFAM" else self.attention
        return attention if self.temporal == NO_TEMPORAL else f"{self.temporal} and {attention}"


# --- blocks -----------------------------------------------------------------------------------------------------------


def host_name(name: str, layers: int) -> str:
    """The host's name of a transformer block in diffusers' UNet2DConditionModel. layers: its layers_per_block."""
    block = re.fullmatch(r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.(transformer_blocks\.\d+)", name)
    if block is None:
        return re.sub(r"^mid_block\.attentions\.0\.", "middle_block.1.", name)
    side, level, index, rest = block[1], int(block[2]), int(block[3]), block[4]
    place = level * (layers + 1) + index  # a level has its layers and, on the way down, a downsampler
    return f"input_blocks.{1 + place}.1.{rest}" if side == "down" else f"output_blocks.{place}.1.{rest}"


def transformer_blocks(network: nn.Module) -> dict[str, nn.Module]:
    """The transformer blocks of a text-to-image UNet by the host's names, in either face.

    Raises ValueError for every other network: those with temporal layers of their own, and diffusion transformers.
    """
    config = getattr(network, "config", None)
    layers = getattr(config, "layers_per_block", None)
    found = {}
    for name, module in network.named_modules():
        if any(part in name for part in ("time_stack", "temporal_transformer_blocks", "motion_module")):
            found = {}
            break
        if re.search(r"\.transformer_blocks\.\d+$", name) and hasattr(module, "attn1"):
            found[host_name(name, layers) if isinstance(layers, int) else name] = module
    if not found or not all(re.match(r"(input_blocks|middle_block|output_blocks)\.", name) for name in found):
        raise ValueError(
            f"a {type(network).__name__} cannot be inflated: EI² takes the UNets of text-to-image models, Stable "
            "Diffusion 1.x, 2.x and SDXL; video models have temporal layers already"
        )
    return dict(sorted(found.items(), key=lambda item: _order(item[0])))


def _order(name: str) -> list[int]:
    """Sorts blocks as they are passed, alike in both faces."""
    return [("input", "middle", "output").index(name.partition("_")[0]), *map(int, re.findall(r"\d+", name))]


def chosen_blocks(names: list[str], place: str) -> list[str]:
    """The blocks of a part of the UNet, one of PLACES. Raises ValueError for another."""
    if place not in PLACES:
        raise ValueError(f'the blocks are "{place}"; they must be one of {", ".join(PLACES)}')
    return [name for name in names if place == "all" or name.startswith(place)]


def architecture(network: nn.Module) -> str:
    """What weights must fit: every block with its width, and the width of the context."""
    blocks = transformer_blocks(network)
    widths = " ".join(f"{name}:{block.attn1.to_q.in_features}" for name, block in blocks.items())
    return f"context {next(iter(blocks.values())).attn2.to_k.in_features}; {widths}"


# --- what is put in ---------------------------------------------------------------------------------------------------


@dataclass
class Inflation:
    """The modules of one inflated UNet. Blocks that `blocks` does not name are as they were.

    temporal: by block; empty for FFAM alone. strength: 0..1, of FFAM against the block's own attention, and of the
    temporal residual. observer: is shown what enters and leaves each temporal module.
    """

    settings: InflationSettings
    blocks: list[str]
    temporal: dict[str, TemporalAttention] = field(default_factory=dict)
    strength: float = 1.0
    observer: Observer | None = None

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        frames: int,
        grid: tuple[int, int],
        heads: int,
        attend: Attend = attend,
    ) -> Tensor:
        """What takes the place of the self-attention, before its output projection. q, k, v: [B frames, h w, C]."""
        s = self.settings
        mixed = frame_attention(q, k, v, frames, grid, heads, s.attention, s.factor, attend)
        if self.strength == 1 or s.attention == "own frame":
            return mixed
        return torch.lerp(attend(q, k, v, heads), mixed, self.strength)

    def residual(self, name: str, x: Tensor, frames: int) -> Tensor | None:
        """What is added between self- and cross-attention to x [B frames, n, C]; None where there is no module."""
        module = self.temporal.get(name)
        if module is None:
            return None
        residual = self.strength * module(x, frames)
        if self.observer is not None:
            self.observer(name, x, x + residual)
        return residual


def fresh_temporal(network: nn.Module, settings: InflationSettings, seed: int) -> dict[str, TemporalAttention]:
    """New temporal modules for every block, in float32 on the network's device; none where settings say so."""
    if settings.temporal == NO_TEMPORAL:
        return {}
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name, block in transformer_blocks(network).items():
        width, heads = block.attn1.to_q.out_features, block.attn1.heads
        module = TemporalAttention(width, heads, settings.temporal, settings.axes, generator)
        modules[name] = module.to(block.attn1.to_q.weight.device)
    return modules


# --- diffusers --------------------------------------------------------------------------------------------------------


class _FrameProcessor:
    """An attention processor of diffusers: an inflation's attention in place of a block's own."""

    def __init__(self, inflation: Inflation, frames: int, grid: Callable[[], tuple[int, int]]):
        self.inflation, self.frames, self.grid = inflation, frames, grid

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        q, k, v = (to(hidden_states) for to in (attn.to_q, attn.to_k, attn.to_v))
        out = self.inflation.attention(q, k, v, self.frames, self.grid(), attn.heads)
        for layer in attn.to_out:
            out = layer(out)
        return out


@contextmanager
def inflated(network: nn.Module, inflation: Inflation, frames: int) -> Iterator[None]:
    """Inside, diffusers' UNet is inflated for clips of so many frames, in its batch; outside it is as it was.

    Raises ValueError for a network that is inflated already: the modules would add up.
    """
    blocks = {name: block for name, block in transformer_blocks(network).items() if name in inflation.blocks}
    if any(isinstance(block.attn1.processor, _FrameProcessor) for block in blocks.values()):
        raise ValueError("this UNet is inflated already: leave the first inflation before the next")
    grids: dict[str, tuple[int, int]] = {}
    entering: dict[str, Tensor] = {}
    handles, processors = [], {}

    def sees_grid(parents: list[str]) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            grids.update(dict.fromkeys(parents, tuple(hidden.shape[-2:])))

        return look

    def sees_input(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple) -> None:
            entering[name] = args[0]

        return look

    def adds(name: str) -> Callable[..., Tensor]:
        def add(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            residual = inflation.residual(name, entering.pop(name) + output, frames)
            return output if residual is None else output + residual

        return add

    for module in network.modules():
        inside = [name for name, block in blocks.items() if block in list(getattr(module, "transformer_blocks", []))]
        if inside:
            handles.append(module.register_forward_pre_hook(sees_grid(inside), with_kwargs=True))
    try:
        for name, block in blocks.items():
            processors[name] = block.attn1.processor
            block.attn1.set_processor(_FrameProcessor(inflation, frames, lambda name=name: grids[name]))
            handles.append(block.norm1.register_forward_pre_hook(sees_input(name)))
            handles.append(block.attn1.register_forward_hook(adds(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, processor in processors.items():
            blocks[name].attn1.set_processor(processor)
