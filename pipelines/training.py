"""What every fine-tuning shares: the optimiser, seeded steps, a run that can be stopped and gone on with, its file.

A method subclasses `Run`: it names its parameters, computes a step's gradients, and tells its weights as they are
saved.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from .files import read_tensors, write_tensors

State = dict[str, Tensor]
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Optimisation(Protocol):
    """The settings that a `Run` reads. clip: largest norm of the gradient; warm_up: steps in which the rate rises."""

    steps: int
    learning_rate: float
    weight_decay: float
    warm_up: int
    clip: float
    precision: str
    seed: int


def step_generator(seed: int, step: int) -> torch.Generator:
    """The randomness of one step alone, so that a resumed run draws the same as one that never stopped."""
    digest = hashlib.sha256(f"{seed} {step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class Run:
    """One fine-tuning, step by step, with AdamW. What it holds is all that a later run needs to go on.

    format: the first line of its files. curves: names of the losses that are kept; "total" is the one that is trained.
    """

    format = ""
    curves: tuple[str, ...] = ("total",)

    def __init__(self, parameters: list[Tensor], settings: Optimisation):
        self.parameters, self.settings = parameters, settings
        self.optimizer = torch.optim.AdamW(
            parameters, lr=settings.learning_rate, betas=(0.9, 0.999), weight_decay=settings.weight_decay
        )
        dtype = PRECISIONS[settings.precision]
        device = parameters[0].device.type
        self.autocast = torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None)
        self.scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
        self.losses: dict[str, list[float]] = {name: [] for name in self.curves}
        self.step = 0

    # What a method tells.

    def gradients(self, generator: torch.Generator) -> dict[str, float]:
        """Compute a step's gradients by `backward`; the values of `curves`."""
        raise NotImplementedError

    def weights(self) -> State:
        """What is trained, as it is saved, on the CPU."""
        raise NotImplementedError

    def load(self, weights: State) -> None:
        """The inverse of `weights`. ValueError for those of another network."""
        raise NotImplementedError

    def identity(self) -> Iterator[str | Tensor]:
        """What makes this run another one than others: settings, layers, data."""
        raise NotImplementedError

    # What they share.

    def backward(self, loss: Tensor, inputs: list[Tensor]) -> None:
        """Add a loss' gradients to those of `inputs` alone."""
        self.scaler.scale(loss).backward(inputs=inputs)

    def train_step(self) -> dict[str, float]:
        """One step. Raises ValueError where the loss is not finite; nothing is changed then."""
        settings = self.settings
        for p in self.parameters:
            p.grad = None
        losses = self.gradients(step_generator(settings.seed, self.step))
        if not math.isfinite(losses["total"]):
            raise ValueError(
                f"the loss is {losses['total']} at step {self.step}: lower the learning rate, or use another precision"
            )
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_([p for p in self.parameters if p.grad is not None], settings.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, (self.step + 1) / max(1, settings.warm_up))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for name, values in self.losses.items():
            values.append(losses[name])
        self.step += 1
        return {"i": self.step - 1} | losses

    def fingerprint(self) -> str:
        """What a checkpoint must have been made with to be gone on with."""
        digest = hashlib.sha256()
        for part in self.identity():
            if isinstance(part, Tensor):
                digest.update(part.detach().float().cpu().contiguous().numpy().tobytes())
            else:
                digest.update(part.encode())
        return digest.hexdigest()


def begin(make: Callable[[], Run], folder: Path | None, name: str) -> tuple[Run, Path | None]:
    """A run, brought to where an earlier one of the same data and settings stopped, and the file it keeps itself in.

    The file is `<name>-<fingerprint>.safetensors` in the folder. One of more steps than are wanted is left alone, and
    no file is kept then. Raises ValueError for a broken file.
    """
    run = make()
    if folder is None:
        return run, None
    path = folder / f"{name}-{run.fingerprint()[:16]}.safetensors"
    if path.exists():
        read_checkpoint(path, run)
        if run.step > run.settings.steps:
            return make(), None
    return run, path


def finish(
    run: Run,
    callback: Callable[[dict[str, Any]], None] | None = None,
    checkpoint: Path | None = None,
    every: int = 25,
) -> None:
    """Train a run to its number of steps; what it trains must be attached.

    callback: gets each step's dict, {"i", and the losses}; what it raises (a Cancel) ends the run. checkpoint: written
    every `every` steps and when the run is ended early, removed when it is done.
    """
    try:
        while run.step < run.settings.steps:
            step = run.train_step()
            if checkpoint is not None and run.step % every == 0 and run.step < run.settings.steps:
                write_checkpoint(checkpoint, run)
            if callback is not None:
                callback(step)
    except BaseException:
        # The host's Cancel is no Exception. What raised may have left a step half done: `step` counts whole ones.
        if checkpoint is not None and run.step > 0:
            write_checkpoint(checkpoint, run)
        raise
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)


# --- files ------------------------------------------------------------------------------------------------------------


def write_checkpoint(path: Path, run: Run) -> None:
    """Write a run's state: its weights, the optimiser's state, the losses. The file is whole at any time."""
    tensors = dict(run.weights())
    for index, p in enumerate(run.parameters):
        for name, value in run.optimizer.state.get(p, {}).items():
            tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value).detach().cpu().clone()
    for name, values in run.losses.items():
        tensors[f"losses.{name}"] = torch.tensor(values, dtype=torch.float64)
    about = {"format": run.format, "step": str(run.step), "fingerprint": run.fingerprint()}
    about["scaler"] = json.dumps(run.scaler.state_dict())
    write_tensors(path, tensors, about)


def read_checkpoint(path: Path, run: Run) -> None:
    """Bring a fresh run to where a file's stopped. ValueError for a broken file, or one of another run."""
    tensors, about = read_tensors(path, f": delete it, in {path.parent}, to start anew")
    if about.get("format") != run.format or about.get("fingerprint") != run.fingerprint():
        raise ValueError(f"{path} belongs to another fine-tuning: move it away, or give another file")
    own = ("optimizer.", "losses.")
    run.load({key: value for key, value in tensors.items() if not key.startswith(own)})
    for index, p in enumerate(run.parameters):
        start = f"optimizer.{index}."
        state = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
        if state:
            # AdamW keeps its count of steps on the CPU, the moments beside the parameter.
            run.optimizer.state[p] = {k: v if k == "step" else v.to(p) for k, v in state.items()}
    for name, values in run.losses.items():
        values.extend(tensors[f"losses.{name}"].tolist())
    run.scaler.load_state_dict(json.loads(about["scaler"]))
    run.step = int(about["step"])


# --- networks ---------------------------------------------------------------------------------------------------------


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Inside, the network's own weights need no gradients; they are as they were afterwards."""
    wanted = [p for p in network.parameters() if p.requires_grad]
    for p in wanted:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in wanted:
            p.requires_grad_(True)


def _blocks(network: nn.Module) -> list[nn.Module]:
    """The outermost transformer and residual blocks: what is recomputed as one."""
    chosen: dict[str, nn.Module] = {}
    for name, module in network.named_modules():
        block = any(
            hasattr(module, part) for part in ("attn1", "self_attn", "in_layers", "conv_shortcut", "time_mixer")
        )
        inside = any(name.startswith(outer + ".") for outer in chosen)
        if name and block and not inside:
            chosen[name] = module
    return list(chosen.values())


@contextmanager
def checkpointed(network: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Inside, blocks keep their inputs only and are computed again on the way back: less memory, a third more time.

    Dictionaries among a block's arguments are copied when it is called: the host changes what it passes from block to
    block, and a second computation must see what the first saw. Only for networks that are the caller's own.
    """
    blocks = _blocks(network) if enabled else []

    def recomputed(forward):
        def call(*args, **kwargs):
            args = tuple(dict(a) if type(a) is dict else a for a in args)
            kwargs = {key: dict(a) if type(a) is dict else a for key, a in kwargs.items()}
            return torch.utils.checkpoint.checkpoint(
                forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
            )

        return call

    for block in blocks:
        block.forward = recomputed(block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
