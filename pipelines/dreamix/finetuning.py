"""Dreamix's mixed video-image fine-tuning (arXiv 2302.01329, equation 3) of low-rank adapters.

    L = alpha L_video + (1 - alpha) L_frames

L_video is the diffusion loss on the clip, with full temporal attention; L_frames the same loss on its frames as an
unordered set, each a clip of its own, with the temporal path masked (`temporal.masked`) and without a gradient to
temporal layers. Both under one rare-token prompt. alpha = 0 trains on pictures alone (image animation, subjects),
alpha = 1 on the clip alone.

Known of the paper: the two losses, their weights, the mask, that temporal layers learn nothing from frames, "a small
number of iterations and a low learning rate". Not known: any number, the optimiser, and whether the whole network is
trained. Ours are LoRA instead of the whole network; AdamW; both losses in every step; times s uniform on the paper's
schedule (one for the clip, one for each frame), turned to the model's noise levels by equal log-SNR; and the weight
SNR + 1 on the squared error of the denoised estimate, which is the loss of a v-prediction on any model family (for
SVD's own network exactly the error of its output).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import training
from ..denoiser import NoisePath
from ..training import PRECISIONS, State, checkpointed, frozen
from .corruption import add_noise, sigma_at
from .lora import TARGETS, LoRA, target_layers, to_host
from .temporal import MASKS, architecture, masked

Denoiser = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class FineTuning:
    """Settings; every default is ours and fits the embedded model, on validation clips of which it was chosen.

    steps: 0 trains nothing. alpha: 0..1, the share of the clip's loss. rank, targets: of the LoRA. mask: "identity" or
    "bypass". warm_up: steps in which the learning rate rises. clip: largest norm of the gradient. precision: of the
    network's arithmetic; adapters stay float32. pictures: at most so many frames in one step, drawn anew each time.
    checkpointing: recompute blocks on the way back, for memory.
    """

    steps: int = 100
    alpha: float = 0.5
    learning_rate: float = 1e-3
    rank: int = 16
    targets: str = "attention"
    mask: str = "identity"
    warm_up: int = 10
    clip: float = 1.0
    weight_decay: float = 1e-2
    precision: str = "float32"
    pictures: int = 16
    checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of its range."""
        for name, low in (("steps", 0), ("rank", 1), ("warm_up", 0), ("pictures", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {low}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}; it must be 0 (frames alone) to 1 (the clip alone)")
        if not 0 < self.learning_rate <= 1:
            raise ValueError(f"the learning rate is {self.learning_rate}; it must be above 0, 1e-4 to 1e-3 for LoRA")
        for name, options in (("mask", MASKS), ("targets", TARGETS), ("precision", tuple(PRECISIONS))):
            if getattr(self, name) not in options:
                raise ValueError(f'{name} is "{getattr(self, name)}"; it must be one of {", ".join(options)}')


@dataclass(frozen=True)
class Losses:
    """Of each step: the clip's and the frames' loss (NaN where one is not computed), and their weighted sum."""

    video: list[float]
    frames: list[float]
    total: list[float]


@dataclass(frozen=True)
class Tuned:
    """The trained adapters' weights (`lora.LoRA.state`) and the losses."""

    lora: State
    losses: Losses


@dataclass(frozen=True)
class Subject:
    """What is trained: a network, and how it denoises.

    network: the module whose linear layers get adapters. video, pictures: denoisers (x, sigma) -> x0 in model space
    over the clip, and over one-frame clips as a batch. clip: latents [T, C, h, w] or [1, C, T, h, w], None where alpha
    is 0; frames: [M, C, h, w] or [M, C, 1, h, w], None where alpha is 1. path, sigma_range: the model's noise.
    """

    network: nn.Module
    video: Denoiser | None
    pictures: Denoiser | None
    clip: Tensor | None
    frames: Tensor | None
    path: NoisePath
    sigma_range: tuple[float, float]

    def check(self, alpha: float) -> None:
        """ValueError unless everything that alpha needs is there, finite, and the network can be tuned."""
        architecture(self.network)
        if alpha > 0 and (self.clip is None or self.video is None):
            raise ValueError(f"alpha is {alpha}, which trains on the clip too: give a clip of at least 2 frames")
        if alpha < 1 and (self.frames is None or self.pictures is None or len(self.frames) == 0):
            raise ValueError(f"alpha is {alpha}, which trains on frames: give at least 1")
        for name in ("clip", "frames"):
            latents = getattr(self, name)
            if latents is not None and not torch.isfinite(latents).all():
                raise ValueError(f"the latents of the {name} hold NaN or infinite values")


def draw_sigma(count: int, path: NoisePath, limits: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Noise levels [count] of times s uniform in 0..1, kept inside the model's levels and off a flow's ends."""
    low, high = limits
    if path.kind == "flow":
        low, high = max(low, 1e-3), min(high, 1 - 1e-3)
    times = torch.rand(count, generator=generator, dtype=torch.float64)
    levels = [min(max(sigma_at(float(s), path), low), high) for s in times]
    return torch.tensor(levels, dtype=torch.float32)


def loss_weight(sigma: Tensor, path: NoisePath) -> Tensor:
    """SNR + 1 = (signal^2 + sigma^2) / sigma^2, of sigma's shape."""
    signal = 1 - sigma if path.kind == "flow" else torch.ones_like(sigma)
    return (signal**2 + sigma**2) / sigma**2


def denoising_loss(denoiser: Denoiser, clean: Tensor, sigmas: Tensor, path: NoisePath, noise: Tensor) -> Tensor:
    """Mean over the batch of (SNR + 1) |D(x; sigma) - x0|^2. clean, noise: [B, ...]; sigmas: [B]."""
    x = torch.stack([add_noise(x0, n, float(s), path) for x0, n, s in zip(clean, noise, sigmas)])
    sigma = sigmas.to(clean.device)
    error = (denoiser(x, sigma).float() - clean.float()) ** 2
    return (loss_weight(sigma, path) * error.flatten(1).mean(1)).mean()


class Run(training.Run):
    """One fine-tuning of adapters, step by step; they must be attached. Its file is a LoRA already."""

    format = "rewind dreamix checkpoint 1"
    curves = ("video", "frames", "total")

    def __init__(self, subject: Subject, settings: FineTuning):
        subject.check(settings.alpha)
        self.subject = subject
        generator = torch.Generator().manual_seed(settings.seed)
        self.lora = LoRA(target_layers(subject.network, settings.targets), settings.rank, generator)
        self.spatial = self.lora.spatial()
        super().__init__(list(self.lora.parameters()), settings)

    def _video_loss(self, generator: torch.Generator) -> float:
        s, clean = self.subject, self.subject.clip
        sigma = draw_sigma(1, s.path, s.sigma_range, generator)
        # SVD's frames are a batch at one noise level, a transformer's clip is one element of a batch.
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        with self.autocast:
            loss = denoising_loss(s.video, clean, sigma.expand(len(clean)), s.path, noise)
        self.backward(self.settings.alpha * loss, self.parameters)
        return float(loss.detach())

    def _frames_loss(self, generator: torch.Generator) -> float:
        s, count = self.subject, min(self.settings.pictures, len(self.subject.frames))
        chosen = torch.randperm(len(s.frames), generator=generator)[:count]
        clean = s.frames[chosen.to(s.frames.device)]
        sigmas = draw_sigma(count, s.path, s.sigma_range, generator)
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        # The way back runs under the mask too: recomputed blocks must be masked again.
        with masked(s.network, self.settings.mask):
            with self.autocast:
                loss = denoising_loss(s.pictures, clean, sigmas, s.path, noise)
            self.backward((1 - self.settings.alpha) * loss, self.spatial)
        return float(loss.detach())

    def gradients(self, generator: torch.Generator) -> dict[str, float]:
        alpha = self.settings.alpha
        video = self._video_loss(generator) if alpha > 0 else math.nan
        frames = self._frames_loss(generator) if alpha < 1 else math.nan
        total = (alpha * video if alpha > 0 else 0.0) + ((1 - alpha) * frames if alpha < 1 else 0.0)
        return {"video": video, "frames": frames, "total": total}

    def weights(self) -> State:
        return to_host(self.lora.state())

    def load(self, weights: State) -> None:
        self.lora.load({key.removeprefix("diffusion_model."): value for key, value in weights.items()})

    def identity(self) -> Iterator[str | Tensor]:
        """The data, the settings but the number of steps, and the network: its layers, and the weights of a few."""
        settings = {key: value for key, value in asdict(self.settings).items() if key not in ("steps", "checkpointing")}
        yield repr(sorted(settings.items()))
        layers = list(self.lora.layers.items())
        yield repr([(name, layer.in_features, layer.out_features) for name, layer in layers])
        samples = [layer.weight for _, layer in layers[:: max(1, len(layers) // 4)]]
        yield from (tensor for tensor in (self.subject.clip, self.subject.frames, *samples) if tensor is not None)


def fine_tune(
    subject: Subject,
    settings: FineTuning = FineTuning(),
    callback: Callable[[dict[str, Any]], None] | None = None,
    checkpoints: Path | None = None,
    every: int = 25,
) -> Tuned:
    """Train adapters; the network itself is bit for bit the same afterwards.

    callback: gets each step's dict, {"i", "video", "frames", "total"}; what it raises (a Cancel) ends the run.
    checkpoints: a folder. A run writes a file of its own there, `dreamix-<fingerprint>.safetensors`, every `every`
    steps and when it is ended early; a later run of the same data and settings goes on from it, as if nothing had
    happened, and removes it when it is done. A file of more steps than are wanted is left alone.
    Raises ValueError for bad input, or a broken file, before anything is trained.
    """
    run, checkpoint = training.begin(lambda: Run(subject, settings), checkpoints, "dreamix")
    with frozen(subject.network), run.lora, checkpointed(subject.network, settings.checkpointing):
        training.finish(run, callback, checkpoint, every)
    return Tuned(run.lora.state(), Losses(**run.losses))
