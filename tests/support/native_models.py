"""A tiny random model of every native family, read from a file by the host's own loaders, as a user's would be.

The host tells most families by the names of their weights, at any size. Stable Diffusion and Stable Video Diffusion it
tells by the released sizes: for those a small class is put into the host's list first (`registered`), and the host's
detection does the rest. See tiny_models for why the last layers are scaled down.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch

Network = torch.nn.Module


def nothing(generator: torch.Generator, frames: int) -> dict[str, Any]:
    """What a CONDITIONING of text alone holds besides, for a latent of so many frames."""
    return {}


@dataclass(frozen=True)
class Family:
    """A family of models.

    title: as the README's table of models calls it. kind: the host's class of it. settings: of a small network.
    last: its network's last layer. gains: of its matrices, and of the last layer. shape: of a latent to test with.
    vae: of the small VAE, the name of the host's class and its channels. width: of the texts. extra: what else its
    CONDITIONING holds. heads: of the class that a host is given which knows the released size alone. since: the first
    host that has the family.
    """

    title: str
    kind: str
    settings: dict[str, Any]
    last: Callable[[Network], Network]
    gains: tuple[float, float]
    shape: tuple[int, ...]
    vae: tuple[str, int]
    width: int = 4096
    extra: Callable[[torch.Generator, int], dict[str, Any]] = nothing
    heads: dict[str, int] = field(default_factory=dict)
    since: tuple[int, ...] = (0,)
    scheduler: str = "simple"


UNET = {**tiny_models.SD15, "legacy": False, "use_temporal_attention": False, "use_temporal_resblock": False}
SDXL = {**UNET, "use_linear_in_transformer": True, "adm_in_channels": 2816, "num_classes": "sequential"}
COGVIDEOX = {
    "image_model": "cogvideox",
    "num_attention_heads": 1,
    "attention_head_dim": 64,
    "time_embed_dim": 64,
    "num_layers": 1,
    "in_channels": 16,
    "patch_size": 2,
    "text_embed_dim": 64,
    "use_learned_positional_embeddings": False,
    "use_rotary_positional_embeddings": True,
}


def first_frame(generator: torch.Generator, frames: int, with_clip_vision: bool = True) -> dict[str, Any]:
    """What the host's WanImageToVideo puts into a CONDITIONING: the first frame's latent, and where it holds."""
    mask = torch.ones(1, 1, frames, 8, 8)
    mask[:, :, :1] = 0
    found = {"concat_latent_image": torch.randn(1, 16, frames, 8, 8, generator=generator), "concat_mask": mask}
    if with_clip_vision:
        hidden = torch.randn(1, 5, 1280, generator=generator)
        found["clip_vision_output"] = SimpleNamespace(penultimate_hidden_states=hidden)
    return found


def _ltxv_text(generator: torch.Generator, frames: int) -> dict[str, Any]:
    return {"frame_rate": 25, "attention_mask": torch.ones(1, 12, dtype=torch.long)}


def _wan(title: str, kind: str, **changes: Any) -> Family:
    own = {"gains": (0.3, 0.05), "shape": (1, 16, 3, 8, 8), "vae": ("TAEHV", 16), "extra": nothing}
    own |= {name: changes.pop(name) for name in own if name in changes}
    return Family(title, kind, {**tiny_models.WAN, **changes}, lambda network: network.head.head, **own)


FAMILIES = {
    "svd": Family(
        "Stable Video Diffusion",
        "SVD_img2vid",
        {},  # the embedded model's
        lambda network: network.out[2],
        (0.0, 0.0),
        (5, 4, 8, 8),
        ("TAESD", 4),
        width=64,
        extra=lambda generator, _: {
            "concat_latent_image": torch.randn(1, 4, 8, 8, generator=generator),
            "fps": 7,
            "motion_bucket_id": 127,
            "augmentation_level": 0.02,
        },
        scheduler="karras",
    ),
    "sd15": Family(
        "Stable Diffusion 1.5",
        "SD15",
        UNET,
        lambda network: network.out[2],
        (0.5, 0.01),
        (2, 4, 8, 8),
        ("TAESD", 4),
        width=32,
        heads={"num_heads": 2, "num_head_channels": -1},
        scheduler="karras",
    ),
    "sdxl": Family(
        "Stable Diffusion XL",
        "SDXL",
        SDXL,
        lambda network: network.out[2],
        (0.5, 0.01),
        (2, 4, 8, 8),
        ("TAESD", 4),
        width=32,
        extra=lambda generator, _: {"pooled_output": torch.randn(1, 1280, generator=generator)},
        heads={"num_heads": -1, "num_head_channels": 16},
        scheduler="karras",
    ),
    "wan21_t2v": _wan("Wan 2.1 T2V", "WAN21_T2V"),
    "wan21_i2v": _wan("Wan 2.1 I2V", "WAN21_I2V", model_type="i2v", in_dim=36, extra=first_frame),
    "wan22_i2v": _wan("Wan 2.2 I2V 14B", "WAN21_T2V", in_dim=36, extra=partial(first_frame, with_clip_vision=False)),
    "wan22_5b": _wan(
        "Wan 2.2 TI2V 5B",
        "WAN22_T2V",
        in_dim=48,
        out_dim=48,
        gains=(0.3, 0.4),
        shape=(1, 48, 3, 8, 8),
        vae=("TAEHV", 48),
    ),
    "ltxv": Family(
        "LTXV",
        "LTXV",
        {"image_model": "ltxv", "num_layers": 2, "attention_head_dim": 8, "cross_attention_dim": 256},
        lambda network: network.proj_out,
        (0.3, 0.15),
        (1, 128, 3, 4, 4),
        ("TAEHV", 128),
        extra=_ltxv_text,
    ),
    "hunyuan": Family(
        "Hunyuan Video",
        "HunyuanVideo",
        tiny_models.HUNYUAN,
        lambda network: network.final_layer.linear,
        (0.3, 0.05),
        (1, 16, 3, 8, 8),
        ("TAEHV", 16),
        width=64,
        extra=lambda generator, _: {"pooled_output": torch.randn(1, 768, generator=generator)},
    ),
    "cogvideox": Family(
        "CogVideoX",
        "CogVideoX_T2V",
        COGVIDEOX,
        lambda network: network.proj_out,
        (0.5, 0.1),
        (1, 16, 3, 8, 8),
        ("TAEHV", 16),
        width=64,
        since=(0, 33),
    ),
}


def there(host: Any, family: str) -> bool:
    """Whether this host has the family."""
    return host.release >= FAMILIES[family].since


@contextlib.contextmanager
def registered(host: Any, family: str) -> Iterator[type]:
    """The host's class of a family; a small one of it, in the host's list meanwhile, where it knows one size alone."""
    import comfy.supported_models

    entry = FAMILIES[family]
    kind = getattr(comfy.supported_models, entry.kind)
    config = host.module("demo.models").ImageToVideoConfig()
    heads = entry.heads or {"num_heads": -1, "num_head_channels": config.head_channels, "attn_precision": torch.float32}
    if "model_channels" not in kind.unet_config:
        yield kind
        return
    small = settings_of(host, family)
    told_by = {name: small.get(name, value) for name, value in kind.unet_config.items()}
    tiny = type(f"Tiny{entry.kind}", (kind,), {"unet_config": told_by, "unet_extra_config": heads})
    comfy.supported_models.models.append(tiny)
    try:
        yield tiny
    finally:
        comfy.supported_models.models.remove(tiny)


def settings_of(host: Any, family: str) -> dict[str, Any]:
    """The settings of a family's small network."""
    if family == "svd":
        models, config = host.module("nodes.host.models"), host.module("demo.models")
        return models.unet_settings(config.ImageToVideoConfig())
    return FAMILIES[family].settings


def random_weights(host: Any, family: str) -> dict[str, torch.Tensor]:
    """Random weights of a family's small network in the host's names."""
    if family == "svd":
        return host.module("demo.keys").split_checkpoint(tiny_models.checkpoint(host))["unet"]
    entry = FAMILIES[family]
    with registered(host, family) as kind:
        settings = kind(dict(entry.settings))
    settings.set_inference_dtype(torch.float32, None)
    network = settings.get_model({}, "", device=torch.device("cpu")).diffusion_model
    tiny_models.randomise(network, 3, entry.gains[0], entry.last(network), entry.gains[1])
    return network.state_dict()


def write(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Write a model's file."""
    import safetensors.torch

    file.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, file)


def save(tensors: dict[str, torch.Tensor], folder: str, name: str) -> str:
    """Write a model's file where the host looks for it; its name there."""
    import folder_paths

    write(tensors, Path(folder_paths.get_folder_paths(folder)[0]) / name)
    folder_paths.filename_list_cache.clear()
    return name


def load(host: Any, family: str) -> Any:
    """A MODEL of a family by the host's Load Diffusion Model, from a file of random weights."""
    name = save(random_weights(host, family), "diffusion_models", f"tiny_{family}.safetensors")
    with registered(host, family):
        (model,) = host.run_node("UNETLoader", unet_name=name, weight_dtype="default")
    return model


class Models(dict):
    """The families' models, each loaded when it is first asked for; a test of one that the host lacks is skipped."""

    def __init__(self, host):
        super().__init__()
        self.host = host

    def __missing__(self, family):
        if not there(self.host, family):
            pytest.skip(f"ComfyUI {self.host.version} has no {FAMILIES[family].title}")
        self[family] = load(self.host, family)
        return self[family]


def vae_weights(family: str) -> dict[str, torch.Tensor]:
    """Random weights of the small autoencoder that stands in for a family's own."""
    import comfy.taesd.taehv
    import comfy.taesd.taesd

    kind, channels = FAMILIES[family].vae
    network = getattr(comfy.taesd.taesd if kind == "TAESD" else comfy.taesd.taehv, kind)(latent_channels=channels)
    last = (network.taesd_decoder if kind == "TAESD" else network.decoder)[-1]
    tiny_models.randomise(network, 7, 1.0, last, 0.3)
    return {name: torch.ones(()) if name == "vae_scale" else value for name, value in network.state_dict().items()}


def load_vae(host: Any, family: str) -> Any:
    """A VAE of those weights by the host's Load VAE."""
    kind, channels = FAMILIES[family].vae
    name = save(vae_weights(family), "vae", f"{kind}_{channels}.safetensors")
    (vae,) = host.run_node("VAELoader", vae_name=name)
    return vae


def conditioning(family: str, seed: int = 0, frames: int | None = None) -> list:
    """A CONDITIONING of random values as the family takes it. frames: of the latent, by default the family's."""
    frames = frames or FAMILIES[family].shape[2]
    entry, generator = FAMILIES[family], torch.Generator().manual_seed(100 + seed)
    length = 1 if family == "svd" else 12
    text = torch.randn(1, length, entry.width, generator=generator)
    return [[text, entry.extra(generator, frames)]]


def latent(family: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """A LATENT of random values with unit spread in the VAE's own space."""
    return {"samples": torch.randn(FAMILIES[family].shape, generator=torch.Generator().manual_seed(200 + seed))}


def pixels(family: str) -> tuple[int, int, int]:
    """Frames, height and width of the clip that a family's latent is of, as its own VAE has it."""
    *_, height, width = shape = FAMILIES[family].shape
    if len(shape) == 4:
        return shape[0], 8 * height, 8 * width
    times, size = {"ltxv": (8, 32), "wan22_5b": (4, 16)}.get(family, (4, 8))
    return times * (shape[2] - 1) + 1, size * height, size * width


def sigmas(model: Any, family: str, steps: int) -> torch.Tensor:
    """SIGMAS as the host's BasicScheduler gives them."""
    return tiny_models.sigmas(model, steps, FAMILIES[family].scheduler)
