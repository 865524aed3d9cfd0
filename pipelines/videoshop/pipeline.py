"""Videoshop without a host: the whole job on diffusers' Stable Video Diffusion components."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..chunks import CHUNK, decode_in_chunks, decoder
from ..denoiser import karras_sigmas
from ..fingerprint import Fingerprint, fingerprint
from ..video import check_frames, check_pixels
from .denoising import GuidedDenoiser, sample_euler
from .inversion import Inversion, sample_edm_inversion
from .latents import augment, clip_preprocess, normalise, rescale, whiten_condition
from .masks import StoredSource, check_mask, composite, composite_pixels, latent_mask
from .parts import Recorder, guidance_of, normalisation_of, part_of, parts, parts_of
from .settings import DEFAULT, VideoshopSettings
from .svd import SVDDenoiser, unet_config
from .windows import in_windows, windows

Callback = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class VideoshopResult:
    """The edited clip [T, 3, H, W] in 0..1, its latents, its inversion, and the network calls of both ways."""

    frames: Tensor
    latents: Tensor
    inversion: Inversion
    evaluations: dict[str, int]


def check_video(video: Tensor, edited: Tensor | None = None, multiple: int = 8) -> None:
    """ValueError unless video is [T >= 2, 3, H, W] in 0..1, of a size the model takes, and edited fits it."""
    check_frames(video, multiple)
    if len(video) < 2:
        raise ValueError(f"got {len(video)} frames; a clip has at least 2")
    if edited is not None and edited.shape != video.shape[1:]:
        raise ValueError(
            f"got an edited frame of shape {tuple(edited.shape)} for a clip of shape {tuple(video.shape)}: it must be "
            f"{tuple(video.shape[1:])}, the size of the clip's frames"
        )
    if edited is not None:
        check_pixels(edited, "edited frame")


class VideoshopPipeline:
    """Invert a clip with its own first frame as the condition, play it again with the edited one (arXiv 2403.14617).

    unet, vae, image_encoder: diffusers' UNetSpatioTemporalConditionModel and AutoencoderKLTemporalDecoder,
    transformers' CLIPVisionModelWithProjection; on one device. scaling_factor: of the latents, 0.18215 for SVD.
    chunk: frames that the VAE takes at once; fewer save memory and take longer, since its temporal decoder sees a chunk
        as a clip, and chunks therefore overlap (`decode_in_chunks`).
    """

    def __init__(self, unet, vae, image_encoder, scaling_factor: float = 0.18215, chunk: int = CHUNK):
        if chunk < 1:
            raise ValueError(f"chunk is {chunk}; it must be at least 1 frame")
        self.unet, self.vae, self.image_encoder = unet, vae, image_encoder
        self.scaling_factor, self.chunk = scaling_factor, chunk
        # The UNet halves the latents once a level but the last.
        self.multiple = 8 * 2 ** (len(unet.config.block_out_channels) - 1)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        torch_dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        variant: str | None = None,
    ) -> VideoshopPipeline:
        """Load Stable Video Diffusion from a local folder or a hub's id in diffusers' layout.

        The VAE's encoder stays in float32 where its configuration says that float16 overflows (SVD's does). Raises
        ValueError for a model of another kind, before any weights are read.
        """
        from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
        from transformers import CLIPVisionModelWithProjection

        kinds = (
            (UNetSpatioTemporalConditionModel, "unet"),
            (AutoencoderKLTemporalDecoder, "vae"),
            (CLIPVisionModelWithProjection, "image_encoder"),
        )
        unet_config(path)
        unet, vae, image_encoder = (
            kind.from_pretrained(str(path), subfolder=name, torch_dtype=torch_dtype, variant=variant)
            .to(device)
            .eval()
            .requires_grad_(False)
            for kind, name in kinds
        )
        if torch_dtype == torch.float16 and vae.config.force_upcast:
            vae.encoder.float()
            vae.quant_conv.float()
        return cls(unet, vae, image_encoder, vae.config.scaling_factor)

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    # --- pixels and latents -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _encode(self, pixels: Tensor) -> Tensor:
        """Unscaled latents (the posterior's mode) of pixels [n, 3, H, W] in -1..1."""
        pieces = pixels.to(self.device, self.vae.encoder.conv_in.weight.dtype).split(self.chunk)
        return torch.cat([self.vae.encode(piece).latent_dist.mode() for piece in pieces]).float()

    def encode(self, video: Tensor) -> Tensor:
        """Latents [T, 4, H/8, W/8] in model space of a clip [T, 3, H, W] in 0..1; frame by frame, deterministic."""
        return self._encode(2 * video - 1) * self.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The clip [T, 3, H, W] in 0..1, on the CPU, of latents [T, 4, h, w] in model space."""
        z = (latents / self.scaling_factor).to(self.device, self.vae.decoder.conv_in.weight.dtype)
        return decode_in_chunks(decoder(self.vae), z, self.chunk)

    # --- conditions ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def condition(
        self, image: Tensor, settings: VideoshopSettings = DEFAULT, noise: Tensor | None = None, whiten: bool = False
    ) -> SVDDenoiser:
        """The model conditioned on a first frame [3, H, W] in 0..1, with augmentation noise of its shape.

        whiten: whiten the first frame's latents, as the authors' code does in the inversion.
        """
        if settings.augmentation and noise is None:
            raise ValueError(f"augmentation {settings.augmentation} needs noise of the picture's shape")
        pixels = 2 * image[None] - 1
        if settings.augmentation:
            pixels = augment(pixels, settings.augmentation, noise)
        latents = self._encode(pixels)
        if whiten:
            latents = whiten_condition(latents, self.scaling_factor)
        prepared = clip_preprocess(image[None].float(), self.image_encoder.config.image_size)
        embedding = self.image_encoder(prepared.to(self.device, self.image_encoder.dtype)).image_embeds[:, None]
        ids = torch.tensor([[settings.fps - 1, settings.motion_bucket, settings.augmentation]], device=self.device)
        return SVDDenoiser(self.unet, latents, embedding, ids)

    def unconditional(self, condition: SVDDenoiser) -> SVDDenoiser:
        """The negative side of guidance: zero latents, zero embedding, the same added ids (SVD's convention)."""
        zeros = torch.zeros_like(condition.image_latents), torch.zeros_like(condition.embedding)
        return SVDDenoiser(self.unet, *zeros, condition.added_ids)

    # --- the two ways -------------------------------------------------------------------------------------------------

    def invert(
        self,
        video: Tensor,
        settings: VideoshopSettings = DEFAULT,
        generator: torch.Generator | None = None,
        *,
        keep_trajectory: bool = False,
        trajectory_dtype: torch.dtype = torch.float32,
        callback: Callback | None = None,
        progress: bool = False,
        mask: Tensor | None = None,
    ) -> Inversion:
        """Rewind a clip [T, 3, H, W] in 0..1 to noise, with its own first frame as the condition.

        generator: on the CPU, so that all devices draw the same: the augmentation noise of both first frames, then the
        random direction. keep_trajectory: keep the clip at every noise level, on the CPU, in trajectory_dtype; a mask
        on the way back needs it. progress: a bar on stderr. mask: [T or 1, H, W], where the statistics of the
        normalisation are taken.
        """
        check_video(video, multiple=self.multiple)
        if mask is not None:
            check_mask(mask, len(video), *video.shape[2:])
        if generator is not None and generator.device.type != "cpu":
            raise ValueError(f"the generator is on {generator.device}; one on the CPU draws the same for every device")
        noise, fresh = torch.randn(2, *video.shape[1:], generator=generator)
        latents = self.encode(video)
        direction = torch.randn(latents.shape, generator=generator).to(latents)
        first = self.condition(video[0], settings, noise, whiten=settings.normalise_condition)
        region = None if mask is None else latent_mask(mask, latents.shape)
        normalised, applied = normalise(latents, settings.normalise, mask=region)
        sigmas = settings.sigmas()
        found, context = parts(len(video), settings.frames_at_once), (settings.context_length, settings.context_overlap)
        calls = len(windows(len(video), *context))  # of the network, for one of the sampler's
        record = Recorder(normalised, sigmas, found, trajectory_dtype if keep_trajectory else None)
        for number, (start, stop) in enumerate(found):
            keep, shared = record.of(number), latents[start : start + 1]

            def collect(step: dict[str, Any], keep: Callback = keep) -> None:
                step = step | {"evaluations": calls * step["evaluations"]}
                keep(step)
                if callback is not None:
                    callback(step)

            told = self._told_of(first, shared, settings.normalise_condition) if number else first
            sample_edm_inversion(
                in_windows(told, *context),
                normalised[start:stop],
                sigmas.flip(0),
                callback=collect,
                disable=not progress,
                noise=direction[: stop - start],  # the same for all parts
                **settings.guesses(),
            )
        return record.inversion(
            sigmas=sigmas,
            normalisation=applied,
            settings=asdict(settings),
            source=latents,
            augmentation_noise=noise if settings.shared_augmentation else fresh,
            model=self.fingerprint(),
        )

    def _told_of(self, first: SVDDenoiser, frame: Tensor, whiten: bool = False) -> SVDDenoiser:
        """The model told of a frame in model space, [1, 4, h, w], in the place of its first frame."""
        frame = frame / self.scaling_factor
        return first.told_of(whiten_condition(frame, self.scaling_factor) if whiten else frame)

    def fingerprint(self) -> Fingerprint:
        """What tells this model's UNet from others."""
        return fingerprint(type(self.unet).__name__, self.unet.state_dict())

    def denoise(
        self,
        inversion: Inversion,
        edited_frame: Tensor,
        settings: VideoshopSettings = DEFAULT,
        *,
        callback: Callback | None = None,
        progress: bool = False,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Play an inverted clip from another first frame [3, H, W] in 0..1: latents [T, 4, h, w] in model space.

        mask: [T or 1, H, W] in 0..1, where the edit may show; elsewhere the source's latents come back bit for bit.
        Raises ValueError for a frame of another size than the clip's, or with values out of range; for such a mask, and
        for one with an inversion that kept no trajectory.
        """
        wanted = (3, *(8 * side for side in inversion.latent.shape[-2:]))
        if edited_frame.shape != wanted:
            raise ValueError(
                f"got an edited frame of shape {tuple(edited_frame.shape)}; the clip needs one of {wanted}"
            )
        check_pixels(edited_frame, "edited frame")
        return self._denoise(inversion, edited_frame, settings, callback, progress, mask)[0]

    def _denoise(
        self,
        inversion: Inversion,
        edited_frame: Tensor,
        settings: VideoshopSettings,
        callback: Callback | None,
        progress: bool,
        mask: Tensor | None,
    ) -> tuple[Tensor, int]:
        region = None if mask is None else latent_mask(mask, inversion.latent.shape).to(self.device)
        if region is not None:
            region = region.expand(len(inversion.latent), -1, -1, -1)
            StoredSource(inversion, region)  # raises where nothing can be put back
        first = self.condition(edited_frame, settings, inversion.augmentation_noise)
        reference = self.encode(edited_frame[None]) if settings.rescale else None

        def finish(x: Tensor) -> Tensor:
            """The clip up to where it is played, with the statistics of its own first frame."""
            normalisation = normalisation_of(inversion.normalisation, 0, len(x))
            if normalisation is not None and settings.denormalise:
                x = normalisation.undo(x)
            masked = None if region is None else region[: len(x)]
            if masked is not None:
                x = composite(x, inversion.source[: len(x)], masked)
            return x if reference is None else rescale(x, reference, settings.rescale, mask=masked)

        x, calls = inversion.latent[:0].to(self.device), 0
        for number, (start, stop) in enumerate(parts_of(inversion)):
            part = part_of(inversion, number)
            ends = settings.first_guidance, settings.last_guidance
            ends = guidance_of(*ends, (start, stop), len(inversion.latent))
            played, count = self._play(
                part.latent.to(self.device),
                inversion.sigmas,
                self._told_of(first, finish(x)[-1:]) if number else first,
                replace(settings, first_guidance=ends[0], last_guidance=ends[1]),
                callback,
                progress,
                None if region is None else StoredSource(part, region[start:stop]),
            )
            x, calls = torch.cat([x, played[1:] if number else played]), calls + count
        return finish(x), calls

    def _play(
        self,
        x: Tensor,
        sigmas: Tensor,
        condition: SVDDenoiser,
        settings: VideoshopSettings,
        callback: Callback | None,
        progress: bool,
        put_back: Callable[[Tensor, float], Tensor] | None = None,
    ) -> tuple[Tensor, int]:
        """Euler with the settings' guidance; the result and the network calls it took."""
        context = settings.context_length, settings.context_overlap
        model = GuidedDenoiser(
            in_windows(condition, *context),
            in_windows(self.unconditional(condition), *context),
            settings.first_guidance,
            settings.last_guidance,
            settings.guidance_interval,
        )
        calls = len(windows(len(x), *context))  # of the network, for one of the guided model's

        def tell(step: dict[str, Any]) -> None:
            callback(step | {"evaluations": calls * model.evaluations})

        on_step = None if callback is None else tell
        x = sample_euler(model, x, sigmas, callback=on_step, disable=not progress, put_back=put_back)
        return x, calls * model.evaluations

    def image_to_video(
        self,
        image: Tensor,
        settings: VideoshopSettings = DEFAULT,
        generator: torch.Generator | None = None,
        frames: int | None = None,
    ) -> Tensor:
        """Plain image-to-video from random noise, over the whole schedule: latents [frames, 4, h, w] in model space.

        frames: the model's own number by default. generator: on the CPU, so that all devices give the same noise.
        """
        frames = frames or self.unet.config.num_frames
        check_video(image[None].expand(2, -1, -1, -1), multiple=self.multiple)
        noise = torch.randn(image.shape, generator=generator)
        condition = self.condition(image, settings, noise)
        start = torch.randn(frames, 4, image.shape[1] // 8, image.shape[2] // 8, generator=generator).to(self.device)
        sigmas = karras_sigmas(settings.steps, settings.sigma_min, settings.sigma_max, settings.rho)
        x = start * torch.sqrt(sigmas[0] ** 2 + 1).float()
        return self._play(x, sigmas, condition, settings, None, False)[0]

    def __call__(
        self,
        video: Tensor,
        edited_frame: Tensor,
        settings: VideoshopSettings = DEFAULT,
        generator: torch.Generator | None = None,
        progress: bool = True,
        callback: Callback | None = None,
        keep_trajectory: bool = False,
        inversion: Inversion | None = None,
        mask: Tensor | None = None,
        keep_pixels: bool = False,
    ) -> VideoshopResult:
        """Carry the edit of the first frame through the clip.

        video: [T, 3, H, W] in 0..1, T >= 2, both sides multiples of `multiple`; edited_frame: [3, H, W] in 0..1.
        generator: on the CPU; it draws the augmentation noise and the random direction. callback: gets the samplers'
        dicts, with "phase": "inversion" or "denoising". inversion: of this very clip, which then is not inverted again.
        mask: [T or 1, H, W] in 0..1, where the edit may show (see `masks.edit_mask`); outside it the result's latents
        are the source's, and with keep_pixels its frames too, which otherwise have been through the VAE. Raises
        ValueError for bad input before anything is computed.
        """
        check_video(video, edited_frame, self.multiple)
        if mask is not None:
            check_mask(mask, len(video), *video.shape[2:])
        elif keep_pixels:
            raise ValueError("the source's pixels are kept outside a mask: give one")

        def tell(phase: str) -> Callback | None:
            return None if callback is None else lambda step: callback(step | {"phase": phase})

        if inversion is None:
            inversion = self.invert(
                video,
                settings,
                generator,
                keep_trajectory=keep_trajectory or mask is not None,
                callback=tell("inversion"),
                progress=progress,
                mask=mask,
            )
        result, evaluations = self._denoise(inversion, edited_frame, settings, tell("denoising"), progress, mask)
        frames = self.decode(result)
        if keep_pixels:
            frames = composite_pixels(frames, video, mask)
        counts = {"inversion": inversion.evaluations, "denoising": evaluations}
        return VideoshopResult(frames, result, inversion, counts)
