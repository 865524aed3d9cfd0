"""Nodes in the place of CLIPLoader and CLIPVisionLoader, for a server that runs a graph of Wan on tiny models.

The host tells text encoders and image encoders by the released sizes, of a gigabyte and more. These have the widths
that Wan asks for and random weights. The file is a pack of its own: a test copies it into a server's custom_nodes.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 1280,
    "intermediate_size": 64,
    "projection_dim": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 112,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
}


class Texts:
    """A CLIP whose texts are random vectors of their own, 12 tokens of width 4096."""

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str) -> list:
        generator = torch.Generator().manual_seed(int.from_bytes(tokens.encode()[:6], "big"))
        return [[torch.randn(1, 12, 4096, generator=generator), {"pooled_output": None}]]


class TinyTextEncoder:
    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "load", ("CLIP",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {}}

    def load(self) -> tuple[Texts]:
        return (Texts(),)


class TinyImageEncoder:
    """A CLIP_VISION of the host's own class."""

    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "load", ("CLIP_VISION",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {}}

    def load(self) -> tuple[Any]:
        import comfy.clip_vision

        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "clip_vision.json"
            file.write_text(json.dumps(VISION), encoding="utf-8")
            encoder = comfy.clip_vision.ClipVisionModel(str(file))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in encoder.model.named_parameters():
                values = torch.randn(parameter.shape, generator=generator) / max(parameter.shape[-1], 1) ** 0.5
                parameter.copy_(values if parameter.ndim > 1 else torch.full_like(parameter, name.endswith("weight")))
        return (encoder,)


NODE_CLASS_MAPPINGS = {"TinyTextEncoder": TinyTextEncoder, "TinyImageEncoder": TinyImageEncoder}
