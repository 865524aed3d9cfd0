"""How the embedded models are trained: workers whose gradients are averaged, checkpoints, noise levels.

Everything here is the same for every model; `train.py` has the command and the image-to-video model, `train_text.py`
the text models.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

log = logging.getLogger(__name__)

OBJECT_WEIGHT = 4.0  # extra weight of the loss on the moving object
DRIFT_WEIGHT = 0.3  # of the loss on the drift, for a model that must learn from words where things move


def average_gradients(parameters: list[Tensor]) -> None:
    """The mean over all workers, in one message."""
    if dist.is_initialized():
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for grad, piece in zip(grads, flat.split([g.numel() for g in grads])):
            grad.copy_(piece.view_as(grad))


class Trainer:
    """AdamW with warm-up and cosine decay, gradient clipping, an average of the weights, resumable."""

    def __init__(
        self,
        modules: dict[str, torch.nn.Module],
        path: Path,
        lr: float,
        minutes: float,
        rank: int = 0,
        average: float = 0.999,
        steps: int | None = None,
    ):
        self.modules, self.path, self.lr, self.rank, self.average, self.steps = modules, path, lr, rank, average, steps
        self.parameters = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
        fused = self.parameters[0].device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, betas=(0.9, 0.99), weight_decay=1e-3, fused=fused)
        self.step, self.spent, self.history = 0, 0.0, []
        self.begun = 0  # the step at which the optimizer began
        if path.exists():
            state = torch.load(path, map_location=self.parameters[0].device)
            for name, module in modules.items():
                module.load_state_dict(state["raw"][name])
            if "optimizer" in state:
                self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.spent, self.history = state["step"], state["spent"], state["history"]
            self.begun = state.get("begun", 0) if "optimizer" in state else self.step
            self.ema = state["ema"]
        else:
            self.ema = {name: {k: v.clone() for k, v in m.state_dict().items()} for name, m in modules.items()}
        self.budget = self.spent + 60 * minutes
        self.started, self.saved, self.mean = time.time() - self.spent, time.time(), None

    def progress(self) -> float:
        """The share of the budget (steps, else wall-clock time) that is spent, 0..1, the same on every worker."""
        if self.steps is not None:
            return self.step / self.steps
        share = torch.tensor([(time.time() - self.started) / self.budget], dtype=torch.float64)
        if dist.is_initialized():
            dist.broadcast(share, 0)
        return float(share)

    def update(self, loss: Tensor, share: float) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(self.parameters)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        warm = min(1.0, (self.step - self.begun + 1) / 100)
        lr = self.lr * warm * (0.5 + 0.5 * math.cos(math.pi * min(share, 1.0)) + 0.01)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.step += 1
        value = loss.item()
        self.mean = value if self.mean is None else 0.98 * self.mean + 0.02 * value
        if self.rank == 0:
            keep = min(self.average, self.step / (self.step + 20))
            for name, module in self.modules.items():
                for key, now in module.state_dict().items():
                    self.ema[name][key].lerp_(now, 1 - keep) if now.is_floating_point() else None
            if self.step % 25 == 0:
                seconds = time.time() - self.started
                self.history.append((self.step, seconds, self.mean))
                log.info("step %d  %.0f s  lr %.1e  loss %.4f", self.step, seconds, lr, self.mean)
            if time.time() - self.saved > 240:
                self.save()

    def save(self) -> None:
        if self.rank:
            return
        self.saved = time.time()
        raw = {name: module.state_dict() for name, module in self.modules.items()}
        spent = time.time() - self.started
        state = {"raw": raw, "ema": self.ema, "optimizer": self.optimizer.state_dict(), "step": self.step}
        partial = self.path.with_suffix(".partial")
        torch.save(state | {"spent": spent, "history": self.history, "begun": self.begun}, partial)
        partial.replace(self.path)


def seeded(args, rank: int, step: int) -> torch.Generator:
    """Every worker, and every resumption, draws other clips and other noise; equal arguments draw the same again."""
    seed = 1_000_000 * args.seed + 10 * step + rank
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def draw_sigmas(n: int, generator: torch.Generator, mean: float, std: float, wide: float) -> Tensor:
    """Noise levels [n], stratified over the batch: ln sigma normal, but for a share `wide` that is uniform over the
    whole of SVD's range, since samplers start at 700."""
    quantile = (torch.arange(n) + torch.rand(n, generator=generator)) / n
    narrow = mean + std * math.sqrt(2) * torch.erfinv(2 * quantile.clamp(1e-4, 1 - 1e-4) - 1)
    uniform = math.log(0.002) + (math.log(700) - math.log(0.002)) * quantile
    return torch.where(torch.rand(n, generator=generator) < wide, uniform, narrow).exp()


def drift(clips: Tensor) -> Tensor:
    """How the first moments of clips [n, T, C, h, w] move along x and y, [n, C, 2]: unit ramps in time and space.

    What stands still has none; a thing that moves right has one along x of its contrast, size and speed.
    """

    def ramp(count: int) -> Tensor:
        centred = torch.arange(count, dtype=clips.dtype, device=clips.device) - (count - 1) / 2
        return centred / centred.norm()

    height, width = clips.shape[-2:]
    change = torch.einsum("t,ntchw->nchw", ramp(clips.shape[1]), clips)
    along_x = (change @ ramp(width)).sum(-1) / height**0.5
    along_y = (change.mT @ ramp(height)).sum(-1) / width**0.5
    return torch.stack([along_x, along_y], -1)


def edm_loss(
    network: Callable[[Tensor, Tensor], Tensor],
    clean: Tensor,
    sigma: Tensor,
    mask: Tensor,
    generator: torch.Generator,
    drift_weight: float = 0.0,
) -> Tensor:
    """EDM's loss on the network's output, |F - F_target|^2 (arXiv 2206.00364, equation 8), the object counts more.

    network: (c_in x, sigma) -> F. clean: latents [n, T, 4, h, w] in model space; sigma: [n]; mask: [n, T, h, w], 0..1.
    drift_weight: of the squared error of the drift besides. The drift is linear in F, so the best F is the same; but of
    all that the loss sees under much noise, the direction is else a thousandth part.
    """
    s = sigma[:, None, None, None, None]
    x = clean + s * torch.randn(clean.shape, generator=generator).to(clean)
    c_skip, c_out, c_in = 1 / (s**2 + 1), -s / torch.sqrt(s**2 + 1), 1 / torch.sqrt(s**2 + 1)
    weight = 1 + OBJECT_WEIGHT * mask[:, :, None]
    target = (clean - c_skip * x) / c_out
    error = network(c_in * x, sigma) - target
    loss = (weight * error**2).mean() / weight.mean()
    return loss + drift_weight * drift(error).pow(2).mean() if drift_weight else loss


def load_cache(folder: Path) -> dict[str, Tensor]:
    """The training clips of every file in a folder, as `train.py cache` and `train.py captioned` leave them."""
    parts = [torch.load(path) for path in sorted(folder.glob("*.pt"))]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
