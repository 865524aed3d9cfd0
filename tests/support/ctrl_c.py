"""Ctrl-C in the middle of a command's work."""

from __future__ import annotations

import signal
from typing import Any

import pytest


def interrupt_at(pipeline: Any, monkeypatch: pytest.MonkeyPatch, call: int | None) -> None:
    """Press Ctrl-C in the middle of the network's call of that number; None for never again."""
    family, calls = pipeline.family, []
    denoise = type(family).denoise

    def pressed(*args, **options):
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return denoise(family, *args, **options)

    monkeypatch.setattr(family, "denoise", pressed)
