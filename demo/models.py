"""The embedded image-to-video model in diffusers' classes, and where its weights lie.

The architecture is Stable Video Diffusion's own (EDM v-prediction; first-frame latents concatenated; image embedding by
cross-attention; fps, motion bucket and augmentation level as added ids; temporal ResNets and attention; an 8x VAE
with a temporal decoder), only smaller. diffusers and transformers are imported when a model is built, not before.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

WEIGHTS = Path(__file__).with_name("rewind_demo_svd.safetensors")
TEXT_WEIGHTS = Path(__file__).with_name("rewind_demo_t2v.safetensors")
IMAGE_WEIGHTS = Path(__file__).with_name("rewind_demo_t2i.safetensors")
SCALING_FACTOR = 0.18215  # of SVD's latents; the host has it fixed in its SD15 latent format
# The first three latent channels are held near (the eight times smaller picture in -1..1 - mean) / deviation in
# training, which gives the encoder a start, keeps colour linear and leaves the fourth for detail. Affine, so that the
# latents have about unit variance in model space.
PICTURE_MEAN, PICTURE_STD = -0.10, 0.26


@dataclass(frozen=True)
class ImageToVideoConfig:
    """Sizes of the tiny SVD. GroupNorm(32) is fixed in both faces: every width is a multiple of 32 and at least 64."""

    frames: int = 8
    size: int = 96
    unet_channels: tuple[int, ...] = (64, 128)
    head_channels: int = 32
    context: int = 64  # width of the image embedding
    vae_channels: tuple[int, ...] = (64, 64, 128, 128)
    clip_hidden: int = 64
    clip_layers: int = 2
    clip_heads: int = 2
    clip_image: int = 32
    clip_patch: int = 8

    def clip_vision(self) -> dict:
        """The image encoder's configuration, in the words that the host and transformers share."""
        return {
            "model_type": "clip_vision_model",
            "hidden_size": self.clip_hidden,
            "intermediate_size": 2 * self.clip_hidden,
            "projection_dim": self.context,
            "num_hidden_layers": self.clip_layers,
            "num_attention_heads": self.clip_heads,
            "num_channels": 3,
            "image_size": self.clip_image,
            "patch_size": self.clip_patch,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
        }


def build_unet(config: ImageToVideoConfig = ImageToVideoConfig()):
    """diffusers' UNetSpatioTemporalConditionModel with fresh weights, attention at every level."""
    import torch
    from diffusers import UNetSpatioTemporalConditionModel
    from diffusers.models.attention_processor import AttnProcessor

    levels = len(config.unet_channels)
    unet = UNetSpatioTemporalConditionModel(
        sample_size=config.size // 8,
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal",) * levels,
        up_block_types=("CrossAttnUpBlockSpatioTemporal",) * levels,
        block_out_channels=config.unet_channels,
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=768,
        layers_per_block=1,
        cross_attention_dim=config.context,
        num_attention_heads=tuple(c // config.head_channels for c in config.unet_channels),
        num_frames=config.frames,
    )
    # diffusers builds the ResNets of these blocks with an epsilon of 1e-6; SVD's own, the host's and diffusers' middle
    # block have 1e-5.
    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.GroupNorm) and "resnets" in name:
            module.eps = 1e-5
    unet.set_attn_processor(AttnProcessor())  # for 8, 36 and 144 tokens plain products beat fused attention on a CPU
    return unet


def build_vae(config: ImageToVideoConfig = ImageToVideoConfig()):
    """diffusers' AutoencoderKLTemporalDecoder with fresh weights, one ResNet a level."""
    import torch
    from diffusers import AutoencoderKLTemporalDecoder
    from diffusers.models.unets.unet_3d_blocks import MidBlockTemporalDecoder

    channels = config.vae_channels
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        layers_per_block=1,
        latent_channels=4,
        sample_size=config.size,
        scaling_factor=SCALING_FACTOR,
    )
    # diffusers derives the middle's depth from layers_per_block and drops its attention at 1; SVD's has two ResNets.
    vae.decoder.mid_block = MidBlockTemporalDecoder(
        num_layers=2, in_channels=channels[-1], out_channels=channels[-1], attention_head_dim=channels[-1]
    )
    # SVD's own checkpoint has no quant_conv: here it is the identity and is never stored.
    vae.quant_conv.weight.data = torch.eye(8)[:, :, None, None]
    vae.quant_conv.bias.data.zero_()
    vae.quant_conv.requires_grad_(False)
    return vae


def build_image_encoder(config: ImageToVideoConfig = ImageToVideoConfig()):
    """transformers' CLIPVisionModelWithProjection with fresh weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection(CLIPVisionConfig(**config.clip_vision()))


def read_weights(path: Path) -> dict:
    """The tensors of a weights file in float32; FileNotFoundError where it is missing (a source tree without it)."""
    from safetensors.torch import load_file

    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}: reinstall Rewind, or train them as demo/README.md says")
    return {name: tensor.float() for name, tensor in load_file(path).items()}


def load_components(path: Path = WEIGHTS, config: ImageToVideoConfig = ImageToVideoConfig()):
    """The embedded model as (unet, vae, image_encoder): diffusers' and transformers' modules in float32, in eval mode.

    Raises FileNotFoundError where the weights are missing (a source tree without `demo/rewind_demo_svd.safetensors`).
    """
    from .keys import from_checkpoint

    parts = from_checkpoint(read_weights(path), config)
    modules = build_unet(config), build_vae(config), build_image_encoder(config)
    for module, part in zip(modules, ("unet", "vae", "image_encoder")):
        module.load_state_dict(parts[part])
        module.eval().requires_grad_(False)
    return modules
