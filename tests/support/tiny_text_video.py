"""diffusers' own text-to-video classes with tiny random weights: one model of each family that Dreamix runs on."""

from __future__ import annotations

import torch

from rewind.pipelines.dreamix.families import ModelScope, TextSVD, Wan

FRAMES, HEIGHT, WIDTH, TEXT = 5, 32, 48, 32
NAMES = ("TextSVD", "ModelScope", "Wan")


class Words:
    """In place of a tokenizer: a token a word, by its letters."""

    def __call__(self, prompts, padding="max_length", max_length=8, truncation=True, return_tensors="pt"):
        ids = [[sum(map(ord, word)) % 97 + 1 for word in prompt.split()][:max_length] for prompt in prompts]
        rows = [row + [0] * (max_length - len(row)) for row in ids]
        return Batch(input_ids=torch.tensor(rows), attention_mask=(torch.tensor(rows) > 0).long())


class Batch(dict):
    """What tokenizers return: a dictionary with attributes and `to`."""

    __getattr__ = dict.__getitem__

    def to(self, device):
        return Batch({key: value.to(device) for key, value in self.items()})


class Encoder(torch.nn.Module):
    """In place of a text encoder: an embedding."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(100, TEXT)

    @property
    def device(self):
        return self.table.weight.device

    def forward(self, ids, mask=None):
        return Batch(last_hidden_state=self.table(ids))


def _svd():
    from diffusers import UNetSpatioTemporalConditionModel

    return UNetSpatioTemporalConditionModel(
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        block_out_channels=(32, 64),
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96,
        layers_per_block=1,
        cross_attention_dim=TEXT,
        num_attention_heads=(2, 4),
        num_frames=FRAMES,
    )


def _modelscope():
    from diffusers import UNet3DConditionModel

    return UNet3DConditionModel(
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=TEXT,
        attention_head_dim=8,
    )


def _wan():
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, text_dim=TEXT, freq_dim=32, ffn_dim=64, num_layers=2
    )


def _vae(name: str):
    from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder, AutoencoderKLWan

    if name == "Wan":
        return AutoencoderKLWan(base_dim=8, num_res_blocks=1)
    widths = {"block_out_channels": (32, 32, 32, 32), "down_block_types": ("DownEncoderBlock2D",) * 4}
    if name == "TextSVD":
        return AutoencoderKLTemporalDecoder(layers_per_block=2, **widths)
    return AutoencoderKL(up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, latent_channels=4, **widths)


def family(name: str, seed: int = 0):
    """One of NAMES, with random weights that do something everywhere (zero-initialised layers included)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = {"TextSVD": _svd, "ModelScope": _modelscope, "Wan": _wan}[name]()
        vae, encoder = _vae(name), Encoder()
        for p in network.parameters():
            if not p.any():
                p.data = 0.05 * torch.randn_like(p)
    for module in (network, vae, encoder):
        module.eval().requires_grad_(False)
    if name == "ModelScope":
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        return ModelScope(network, vae, encoder, Words(), (1 - betas).cumprod(0))
    return {"TextSVD": TextSVD, "Wan": Wan}[name](
        network, vae, encoder, Words(), **({"length": 8} if name == "Wan" else {})
    )


def video(seed: int = 3, frames: int = FRAMES) -> torch.Tensor:
    """A random clip [frames, 3, HEIGHT, WIDTH] in 0..1."""
    return torch.rand(frames, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed))
