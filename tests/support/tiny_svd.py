"""diffusers' and transformers' own classes of Stable Video Diffusion with tiny random weights, for the pipeline."""

from __future__ import annotations

import torch

FRAMES, HEIGHT, WIDTH = 4, 32, 48


def components(strength: float = 1.0, seed: int = 0) -> tuple[torch.nn.Module, ...]:
    """unet, vae, image_encoder; strength scales the UNet's output, and with it how much F depends on x."""
    from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNetSpatioTemporalConditionModel(
            in_channels=8,
            out_channels=4,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            block_out_channels=(32, 64),
            addition_time_embed_dim=32,
            projection_class_embeddings_input_dim=96,
            layers_per_block=1,
            cross_attention_dim=32,
            num_attention_heads=(2, 4),
            num_frames=FRAMES,
        )
        vae = AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 32, 32, 32), down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=2
        )
        image_encoder = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=32,
                intermediate_size=64,
                projection_dim=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=32,
                patch_size=16,
            )
        )
    with torch.no_grad():
        unet.conv_out.weight *= strength
        unet.conv_out.bias *= strength
    return tuple(module.eval().requires_grad_(False) for module in (unet, vae, image_encoder))


def video(seed: int = 3) -> torch.Tensor:
    """A random clip [FRAMES, 3, HEIGHT, WIDTH] in 0..1."""
    return torch.rand(FRAMES, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed))


def pipeline():
    """The components as a VideoshopPipeline; here, so that new processes can import it too."""
    from rewind.pipelines.videoshop.pipeline import VideoshopPipeline

    return VideoshopPipeline(*components())
