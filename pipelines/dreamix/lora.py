"""Low-rank adapters (LoRA, arXiv 2106.09685) on the linear layers of a network, by hooks: the weights stay.

W x becomes W x + (alpha / rank) B A x, with A [rank, in] drawn at random and B [out, rank] zero, so that a fresh
adapter changes nothing, bit for bit. One implementation serves the host's network and diffusers' ones; only the names
in the file differ (`to_host`, `to_diffusers`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .temporal import is_temporal

TARGETS = ("attention", "attention and feed-forward")
# Ends of the names of linear layers: UNets of both faces and diffusers' Wan, then the host's Wan.
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", *(f"{a}_attn.{x}" for a in ("self", "cross") for x in "qkvo"))
_FEED_FORWARD = ("net.0.proj", "net.2", "ffn.0", "ffn.2")

State = dict[str, Tensor]


def target_layers(network: nn.Module, targets: str = "attention") -> dict[str, nn.Linear]:
    """The linear layers that get an adapter, by name: attention's projections, spatial and temporal alike.

    Raises ValueError for other targets, or where the network has none of them.
    """
    if targets not in TARGETS:
        raise ValueError(f'the targets are "{targets}"; they must be one of {", ".join(TARGETS)}')
    ends = _ATTENTION if targets == "attention" else _ATTENTION + _FEED_FORWARD
    found = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and any(name == end or name.endswith("." + end) for end in ends)
    }
    if not found:
        raise ValueError(f"a {type(network).__name__} has no layer that LoRA is known to go on")
    return found


class LoRA(nn.Module):
    """Adapters for some layers of a network. `attach` puts them on, `detach` takes them off.

    rank: of the two matrices; alpha: the update is scaled by alpha / rank, rank itself by default (so by 1).
    generator: draws A, on the CPU. Adapters are float32 and lie on their layer's device.
    """

    def __init__(self, layers: dict[str, nn.Linear], rank: int, generator: torch.Generator, alpha: float | None = None):
        super().__init__()
        if rank < 1:
            raise ValueError(f"the rank is {rank}; it must be at least 1")
        self.layers, self.rank = layers, rank
        self.alpha = float(rank if alpha is None else alpha)
        self.strength = 1.0
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        for layer in layers.values():
            wide, high = layer.in_features, layer.out_features
            down = (2 * torch.rand(rank, wide, generator=generator) - 1) / math.sqrt(wide)  # Kaiming's, as in the paper
            device = layer.weight.device
            self.down.append(nn.Parameter(down.to(device)))
            self.up.append(nn.Parameter(torch.zeros(high, rank, device=device)))
        self._handles: list = []

    def attach(self) -> None:
        """Add the adapters' output to their layers' from now on."""
        for layer, down, up in zip(self.layers.values(), self.down, self.up):
            self._handles.append(layer.register_forward_hook(self._hook(down, up)))

    def _hook(self, down: Tensor, up: Tensor):
        def add(layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
            x = args[0].to(down.dtype)
            update = nn.functional.linear(nn.functional.linear(x, down), up)
            return output + (self.strength * self.alpha / self.rank * update).to(output.dtype)

        return add

    def detach(self) -> None:
        """Take the adapters off their layers."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> LoRA:
        self.attach()
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def pairs(self) -> Iterable[tuple[str, Tensor, Tensor]]:
        """(name, A, B) of every layer."""
        return zip(self.layers, self.down, self.up)

    def spatial(self) -> list[Tensor]:
        """The parameters on layers that do not mix frames: what the frames' loss may train."""
        return [p for name, down, up in self.pairs() if not is_temporal(name) for p in (down, up)]

    def state(self) -> State:
        """The weights as they are saved: `<layer>.lora_down.weight`, `.lora_up.weight`, `.alpha`, on the CPU."""
        state: State = {}
        for name, down, up in self.pairs():
            state[f"{name}.lora_down.weight"] = down.detach().cpu().clone()
            state[f"{name}.lora_up.weight"] = up.detach().cpu().clone()
            state[f"{name}.alpha"] = torch.tensor(self.alpha)
        return state

    def load(self, state: State) -> None:
        """The inverse of `state`. Raises ValueError for weights of other layers, or of another rank."""
        wanted = self.state()
        if wanted.keys() != state.keys() or any(wanted[key].shape != state[key].shape for key in wanted):
            wrong = sorted(wanted.keys() ^ state.keys()) or [k for k in wanted if wanted[k].shape != state[k].shape]
            raise ValueError(f"these LoRA weights are not of this network and rank {self.rank}: {wrong[:3]}")
        with torch.no_grad():
            for name, down, up in self.pairs():
                down.copy_(state[f"{name}.lora_down.weight"])
                up.copy_(state[f"{name}.lora_up.weight"])


def from_state(network: nn.Module, state: State) -> LoRA:
    """The adapters that a state holds, for its network. Raises ValueError for weights of another network."""
    names = [key.removesuffix(".lora_down.weight") for key in state if key.endswith(".lora_down.weight")]
    modules = dict(network.named_modules())
    unknown = [name for name in names if not isinstance(modules.get(name), nn.Linear)]
    if unknown or not names:
        raise ValueError(f"these LoRA weights are not of a {type(network).__name__}: {unknown[:3] or 'none found'}")
    rank, alpha = len(state[f"{names[0]}.lora_down.weight"]), float(state[f"{names[0]}.alpha"])
    lora = LoRA({name: modules[name] for name in names}, rank, torch.Generator(), alpha)
    lora.load(state)
    return lora


def to_host(state: State) -> State:
    """The names that ComfyUI's LoRA nodes read: the network's own, as "generic" LoRA keys."""
    return {f"diffusion_model.{name}": tensor for name, tensor in state.items()}


def to_diffusers(state: State, component: str = "unet") -> State:
    """The names of diffusers and PEFT. component: the network's name in the pipeline. PEFT's scale is 1: alpha = rank.

    Adapters of another alpha have it folded into B.
    """
    result: State = {}
    for key, down in state.items():
        name, is_down = key.removesuffix(".lora_down.weight"), key.endswith(".lora_down.weight")
        if is_down:
            scale = float(state[f"{name}.alpha"]) / len(down)
            result[f"{component}.{name}.lora_A.weight"] = down
            result[f"{component}.{name}.lora_B.weight"] = scale * state[f"{name}.lora_up.weight"]
    return result


def from_diffusers(state: State, component: str = "unet") -> State:
    """The inverse of `to_diffusers`, with an alpha of the rank."""
    result: State = {}
    for key, down in state.items():
        if key.endswith(".lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            ours = name.removeprefix(component + ".")
            result[f"{ours}.lora_down.weight"], result[f"{ours}.lora_up.weight"] = down, state[f"{name}.lora_B.weight"]
            result[f"{ours}.alpha"] = torch.tensor(float(len(down)))
    return result
