"""Dreamix Mixed Fine-Tune on tiny models of the host that can be copied, with all that the node takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

NODE = "RewindDreamixFineTune"
STEPS, SIZE = 3, 32
QUICK = {"steps": STEPS, "rank": 2, "learning_rate": 0.01, "memory_check": False}


class Setting:
    """What the node gets for a family: a MODEL, a VAE, a token, a clip."""

    def __init__(self, model: Any, vae: Any, token: list, frames: int):
        self.model, self.vae, self.token = model, vae, token
        self.images = torch.rand(frames, SIZE, SIZE, 3, generator=torch.Generator().manual_seed(4))

    def tune(self, host: Any, **values: Any) -> tuple:
        """The node's outputs, in few small steps; values replace its inputs."""
        given = {"model": self.model, "vae": self.vae, "images": self.images, "token": self.token, **QUICK, **values}
        return host.run_node(NODE, **given)


def skip_old(host: Any) -> None:
    """Hosts that cannot copy a model refuse to train, which has a test of its own."""
    if host.release < (0, 33):
        pytest.skip(f"ComfyUI {host.version} cannot copy a model")


def svd(host: Any, folder: Path) -> Setting:
    """The embedded text-to-video network with random weights, written into a folder and loaded from there."""
    skip_old(host)
    file = tiny_models.save_weights(tiny_models.text_checkpoint(host, seed=2), folder / "text.safetensors")
    config, keys = host.module("demo.models").ImageToVideoConfig(), host.module("demo.keys")
    models = host.module("nodes.host.models")
    vae = models.build_vae(keys.split_checkpoint(tiny_models.checkpoint(host))["vae"], config)
    token = [[torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(5)), {}]]
    return Setting(models.load_demo_unet(file, config, by_text=True), vae, token, 3)


def wan(host: Any) -> Setting:
    """Wan's class through the host's own loader, which is how a user's MODEL comes."""
    skip_old(host)
    import folder_paths
    import safetensors.torch

    network = tiny_models.wan(host).model.diffusion_model.state_dict()
    file = Path(folder_paths.get_folder_paths("diffusion_models")[-1]) / "tiny_wan.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    about = {"config": json.dumps({"transformer": {"text_dim": 64}})}
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in network.items()}, file, metadata=about)
    (model,) = host.run_node("UNETLoader", unet_name=file.name, weight_dtype="default")
    return Setting(model, tiny_models.wan_vae(), tiny_models.conditioning("wan"), 5)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether weights are the same, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
