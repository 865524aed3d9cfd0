"""A fine-tuning on disk: one safetensors file with the adapters, the optimiser's state and the losses.

The adapters carry the names that ComfyUI's LoRA nodes read, so that the file of a cancelled run is a LoRA already.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .lora import to_host

if TYPE_CHECKING:
    from .finetuning import Run

FORMAT = "rewind dreamix checkpoint 1"
_LOSSES = ("video", "frames", "total")


def write_checkpoint(path: Path, run: Run) -> None:
    """Write a run's state; the file is whole at any time (written beside, then moved)."""
    from safetensors.torch import save_file

    tensors = to_host(run.lora.state())
    for index, p in enumerate(run.all):
        for name, value in run.optimizer.state.get(p, {}).items():
            tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value).detach().cpu().clone()
    for name in _LOSSES:
        tensors[f"losses.{name}"] = torch.tensor(getattr(run.losses, name), dtype=torch.float64)
    about = {"format": FORMAT, "step": str(run.step), "fingerprint": run.fingerprint()}
    about["scaler"] = json.dumps(run.scaler.state_dict())
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial, metadata=about)
    partial.replace(path)


def read_checkpoint(path: Path, run: Run) -> None:
    """Bring a fresh run to where a file's stopped. ValueError for a broken file, or one of another run."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): delete it to start anew") from error
    if about.get("format") != FORMAT or about.get("fingerprint") != run.fingerprint():
        raise ValueError(f"{path} belongs to another fine-tuning: move it away, or give another file")
    prefix = "diffusion_model."
    run.lora.load({key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)})
    for index, p in enumerate(run.all):
        start = f"optimizer.{index}."
        state = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
        if state:
            # AdamW keeps its count of steps on the CPU, the moments beside the parameter.
            run.optimizer.state[p] = {k: v if k == "step" else v.to(p) for k, v in state.items()}
    for name in _LOSSES:
        getattr(run.losses, name).extend(tensors[f"losses.{name}"].tolist())
    run.scaler.load_state_dict(json.loads(about["scaler"]))
    run.step = int(about["step"])
