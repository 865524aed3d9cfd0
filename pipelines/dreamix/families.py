"""The text-to-video models that Dreamix runs on headless: diffusers' modules behind one face.

Three families: `Wan` (a video transformer, rectified flow), `ModelScope` (UNet3DConditionModel, EPS or V: ModelScope,
ZeroScope) and `TextSVD` (Stable Video Diffusion's UNet with text tokens as its context and no first frame: the embedded
model). Each turns pixels to latents and back, tells its noise path and schedule, and denoises a clip or single frames.

Latents are in model space. A clip is what the network takes as one: [T, 4, h, w] for TextSVD, [1, C, T', h, w] else;
pictures are one-frame clips as a batch: [M, 4, h, w] or [M, C, 1, h, w].
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..chunks import decode_in_chunks, decoder
from ..denoiser import FLOW, discrete_denoised, edm_scalings
from ..families import DiscreteFamily, Family

# fps - 1, motion bucket and augmentation level of TextSVD: what the host tells a model of SVD's class where a
# CONDITIONING does not speak of them.
PLAIN_IDS = (5.0, 127.0, 0.0)
KINDS = ("WanPipeline", "TextToVideoSDPipeline")  # of diffusers' pipelines


class TextSVD(Family):
    """UNetSpatioTemporalConditionModel with a text encoder: cross-attention over tokens, zero concatenated latents."""

    def decode(self, clip: Tensor) -> Tensor:
        z = (clip / self.vae.config.scaling_factor).to(self.device, self.vae.dtype)
        with torch.no_grad():
            return decode_in_chunks(decoder(self.vae), z, self.chunk)

    def denoise(self, x: Tensor, sigma: Tensor, context: Tensor, as_pictures: bool = False) -> Tensor:
        batch = (
            (1, 0) if as_pictures else (0, 1)
        )  # where the axis goes that the latents lack: [M, 1, ...] or [1, T, ...]
        levels = sigma if as_pictures else sigma[:1]
        c_skip, c_out, c_in, c_noise = (
            c[:, None, None, None] if i < 3 else c for i, c in enumerate(edm_scalings(levels.float()))
        )
        scaled = (c_in * x.float()).to(self.network.dtype)
        model_input = torch.cat([scaled, torch.zeros_like(scaled)], 1).unsqueeze(batch[0])
        n = len(levels)
        output = self.network(
            model_input,
            c_noise,
            context.to(scaled.dtype).expand(n, -1, -1),
            torch.tensor(PLAIN_IDS, device=x.device, dtype=scaled.dtype).expand(n, -1),
            return_dict=False,
        )[0].squeeze(batch[0])
        return c_skip * x.float() + c_out * output.float()


class ModelScope(DiscreteFamily):
    """UNet3DConditionModel."""

    def encode_clip(self, frames: Tensor) -> Tensor:
        return self.encode_pictures(frames)[:, :, 0].movedim(0, 1)[None]

    def encode_pictures(self, frames: Tensor) -> Tensor:
        return super().encode_pictures(frames)[:, :, None]

    def decode(self, clip: Tensor) -> Tensor:
        frames = clip[0].movedim(1, 0) / self.vae.config.scaling_factor
        pieces = frames.to(self.device, self.vae.dtype).split(self.chunk)
        with torch.no_grad():
            pixels = torch.cat([self.vae.decode(piece).sample.float().cpu() for piece in pieces])
        return (pixels / 2 + 0.5).clamp(0, 1)

    def denoise(self, x: Tensor, sigma: Tensor, context: Tensor, as_pictures: bool = False) -> Tensor:
        dtype = self.network.dtype

        def network(scaled: Tensor, time: Tensor) -> Tensor:
            told = context.to(dtype).expand(len(x), -1, -1)
            return self.network(scaled.to(dtype), time, told, return_dict=False)[0]

        return discrete_denoised(network, x, sigma, self.times, self.path)


class Wan(Family):
    """WanTransformer3DModel. shift: of the schedule's times towards noise (Wan's own pipelines: 3 to 5 for 480p).

    Its VAE makes one latent frame of the first frame and one of each four that follow: clips have 4 n + 1 frames.
    """

    path = FLOW
    sigma_range = (1e-3, 1.0)
    stride = 4

    def __init__(self, network, vae, text_encoder, tokenizer, shift: float = 3.0, length: int = 512):
        super().__init__(network, vae, text_encoder, tokenizer)
        self.shift, self.length = shift, length

    @property
    def multiple(self) -> int:
        return 8 * self.network.config.patch_size[-1]

    @torch.no_grad()
    def embed(self, prompts: list[str]) -> Tensor:
        """Wan's own: the tokens of the prompt, zeros in place of the padding."""
        given = self.tokenizer(
            prompts, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        ).to(self.text_encoder.device)
        hidden = self.text_encoder(given.input_ids, given.attention_mask).last_hidden_state
        return hidden * given.attention_mask[..., None].to(hidden.dtype)

    def _scale(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (
            torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
            for values in (self.vae.config.latents_mean, self.vae.config.latents_std)
        )
        return mean, std

    @torch.no_grad()
    def encode_clip(self, frames: Tensor) -> Tensor:
        pixels = (2 * frames - 1).to(self.device, self.vae.dtype).movedim(1, 0)[None]
        latents = self.vae.encode(pixels).latent_dist.mode().float()
        mean, std = self._scale(latents)
        return (latents - mean) / std

    def encode_pictures(self, frames: Tensor) -> Tensor:
        return torch.cat([self.encode_clip(frame[None]) for frame in frames])

    @torch.no_grad()
    def decode(self, clip: Tensor) -> Tensor:
        mean, std = self._scale(clip)
        pixels = self.vae.decode((clip * std + mean).to(self.vae.dtype)).sample[0].float().cpu()
        return (pixels.movedim(1, 0) / 2 + 0.5).clamp(0, 1)

    def denoise(self, x: Tensor, sigma: Tensor, context: Tensor, as_pictures: bool = False) -> Tensor:
        dtype = self.network.dtype
        output = self.network(
            x.to(dtype), 1000 * sigma.float(), context.to(dtype).expand(len(x), -1, -1), return_dict=False
        )[0].float()
        return x.float() - sigma.float()[:, None, None, None, None] * output

    def schedule(self, steps: int) -> Tensor:
        times = torch.linspace(1, 0, steps + 1)
        return self.shift * times / (1 + (self.shift - 1) * times)


def model_kind(path: str | Path) -> str:
    """Which of KINDS a model in diffusers' layout is, a local folder or a hub's id, by its index alone.

    Raises ValueError for another kind; OSError where there is no such model.
    """
    from diffusers import DiffusionPipeline

    index = DiffusionPipeline.load_config(str(path))
    name = index.get("_class_name")
    if name not in KINDS:
        raise ValueError(f"{path} holds a {name}; Dreamix takes text-to-video models: {', '.join(KINDS)}")
    if any(index.get("transformer_2") or ()):
        raise ValueError(f"{path} has two transformers (Wan 2.2, 14B); models with one can be tuned")
    return name


def load_family(path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Family:
    """A model in diffusers' layout, a local folder or a hub's id: WanPipeline or TextToVideoSDPipeline.

    Raises ValueError for another kind, before any weights are read.
    """
    import diffusers

    name = model_kind(path)
    pipe = getattr(diffusers, name).from_pretrained(str(path), torch_dtype=dtype).to(device)
    network = pipe.transformer if name == "WanPipeline" else pipe.unet
    for module in (network, pipe.vae, pipe.text_encoder):
        module.eval().requires_grad_(False)
    if name == "WanPipeline":
        shift = float(pipe.scheduler.config.get("flow_shift") or pipe.scheduler.config.get("shift") or 3.0)
        return Wan(network, pipe.vae, pipe.text_encoder, pipe.tokenizer, shift)
    predicts_v = pipe.scheduler.config.get("prediction_type") == "v_prediction"
    return ModelScope(network, pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.scheduler.alphas_cumprod, predicts_v)
