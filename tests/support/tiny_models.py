"""Tiny models of the host's own classes with random weights, for tests in the host's process.

Every network's last layer is scaled down: a network whose output changes less than its input is one on which the
inversion's fixed point exists and is found, so that what is left over is an error of the code and not of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

SHAPES = {  # of the latents to test with
    "svd": (5, 4, 8, 8),
    "sd15": (2, 4, 8, 8),
    "wan": (1, 16, 3, 8, 8),
    "ltxv": (1, 128, 3, 4, 4),
    "hunyuan": (1, 16, 3, 8, 8),
}


def randomise(module: torch.nn.Module, seed: int, gain: float, last: torch.nn.Module, last_gain: float) -> None:
    """Fill a network with seeded weights: matrices of the given gain, norms 1, biases 0, the last layer apart."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.ndim >= 2:
            values = torch.randn(parameter.shape, generator=generator) * gain / parameter[0].numel() ** 0.5
        else:
            values = torch.full(parameter.shape, 1.0 if name.endswith("weight") else 0.0)
        parameter.data = values
    last.weight.data *= last_gain / gain


def _patcher(model: Any) -> Any:
    import comfy.model_management as management
    import comfy.model_patcher

    return comfy.model_patcher.ModelPatcher(
        model, load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
    )


def _randomised(settings: Any, seed: int, gain: float, last: Callable[[Any], torch.nn.Module], last_gain: float) -> Any:
    """A MODEL of a host's configuration with random weights; `last` picks its network's last layer."""
    settings.set_inference_dtype(torch.float32, None)
    model = settings.get_model({}, "", device=torch.device("cpu"))
    randomise(model.diffusion_model, seed, gain, last(model.diffusion_model), last_gain)
    return _patcher(model)


def checkpoint(host: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights of the embedded model in its checkpoint's layout, of diffusers' classes."""
    models, keys = host.module("demo.models"), host.module("demo.keys")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts = {
            "unet": models.build_unet().state_dict(),
            "vae": models.build_vae().state_dict(),
            "image_encoder": models.build_image_encoder().state_dict(),
        }
    for name in ("conv_out.weight", "conv_out.bias"):
        parts["unet"][name] = parts["unet"][name] * 0.15
    return {name: tensor.half().float() for name, tensor in keys.to_checkpoint(parts).items()}


def text_checkpoint(host: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights of the embedded text-to-video model in its checkpoint's layout, of diffusers' classes."""
    models, text, keys = host.module("demo.models"), host.module("demo.text"), host.module("demo.keys")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts = {"unet": models.build_unet().state_dict(), "text_encoder": text.build_text_encoder().state_dict()}
    for name in ("conv_out.weight", "conv_out.bias"):
        parts["unet"][name] = parts["unet"][name] * 0.15
    return {name: tensor.half().float() for name, tensor in keys.text_to_checkpoint(parts).items()}


def image_checkpoint(host: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights of the embedded text-to-image UNet in its checkpoint's layout, of diffusers' class."""
    text_to_image, keys = host.module("demo.text_to_image"), host.module("demo.keys")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = text_to_image.build_image_unet().state_dict()
    for name in ("conv_out.weight", "conv_out.bias"):
        unet[name] = unet[name] * 0.15
    return {name: tensor.half().float() for name, tensor in keys.image_to_checkpoint(unet).items()}


def save_weights(weights: dict[str, torch.Tensor], file: Path) -> Path:
    """Write weights as they are shipped, in half precision; the file."""
    import safetensors.torch

    safetensors.torch.save_file({name: tensor.half().contiguous() for name, tensor in weights.items()}, file)
    return file


WEIGHTS = {"rewind_demo_svd": checkpoint, "rewind_demo_t2v": text_checkpoint, "rewind_demo_t2i": image_checkpoint}
VIDEO = ("rewind_demo_svd", "rewind_demo_t2v")


def ensure_weights(host: Any, pack: Path, asked: tuple[str, ...] = VIDEO) -> bool:
    """Put random weights where the pack looks for trained ones, where those are missing; whether the asked are real."""
    files = {name: pack / "demo" / f"{name}.safetensors" for name in WEIGHTS}
    for name, file in files.items():
        if not file.exists():
            save_weights(WEIGHTS[name](host), file).with_suffix(".random").touch()
    return not any(files[name].with_suffix(".random").exists() for name in asked)


def model_file(host: Any, name: str, which: str, folders: pytest.TempPathFactory) -> Path:
    """A model's file: "random" weights as they would be shipped, or what is "stored"; skips where that is missing."""
    if which == "random":
        return save_weights(WEIGHTS[name](host, seed=5), folders.mktemp("weights") / f"{name}.safetensors")
    stored = host.pack / "demo" / f"{name}.safetensors"
    if not stored.is_file() or stored.with_suffix(".random").is_file():
        pytest.skip(f"the weights of {name} are not there")
    return stored


def svd(host: Any) -> Any:
    """A MODEL of the host's SVD class."""
    models, keys, config = host.module("nodes.host.models"), host.module("demo.keys"), host.module("demo.models")
    weights = keys.split_checkpoint(checkpoint(host))["unet"]
    return models.build_model(weights, config.ImageToVideoConfig())


SD15 = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "use_linear_in_transformer": False,
    "context_dim": 32,
    "adm_in_channels": None,
    "use_spatial_transformer": True,
    "dtype": torch.float32,
}


def sd15(host: Any) -> Any:
    """A MODEL of the host's Stable Diffusion 1.5 class (EPS, discrete levels)."""
    import comfy.supported_models

    class TinySD15(comfy.supported_models.SD15):
        unet_extra_config = {"num_heads": 2, "num_head_channels": -1}

    settings = TinySD15({**SD15, "legacy": False, "use_temporal_attention": False, "use_temporal_resblock": False})
    return _randomised(settings, 1, 0.5, lambda network: network.out[2], 0.01)


def controlnet(host: Any) -> Any:
    """A CONTROL_NET of the host's own class for the tiny Stable Diffusion, with random weights."""
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.model_management as management

    network = comfy.cldm.cldm.ControlNet(**SD15, num_heads=2, hint_channels=3, legacy=False)
    randomise(network, 5, 0.5, network.middle_block_out[0], 0.5)
    return comfy.controlnet.ControlNet(network, load_device=management.get_torch_device())


WAN = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "dim": 128,
    "ffn_dim": 128,
    "num_layers": 2,
    "num_heads": 1,
    "in_dim": 16,
    "out_dim": 16,
    "patch_size": (1, 2, 2),
    "freq_dim": 256,
    "window_size": (-1, -1),
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
}


def wan(host: Any) -> Any:
    """A MODEL of the host's Wan 2.1 class (rectified flow, 5-D latents)."""
    import comfy.supported_models

    settings = comfy.supported_models.WAN21_T2V({**WAN, "text_dim": 64})
    return _randomised(settings, 3, 0.3, lambda network: network.head.head, 0.05)


def wan_vae_weights() -> dict[str, torch.Tensor]:
    """Random weights of the host's Wan 2.1 VAE: 4 n + 1 frames into n + 1 latents of 16 channels."""
    import comfy.ldm.wan.vae

    widths = {"dim": 8, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": [], "dropout": 0.0}
    network = comfy.ldm.wan.vae.WanVAE(**widths, temperal_downsample=[False, True, True])
    randomise(network, 7, 1.0, network.conv2, 1.0)
    return network.state_dict()


def wan_vae() -> Any:
    """A VAE of those weights."""
    import comfy.sd

    return comfy.sd.VAE(sd=wan_vae_weights())


def ltxv(host: Any) -> Any:
    """A MODEL of the host's LTXV class (rectified flow, 5-D latents of 128 channels)."""
    import comfy.supported_models

    settings = comfy.supported_models.LTXV(
        {
            "image_model": "ltxv",
            "num_layers": 2,
            "num_attention_heads": 4,
            "attention_head_dim": 32,
            "cross_attention_dim": 128,
            "caption_channels": 64,
        }
    )
    return _randomised(settings, 4, 0.3, lambda network: network.proj_out, 0.15)


HUNYUAN = {
    "image_model": "hunyuan_video",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "vec_in_dim": 768,
    "axes_dim": [16, 56, 56],
    "context_in_dim": 64,
    "hidden_size": 128,
    "mlp_ratio": 4.0,
    "num_heads": 1,
    "depth": 1,
    "depth_single_blocks": 1,
    "theta": 256,
    "qkv_bias": True,
    "guidance_embed": False,
    "byt5": False,
    "meanflow": False,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
    "meanflow_sum": False,
}


def hunyuan(host: Any) -> Any:
    """A MODEL of the host's HunyuanVideo class (rectified flow, 5-D latents, text joined to the picture's tokens)."""
    import comfy.supported_models

    settings = comfy.supported_models.HunyuanVideo(HUNYUAN)
    return _randomised(settings, 6, 0.3, lambda network: network.final_layer.linear, 0.05)


def conditioning(family: str, seed: int = 0) -> list:
    """A CONDITIONING of random values that the family's tiny model takes."""
    generator = torch.Generator().manual_seed(100 + seed)
    if family == "svd":
        image = torch.randn(1, 4, 8, 8, generator=generator)
        extra = {"concat_latent_image": image, "fps": 7, "motion_bucket_id": 127, "augmentation_level": 0.02}
        return [[torch.randn(1, 1, 64, generator=generator), extra]]
    width = {"sd15": 32, "wan": 64, "ltxv": 64, "hunyuan": 64}[family]
    extra = {
        "ltxv": {"frame_rate": 25, "attention_mask": torch.ones(1, 12, dtype=torch.long)},
        "hunyuan": {"pooled_output": torch.zeros(1, 768)},
    }
    return [[torch.randn(1, 12, width, generator=generator), extra.get(family, {})]]


def latent(family: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """A LATENT of random values with unit spread in the VAE's own space."""
    return {"samples": torch.randn(SHAPES[family], generator=torch.Generator().manual_seed(200 + seed))}


def sigmas(model: Any, steps: int, scheduler: str) -> torch.Tensor:
    """SIGMAS as the host's BasicScheduler gives them."""
    import comfy.samplers

    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps).cpu()


def counted(model, on_call=lambda number: None):
    """A clone whose network calls are counted; `on_call` gets the number of each."""
    clone, calls = model.clone(), []

    def count(apply_model, args):
        calls.append(args["input"].shape)
        on_call(len(calls))
        return apply_model(args["input"], args["timestep"], **args["c"])

    clone.set_model_unet_function_wrapper(count)
    return clone, calls
