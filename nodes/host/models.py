"""The embedded models in the host's own classes.

The host tells models apart by the sizes of the released ones, so the tiny models are built here by hand: their UNets
from a configuration of the host's SVD or SD 1.5 class, their VAE from the host's encoder and temporal decoder, the
image encoder from the host's CLIP vision class, the text encoder from its CLIP of Stable Diffusion. All in float32,
whatever the device: the models are tiny, and their answers are known ones.
"""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.clip_vision
import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.utils
import torch
import torch.nn.functional as F
from comfy.ldm.models.autoencoder import AutoencoderKL, AutoencodingEngine
from torch import Tensor

from ...demo.keys import split_checkpoint
from ...demo.models import IMAGE_WEIGHTS, PICTURE_MEAN, PICTURE_STD, TEXT_WEIGHTS, WEIGHTS, ImageToVideoConfig
from ...demo.text import TOKENIZER, TextConfig
from ...demo.text_to_image import TextToImageConfig

Weights = dict[str, Tensor]


def load_demo_models(path: Path = WEIGHTS, config: ImageToVideoConfig = ImageToVideoConfig()) -> tuple[Any, Any, Any]:
    """The embedded model as (MODEL, CLIP_VISION, VAE); FileNotFoundError where the weights are missing."""
    parts = _read(path)
    vae, image_encoder = build_vae(parts["vae"], config), build_clip_vision(parts["image_encoder"], config)
    return load_demo_unet(path, config), image_encoder, vae


def load_demo_text_models(path: Path = TEXT_WEIGHTS, vae_path: Path = WEIGHTS) -> tuple[Any, Any, Any]:
    """The embedded text-to-video model as (MODEL, CLIP, VAE); FileNotFoundError where weights are missing.

    Its VAE is the image-to-video model's, from that model's file.
    """
    config = ImageToVideoConfig()
    clip, vae = build_clip(_read(path)["text_encoder"]), build_vae(_read(vae_path)["vae"], config)
    return load_demo_unet(path, config, by_text=True), clip, vae


def load_demo_image_models(
    path: Path = IMAGE_WEIGHTS, text_path: Path = TEXT_WEIGHTS, vae_path: Path = WEIGHTS
) -> tuple[Any, Any, Any]:
    """The embedded text-to-image model as (MODEL, CLIP, VAE); FileNotFoundError where weights are missing.

    Its CLIP is the text-to-video model's and its VAE the image-to-video model's, from those models' files.
    """
    model = load_demo_image_unet(path, TextToImageConfig())
    vae = build_vae(_read(vae_path)["vae"], ImageToVideoConfig())
    return model, build_clip(_read(text_path)["text_encoder"]), vae


def load_demo_unet(path: Path, config: ImageToVideoConfig, by_text: bool = False, disable_dynamic: bool = False) -> Any:
    """The MODEL alone. The host calls this too, to make a copy of its own (training, several GPUs, weight hooks).

    disable_dynamic is what the host passes for a copy without its dynamic memory; this one never has it.
    """
    patcher = build_model(_read(path)["unet"], config, by_text)
    patcher.cached_patcher_init = (load_demo_unet, (path, config, by_text))
    return patcher


def load_demo_image_unet(path: Path, config: TextToImageConfig, disable_dynamic: bool = False) -> Any:
    """The text-to-image MODEL alone; the host calls it as it calls `load_demo_unet`."""
    patcher = build_image_model(_read(path)["unet"], config)
    patcher.cached_patcher_init = (load_demo_image_unet, (path, config))
    return patcher


def _read(path: Path) -> dict[str, Weights]:
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}: reinstall Rewind, or train them as demo/README.md says")
    weights = comfy.utils.load_torch_file(str(path), safe_load=True)
    return split_checkpoint({name: tensor.float() for name, tensor in weights.items()})


def unet_settings(config: ImageToVideoConfig) -> dict[str, Any]:
    """What the host's detection would say of the UNet."""
    widths = config.unet_channels
    levels = len(widths)
    return {
        "image_size": 32,
        "in_channels": 8,
        "out_channels": 4,
        "model_channels": widths[0],
        "num_res_blocks": [1] * levels,
        "channel_mult": [width // widths[0] for width in widths],
        "transformer_depth": [1] * levels,
        "transformer_depth_output": [1] * (2 * levels),
        "transformer_depth_middle": 1,
        "use_linear_in_transformer": True,
        "context_dim": config.context,
        "num_classes": "sequential",
        "adm_in_channels": 768,
        "use_spatial_transformer": True,
        "legacy": False,
        "extra_ff_mix_layer": True,
        "use_spatial_context": True,
        "merge_strategy": "learned_with_images",
        "merge_factor": 0.0,
        "video_kernel_size": [3, 1, 1],
        "use_temporal_resblock": True,
        "use_temporal_attention": True,
        "disable_temporal_crossattention": False,
        "dtype": torch.float32,
    }


def image_unet_settings(config: TextToImageConfig) -> dict[str, Any]:
    """What the host's detection would say of the text-to-image UNet."""
    widths = config.unet_channels
    attending = len(widths) - 1  # the last level has no attention
    return {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": widths[0],
        "num_res_blocks": [1] * len(widths),
        "channel_mult": [width // widths[0] for width in widths],
        "transformer_depth": [1] * attending + [0],
        "transformer_depth_output": [1] * (2 * attending) + [0, 0],
        "transformer_depth_middle": 1,
        "use_linear_in_transformer": False,
        "context_dim": config.context,
        "adm_in_channels": None,
        "use_spatial_transformer": True,
        "legacy": False,
        "use_temporal_resblock": False,
        "use_temporal_attention": False,
        "dtype": torch.float32,
    }


class PictureLatent(comfy.latent_formats.SD15):
    """Stable Diffusion's latents with the embedded VAE's colours: three channels of it are a small picture already."""

    def __init__(self):
        super().__init__()
        self.latent_rgb_factors = [
            [PICTURE_STD if channel == colour else 0.0 for colour in range(3)] for channel in range(4)
        ]
        self.latent_rgb_factors_bias = [PICTURE_MEAN] * 3
        self.taesd_decoder_name = None


def build_model(weights: Weights, config: ImageToVideoConfig, by_text: bool = False) -> Any:
    """A MODEL of the host's SVD class from the UNet's weights in the checkpoint's names.

    by_text: whether a text tells it what to show, instead of a first frame (see `checks.takes_first_frame`). For a
    CONDITIONING without a first frame the host's class gives zeros in its place, as this model was trained.
    """

    class TinySVD(comfy.supported_models.SVD_img2vid):
        unet_extra_config = {
            "num_heads": -1,
            "num_head_channels": config.head_channels,
            "attn_precision": torch.float32,
        }
        latent_format = PictureLatent
        rewind_by_text = by_text

    return _patcher(TinySVD(unet_settings(config)), weights)


def build_image_model(weights: Weights, config: TextToImageConfig) -> Any:
    """A MODEL of the host's SD 1.5 class (EPS, discrete times) from the UNet's weights in the checkpoint's names."""

    class TinySD15(comfy.supported_models.SD15):
        unet_extra_config = {"num_heads": config.heads, "num_head_channels": -1}
        latent_format = PictureLatent

    return _patcher(TinySD15(image_unet_settings(config)), weights)


def _patcher(settings: Any, weights: Weights) -> Any:
    """A MODEL of a host's configuration, in float32, with the UNet's weights."""
    settings.set_inference_dtype(torch.float32, None)
    model = settings.get_model({}, "", device=comfy.model_management.unet_offload_device())
    model.diffusion_model.load_state_dict(weights)
    return comfy.model_patcher.ModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def build_vae(weights: Weights, config: ImageToVideoConfig) -> Any:
    """A VAE of the host from the weights in the checkpoint's names.

    The host builds SVD's VAE at SVD's own widths only; so its VAE object is made around a small stand-in of the same
    kind, and the network inside is replaced by the host's encoder and temporal decoder at ours.
    """
    widths = config.vae_channels
    encoder = {
        "double_z": True,
        "z_channels": 4,
        "resolution": config.size,
        "in_channels": 3,
        "out_ch": 3,
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    network = AutoencodingEngine(
        regularizer_config={"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"},
        encoder_config={"target": "comfy.ldm.modules.diffusionmodules.model.Encoder", "params": encoder},
        decoder_config={
            "target": "comfy.ldm.modules.temporal_ae.VideoDecoder",
            "params": {**encoder, "video_kernel_size": [3, 1, 1], "alpha": 0.0},
        },
    )
    network.load_state_dict(weights)
    stand_in = {"embed_dim": 4, "ddconfig": {**encoder, "ch": 32, "ch_mult": [1, 1, 1, 1]}}
    vae = comfy.sd.VAE(sd=AutoencoderKL(**stand_in).state_dict(), config={"params": stand_in}, dtype=torch.float32)
    vae.first_stage_model = network.eval().to(vae.vae_dtype)
    vae.patcher = comfy.model_patcher.ModelPatcher(
        vae.first_stage_model, load_device=vae.device, offload_device=comfy.model_management.vae_offload_device()
    )
    vae.size = comfy.model_management.module_size(vae.first_stage_model)
    return vae


def build_clip_vision(weights: Weights, config: ImageToVideoConfig) -> Any:
    """A CLIP_VISION of the host from transformers' weights."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clip_vision.json"  # older hosts take a path only
        file.write_text(json.dumps(config.clip_vision()), encoding="utf-8")
        clip_vision = comfy.clip_vision.ClipVisionModel(str(file))
    missing, unknown = clip_vision.load_sd({name: tensor.clone() for name, tensor in weights.items()})
    if missing or unknown:
        raise ValueError(
            f"the image encoder's weights do not fit the host: missing {missing[:3]}, unknown {unknown[:3]}"
        )
    return clip_vision


class TinyCLIP(comfy.sd1_clip.SD1ClipModel):
    """The host's text encoder outside its dynamic memory, which newer hosts have for large ones."""

    disable_offload = True


def build_clip(weights: Weights, config: TextConfig = TextConfig()) -> Any:
    """A CLIP of the host from the text encoder's weights in the checkpoint's names; ValueError for other weights.

    The host's own tokenizer and text encoder of Stable Diffusion, with our vocabulary and at our sizes.
    """
    settings = config.clip_text()
    tokenizer = partial(
        comfy.sd1_clip.SDTokenizer,
        tokenizer_path=str(TOKENIZER),
        max_length=config.length,
        embedding_size=config.hidden,
    )
    encoder = {
        "clip_model": comfy.sd1_clip.SDClipModel,
        "textmodel_json_config": settings,
        "max_length": config.length,
        "special_tokens": {
            "start": settings["bos_token_id"],
            "end": settings["eos_token_id"],
            "pad": settings["pad_token_id"],
        },
        "return_projected_pooled": False,
    }
    target = SimpleNamespace(
        params=encoder, clip=TinyCLIP, tokenizer=partial(comfy.sd1_clip.SD1Tokenizer, tokenizer=tokenizer)
    )
    clip = comfy.sd.CLIP(target, model_options={"dtype": torch.float32})
    # The host's embedding has a row for every token of the released vocabulary: those above ours are never asked for.
    name, rows = "text_model.embeddings.token_embedding.weight", settings["vocab_size"]
    embedding = clip.cond_stage_model.clip_l.transformer.get_input_embeddings().weight
    ours = weights.get(name, embedding[:0])
    if ours.shape != (rows, config.hidden):
        raise ValueError(f"the text encoder's embedding is {tuple(ours.shape)}, not {(rows, config.hidden)}")
    padded = F.pad(ours, (0, 0, 0, len(embedding) - rows))
    projection = torch.eye(config.hidden)  # the host has one for pooled texts, which a text-to-video model does not use
    missing, unknown = clip.load_sd({**weights, name: padded, "text_projection.weight": projection})
    if missing or unknown:
        raise ValueError(
            f"the text encoder's weights do not fit the host: missing {missing[:3]}, unknown {unknown[:3]}"
        )
    return clip
