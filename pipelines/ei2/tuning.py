"""One-shot tuning: the temporal modules and the query projections, on one clip and its caption.

The diffusion loss with random noise (the paper's figure 2a): the model's own training loss, at one time for the whole
clip, uniform over the training times, with noise of its own for every frame. What the paper trains and its numbers are
not public: the values are Tune-A-Video's released ones (arXiv 2212.11565: AdamW 3e-5, 500 steps, weight decay 1e-2,
gradients clipped at 1), and so is the choice of the query projections of self- and cross-attention; the keys and
values, and everything else, stay. Weight decay pulls the queries' CHANGE to 0, not the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import training
from ..denoiser import EPS, NoisePath
from ..training import PRECISIONS, State, checkpointed, frozen
from .inflation import Inflation, InflationSettings, architecture, fresh_temporal, transformer_blocks
from .stam import SpectralLinear
from .weights import EI2Weights, query_layers


@dataclass(frozen=True)
class OneShot:
    """Settings of a tuning. warm_up: steps in which the learning rate rises. clip: largest norm of the gradient.

    precision: of the network's arithmetic; what is trained stays float32. checkpointing: recompute blocks on the way
    back, for memory.
    """

    steps: int = 500
    learning_rate: float = 3e-5
    weight_decay: float = 1e-2
    warm_up: int = 0
    clip: float = 1.0
    precision: str = "float32"
    checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of its range."""
        for name in ("steps", "warm_up"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if not 0 < self.learning_rate <= 1:
            raise ValueError(f"the learning rate is {self.learning_rate}; it must be above 0, 3e-5 to 1e-3 as a rule")
        if self.precision not in PRECISIONS:
            raise ValueError(f'the precision is "{self.precision}"; it must be one of {", ".join(PRECISIONS)}')


@dataclass(frozen=True)
class Subject:
    """What is tuned: a UNet, how it denoises the clip under its caption, and how an inflation gets into it.

    denoise: (x, sigma [T]) -> x0, in model space. clip: latents [T, 4, h, w]. sigmas: [n], the levels of the training
    times. inflate: what the network must run inside, for a clip of these frames.
    """

    network: nn.Module
    denoise: Callable[[Tensor, Tensor], Tensor]
    clip: Tensor
    sigmas: Tensor
    inflate: Callable[[Inflation], AbstractContextManager]
    path: NoisePath = EPS
    caption: str = ""

    def check(self) -> None:
        """ValueError unless there is a clip of at least 2 finite frames, and a UNet that can be inflated."""
        transformer_blocks(self.network)
        if self.clip.ndim != 4 or len(self.clip) < 2:
            raise ValueError(f"the clip's latents have shape {tuple(self.clip.shape)}; at least 2 frames are needed")
        if not torch.isfinite(self.clip).all():
            raise ValueError("the latents of the clip hold NaN or infinite values")


class Queries(nn.Module):
    """Changes of the query projections, full matrices that begin at 0, by hooks: the weights themselves stay."""

    def __init__(self, layers: dict[str, nn.Linear]):
        super().__init__()
        self.layers = layers
        self.diffs = nn.ParameterList(
            nn.Parameter(torch.zeros(layer.weight.shape, device=layer.weight.device)) for layer in layers.values()
        )
        self._handles: list = []

    def __enter__(self) -> Queries:
        for layer, diff in zip(self.layers.values(), self.diffs):
            self._handles.append(layer.register_forward_hook(self._hook(diff)))
        return self

    @staticmethod
    def _hook(diff: Tensor):
        def add(layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
            return output + F.linear(args[0].to(diff.dtype), diff).to(output.dtype)

        return add

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def load(self, diffs: State) -> None:
        """Take on changes by the names of their layers; a layer without one is left at 0."""
        with torch.no_grad():
            for name, diff in zip(self.layers, self.diffs):
                diff.copy_(diffs[name]) if name in diffs else diff.zero_()


def draw_time(sigmas: Tensor, generator: torch.Generator) -> float:
    """The noise level of one training time, uniform over them."""
    return float(sigmas[torch.randint(len(sigmas), (), generator=generator)])


def training_loss(denoise, clean: Tensor, sigma: float, noise: Tensor, path: NoisePath) -> Tensor:
    """The model's own loss on a clip [T, 4, h, w] at one level: of the noise for EPS, of v for V.

    |D - x0|^2 / sigma^2 is the squared error of the noise, (1 + sigma^2) / sigma^2 times it that of v.
    """
    error = denoise(clean + sigma * noise, torch.full((len(clean),), sigma, device=clean.device)).float() - clean
    weight = (1 + sigma**2 if path.sigma_data is not None else 1.0) / sigma**2
    return weight * (error**2).mean()


class Run(training.Run):
    """One tuning, step by step, inside `attached`."""

    format = "rewind ei2 checkpoint 1"

    def __init__(self, subject: Subject, settings: OneShot, inflation: InflationSettings):
        subject.check()
        self.subject = subject
        temporal = fresh_temporal(subject.network, inflation, settings.seed)
        self.inflation = Inflation(inflation, list(transformer_blocks(subject.network)), temporal)
        self.queries = Queries(query_layers(subject.network))
        self.temporal = nn.ModuleList(temporal.values()).train()
        super().__init__([*self.temporal.parameters(), *self.queries.parameters()], settings)

    def gradients(self, generator: torch.Generator) -> dict[str, float]:
        s, clean = self.subject, self.subject.clip
        sigma = draw_time(s.sigmas, generator)
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        with self.autocast:
            loss = training_loss(s.denoise, clean, sigma, noise, s.path)
        self.backward(loss, self.parameters)
        return {"total": float(loss.detach())}

    def train_step(self) -> dict[str, float]:
        losses = super().train_step()
        for module in self.temporal.modules():
            if isinstance(module, SpectralLinear):
                module.iterate()
        return losses

    def weights(self) -> State:
        state = {f"queries.{key}": t.detach().cpu().clone() for key, t in self.queries.state_dict().items()}
        return state | {f"temporal.{key}": t.detach().cpu().clone() for key, t in self.temporal.state_dict().items()}

    def load(self, weights: State) -> None:
        for name, module in (("queries", self.queries), ("temporal", self.temporal)):
            start = f"{name}."
            module.load_state_dict({k.removeprefix(start): t for k, t in weights.items() if k.startswith(start)})

    def identity(self) -> Iterator[str | Tensor]:
        """The clip, the caption, the settings but the number of steps, and the network."""
        settings = {key: value for key, value in asdict(self.settings).items() if key not in ("steps", "checkpointing")}
        yield repr((sorted(settings.items()), self.inflation.settings, self.subject.caption, self.subject.path))
        yield architecture(self.subject.network)
        yield from (p.flatten()[:4] for p in self.subject.network.parameters())  # a LoRA changes every number
        yield from (self.subject.sigmas, self.subject.clip)

    def result(self) -> EI2Weights:
        """The weights as they are used and saved."""
        tensors = {
            f"{name}.diff": diff.detach().cpu().clone() for name, diff in zip(self.queries.layers, self.queries.diffs)
        }
        for name, module in self.inflation.temporal.items():
            tensors |= {f"{name}.temporal.{key}": t for key, t in module.folded().items()}
        about = {"steps": self.step, "learning_rate": self.settings.learning_rate, "seed": self.settings.seed}
        about["frames"] = len(self.subject.clip)
        return EI2Weights(
            tensors, self.inflation.settings, architecture(self.subject.network), self.subject.caption, about
        )


def one_shot_tune(
    subject: Subject,
    settings: OneShot = OneShot(),
    inflation: InflationSettings = InflationSettings(),
    callback: Callable[[dict[str, Any]], None] | None = None,
    checkpoints: Path | None = None,
    every: int = 25,
) -> tuple[EI2Weights, list[float]]:
    """Tune on a clip; the weights, and the loss of every step. The network itself is bit for bit the same afterwards.

    callback: gets each step's dict, {"i", "total"}; what it raises (a Cancel) ends the run. checkpoints: a folder in
    which the run keeps itself every `every` steps, to go on from (`training.begin`).
    Raises ValueError for bad input, or a broken file, before anything is trained.
    """
    run, checkpoint = training.begin(lambda: Run(subject, settings, inflation), checkpoints, "ei2")
    with frozen(subject.network), run.queries, subject.inflate(run.inflation):
        with checkpointed(subject.network, settings.checkpointing):
            training.finish(run, callback, checkpoint, every)
    return run.result(), run.losses["total"]
