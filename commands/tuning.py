"""What the commands that tune a model share: where it runs, bars on stderr, and Ctrl-C that tells what was kept."""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

Callback = Callable[[dict[str, Any]], None]


def hardware() -> tuple[torch.dtype, str]:
    """Precision and device of a model: gradients pass it, for which bfloat16 has the range that float16 lacks."""
    return (torch.bfloat16, "cuda") if torch.cuda.is_available() else (torch.float32, "cpu")


def phase_of(step: dict[str, Any]) -> str:
    """Which loop told a step: only a fine-tuning has a loss, only an inversion rises from a lower level."""
    if "total" in step:
        return "fine-tuning"
    return "inversion" if "sigma_low" in step else "sampling"


class Progress:
    """Bars on stderr: one of the fine-tuning, one of each pass of the others. Called with what the loops tell.

    totals: the steps of each phase (`phase_of`), of its passes in turn.
    """

    def __init__(self, totals: dict[str, list[int]]):
        self.totals, self.bar, self.tuned = totals, None, 0

    def __call__(self, step: dict[str, Any]) -> None:
        phase = phase_of(step)
        if self.bar is None or (phase != "fine-tuning" and step["i"] == 0):
            self.close()
            # A fine-tuning that goes on from a checkpoint does not begin at 0.
            total = self.totals[phase].pop(0)
            self.bar = tqdm(desc=phase, total=total, initial=step["i"], file=sys.stderr)
        if phase == "fine-tuning":
            self.tuned = step["i"] + 1
            losses = {name: value for name, value in step.items() if name not in ("i", "total")}
            losses = {name: f"{value:.3f}" for name, value in losses.items() if not math.isnan(value)}
            self.bar.set_postfix(losses or {"loss": f"{step['total']:.3f}"}, refresh=False)
        self.bar.update()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


@contextmanager
def whole_steps(callback: Callback) -> Iterator[Callback]:
    """Inside, Ctrl-C ends a fine-tuning with the step that it falls in, so that a later run goes on exactly.

    Pressed again, it ends it at once.
    """
    pressed = False

    def press(*_: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    def after(step: dict[str, Any]) -> None:
        callback(step)
        if pressed:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, press)
    try:
        yield after
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def told_tuning(progress: Progress, steps: int, checkpoints: Path | None) -> Iterator[None]:
    """Inside is a fine-tuning of so many steps; KeyboardInterrupt then tells how far it came, and what was kept."""
    try:
        yield
    except KeyboardInterrupt as stop:
        told = f"stopped after {progress.tuned} of {steps} steps of fine-tuning"
        if not progress.tuned:
            told = "stopped before the first step of fine-tuning"
        if checkpoints is None:
            told += "; nothing is kept, with --checkpoints FOLDER it would be"
        else:
            told += f"; the same command goes on from what {checkpoints} holds"
        raise KeyboardInterrupt(told) from stop
    finally:
        progress.close()


@contextmanager
def told_sampling(progress: Progress, tuned: bool, saved: bool, option: str) -> Iterator[None]:
    """Inside is an edit; KeyboardInterrupt then tells what became of the fine-tuning before it.

    option: "lora", say, where --save-lora keeps a fine-tuning and --lora takes its place.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        told = "stopped while sampling; no clip is written"
        if tuned and not saved:
            told += f" and the fine-tuning is lost, --save-{option} FILE keeps it"
        elif tuned:
            told += f", but the fine-tuning is: --{option} with its file takes its place"
        raise KeyboardInterrupt(told) from stop
    finally:
        progress.close()
