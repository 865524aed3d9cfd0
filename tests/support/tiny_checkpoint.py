"""Stable Diffusion 1.5's structure at a small size, as a checkpoint's file that a server's own loader reads.

The host tells this family by the released size. The file is a pack of its own: a test copies it into a server's
custom_nodes, and the host then knows the size of `tiny_models.SD15` too, with a text encoder as narrow.
"""

from __future__ import annotations

from typing import Any

import torch

WIDTH = 32  # of tiny_models.SD15: its channels, and the text that it takes
TEXT = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_attention_heads": 2, "num_hidden_layers": 2}


def text_encoder(device: Any = "cpu", dtype: Any = None, model_options: dict[str, Any] | None = None) -> Any:
    """The host's own text encoder of Stable Diffusion 1.5 at that width, which keeps the released vocabulary."""
    from comfy.sd1_clip import SD1ClipModel

    return SD1ClipModel(device, dtype, {**(model_options or {}), "clip_l_model_config": TEXT})


def weights(host: Any) -> dict[str, torch.Tensor]:
    """Random weights of UNet, VAE and text encoder in the names of a released checkpoint."""
    import native_models
    import tiny_models

    text, unet = text_encoder(dtype=torch.float32).clip_l, native_models.random_weights(host, "sd15")
    tiny_models.randomise(text, 9, 1.0, text.transformer.text_projection, 1.0)
    unet["out.2.weight"] = 50 * unet["out.2.weight"]  # so that what it predicts shows in the result
    parts = {
        "model.diffusion_model.": unet,
        "first_stage_model.": native_models.vae_weights("sd15"),
        "cond_stage_model.": text.state_dict(),
    }
    return {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()}


def comfy_entrypoint() -> Any:
    """No nodes, but a class in the host's list of models."""
    import comfy.supported_models
    from comfy.sd1_clip import SD1Tokenizer
    from comfy.supported_models_base import ClipTarget
    from comfy_api.latest import ComfyExtension

    released = comfy.supported_models.SD15

    class TinySD15(released):
        unet_config = {**released.unet_config, "context_dim": WIDTH, "model_channels": WIDTH}
        unet_extra_config = {"num_heads": 2, "num_head_channels": -1}

        def clip_target(self, state_dict: dict[str, torch.Tensor] | None = None) -> ClipTarget:
            return ClipTarget(SD1Tokenizer, text_encoder)

    class NoNodes(ComfyExtension):
        async def get_node_list(self) -> list:
            return []

    comfy.supported_models.models.append(TinySD15)
    return NoNodes()
