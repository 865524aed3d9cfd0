"""What a run through the server left."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING
from urllib.parse import urlencode

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

if TYPE_CHECKING:
    from comfy_host import Server


def node_of(prompt: dict, kind: str, title: str | None = None) -> str:
    """The number of the one node of a type, and of a title if that is given, in a prompt in API form."""
    (found,) = [
        number
        for number, node in prompt.items()
        if node["class_type"] == kind and title in (None, node["_meta"]["title"])
    ]
    return found


def frames(server: Server, history: dict, node: str) -> torch.Tensor:
    """The pictures that a PreviewImage node showed, [T, H, W, 3] in 0..1."""
    pictures = []
    for entry in history["outputs"][node]["images"]:
        data = server.get_bytes("/view?" + urlencode({key: entry[key] for key in ("filename", "subfolder", "type")}))
        pictures.append(np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.float32) / 255)
    return torch.from_numpy(np.stack(pictures))


def saved_latent(server: Server, history: dict, node: str) -> torch.Tensor:
    """What a SaveLatent node wrote."""
    (entry,) = history["outputs"][node]["latents"]
    folder = server.base / "output" / entry["subfolder"]
    return load_file(folder / entry["filename"])["latent_tensor"]
