"""EI² on tiny text-to-image models of the host's own classes: what its nodes' tests share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tiny_models
import torch
from torch import Tensor

PATCH, TUNE, PROBE = "RewindEI2TemporalPatch", "RewindEI2OneShotTune", "RewindCovariateShiftProbe"
STEPS, FRAMES, SIZE = 3, 3, 32
QUICK = {"steps": STEPS, "learning_rate": 0.01, "memory_check": False}
SIGMA, CFG = 1.5, 2.0

SD15 = {**tiny_models.SD15, "legacy": False, "use_temporal_attention": False, "use_temporal_resblock": False}
SD2 = {**SD15, "use_linear_in_transformer": True, "context_dim": 48}
SDXL = {
    **SD2,
    "num_res_blocks": [1, 1, 1],
    "channel_mult": [1, 2, 2],
    "transformer_depth": [0, 2, 3],
    "transformer_depth_output": [0, 0, 2, 2, 3, 3],
    "transformer_depth_middle": 3,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
}


def _unet(structure: str, settings: dict[str, Any], extra: dict[str, Any]) -> Any:
    """A MODEL of one of the host's classes of text-to-image models, with random weights."""
    import comfy.supported_models

    base = getattr(comfy.supported_models, structure)
    tiny = type(f"Tiny{structure}", (base,), {"unet_extra_config": extra})

    def build(disable_dynamic: bool = False) -> Any:
        made = tiny_models._randomised(tiny(dict(settings)), 1, 0.7, lambda network: network.out[2], 0.5)
        made.cached_patcher_init = (build, ())  # by which newer hosts copy it
        return made

    return build()


def sd15() -> Any:
    """Stable Diffusion 1.x: two heads at every width, convolutions around its transformers."""
    return _unet("SD15", SD15, {"num_heads": 2, "num_head_channels": -1})


def sd2() -> Any:
    """Stable Diffusion 2.x: heads of one width, linear layers around its transformers."""
    return _unet("SD20", SD2, {"num_heads": -1, "num_head_channels": 16, "attn_precision": torch.float32})


def sdxl() -> Any:
    """SDXL: no attention at its first level, several transformers a block, a vector beside the text."""
    return _unet("SDXL", SDXL, {"num_heads": -1, "num_head_channels": 16})


FAMILIES = {"sd15": sd15, "sd2": sd2, "sdxl": sdxl}


def width(model: Any) -> int:
    """Of the text that a MODEL takes."""
    return model.model.model_config.unet_config["context_dim"]


def prompt(model: Any, seed: int = 0) -> list:
    """A CONDITIONING of random values for a MODEL."""
    generator = torch.Generator().manual_seed(300 + seed)
    embedding = torch.randn(1, 7, width(model), generator=generator)
    return [[embedding, {"pooled_output": torch.randn(1, 1280, generator=generator)}]]


def noisy(frames: int = FRAMES, height: int = 8, width: int = 8, seed: int = 0) -> Tensor:
    """A noisy clip [T, 4, h, w] in model space."""
    return 1.8 * torch.randn(frames, 4, height, width, generator=torch.Generator().manual_seed(400 + seed))


def denoised(
    host: Any,
    model: Any,
    x: Tensor,
    positive: list | None = None,
    negative: list | None = None,
    sigma: float = SIGMA,
) -> Tensor:
    """The denoised estimate of x in model space, by core nodes; with a negative side guided by CFG."""
    positive = prompt(model) if positive is None else positive
    if negative is None:
        (guider,) = host.run_node("BasicGuider", model=model, conditioning=positive)
    else:
        (guider,) = host.run_node("CFGGuider", model=model, positive=positive, negative=negative, cfg=CFG)
    (euler,) = host.run_node("KSamplerSelect", sampler_name="euler")
    result, _ = host.run_node(
        "SamplerCustomAdvanced",
        noise=SimpleNamespace(seed=0, generate_noise=lambda latent: x / sigma),
        guider=guider,
        sampler=euler,
        sigmas=torch.tensor([sigma, 0.0]),
        latent_image={"samples": torch.zeros_like(x)},
    )
    return model.model.process_latent_in(result["samples"])


def patch(host: Any, model: Any, **values: Any) -> Any:
    """The MODEL of EI² Temporal Patch."""
    return host.run_node(PATCH, model=model, **values)[0]


def state(model: Any) -> dict[str, Tensor]:
    """A copy of a MODEL's weights."""
    return {name: tensor.clone() for name, tensor in model.model.state_dict().items()}


def random_weights(host: Any, model: Any, seed: int = 0, scale: float = 1.0, **settings: Any) -> Any:
    """EI2Weights as a long tuning might leave them: temporal modules that do something, queries that changed.

    scale: of the temporal modules' output; 0 gives that of a tuning's start.
    """
    inflation, weights = host.module("pipelines.ei2.inflation"), host.module("pipelines.ei2.weights")
    tuning = host.module("pipelines.ei2.tuning")
    network, chosen = model.model.diffusion_model, inflation.InflationSettings(**settings)
    generator = torch.Generator().manual_seed(500 + seed)
    tensors = {}
    for name, module in inflation.fresh_temporal(network, chosen, seed).items():
        for key, tensor in module.folded().items():
            if key.startswith("to_out"):
                tensor = scale * torch.randn(tensor.shape, generator=generator) / tensor.shape[-1] ** 0.5
            tensors[f"{name}.temporal.{key}"] = tensor
    for name, layer in tuning.query_layers(network).items():
        tensors[f"{name}.diff"] = torch.randn(layer.weight.shape, generator=generator) / layer.in_features**0.5
    return weights.EI2Weights(tensors, chosen, inflation.architecture(network), "a clip", {"steps": 0})


def modules_alone(weights: Any) -> Any:
    """EI2Weights with the queries as they were."""
    tensors = {key: torch.zeros_like(t) if key.endswith(".diff") else t for key, t in weights.tensors.items()}
    return replace(weights, tensors=tensors)


# --- what is tuned ----------------------------------------------------------------------------------------------------


@dataclass
class Setting:
    """What EI² One-Shot Tune gets: a MODEL that can be copied, a VAE, a clip and its caption."""

    model: Any
    vae: Any
    images: Tensor
    caption: list
    file: Path | None = None

    def tune(self, host: Any, **values: Any) -> tuple:
        """The node's outputs (MODEL, weights, loss plot) in few large steps; values replace its inputs."""
        given = {"model": self.model, "vae": self.vae, "images": self.images, "caption": self.caption}
        return host.run_node(TUNE, **{**given, **QUICK, **values})


def _setting(host: Any, model: Any, file: Path | None = None) -> Setting:
    """A MODEL with the embedded VAE, of random weights too."""
    keys, config = host.module("demo.keys"), host.module("demo.models").ImageToVideoConfig()
    weights = keys.split_checkpoint(tiny_models.checkpoint(host))["vae"]
    vae = host.module("nodes.host.models").build_vae(weights, config)
    images = torch.rand(FRAMES, SIZE, SIZE, 3, generator=torch.Generator().manual_seed(4))
    return Setting(model, vae, images, prompt(model), file)


def small(host: Any) -> Setting:
    """On the smallest MODEL."""
    return _setting(host, sd15())


def demo(host: Any, folder: Path) -> Setting:
    """On the embedded text-to-image network with random weights, written into a folder and loaded from there."""
    weights = tiny_models.image_checkpoint(host, seed=3)
    for name in ("weight", "bias"):  # the checkpoint's last layer is scaled down, so that it could hardly learn
        weights[f"model.diffusion_model.out.2.{name}"] *= 5
    file = tiny_models.save_weights(weights, folder / "image.safetensors")
    config = host.module("demo.text_to_image").TextToImageConfig()
    return _setting(host, host.module("nodes.host.models").load_demo_image_unet(file, config), file)
