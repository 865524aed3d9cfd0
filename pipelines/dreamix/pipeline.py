"""Dreamix without a host: the whole job on diffusers' text-to-video models (arXiv 2302.01329)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..video import check_frames
from ..videoshop.denoising import GuidedDenoiser, sample_euler
from .coarse_video import View, coarse_video
from .corruption import add_noise, coarse_size, degrade, degrade_time, noise_to_signal, sigmas_from
from .families import Family, load_family
from .finetuning import FineTuning, Subject, Tuned, fine_tune
from .lora import State, from_state
from .prompts import with_token

Callback = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class DreamixSettings:
    """How a clip is edited; the defaults are ours, chosen on clips of the embedded model; the paper's are unknown.

    s: 0..1, the noise, as a time of the paper's schedule (`corruption.noise_to_signal`): 0 keeps the degraded clip, 1
    begins from pure noise. factor, size, stride, temporal: how the clip is degraded before; size (height, width) takes
    the factor's place. steps: of the whole schedule, of which those below sigma(s) are run. guidance: classifier-free,
    1 is none. token: the rare word of the fine-tuning; place: where it goes in the prompt (`prompts.with_token`).
    second_pass: s of a second edit of the result, 0 for none; scale: how much larger its frames are.
    """

    s: float = 0.9
    factor: float = 4.0
    stride: int = 1
    temporal: str = "hold"
    steps: int = 25
    guidance: float = 1.5
    negative: str = ""
    token: str = "sks"
    place: str = "before the prompt"
    second_pass: float = 0.0
    scale: float = 1.5
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of its range."""
        noise_to_signal(self.s)
        noise_to_signal(self.second_pass)
        if self.steps < 1:
            raise ValueError(f"got {self.steps} steps; at least 1 is needed")
        if not 1 <= self.scale <= 8:
            raise ValueError(f"the scale of the second pass is {self.scale}; it must be 1 (the same size) to 8")


@dataclass(frozen=True)
class DreamixResult:
    """The edited clip [T, 3, H, W] in 0..1, the clip after the first pass, the fine-tuning, and the network calls."""

    frames: Tensor
    first_pass: Tensor
    tuned: Tuned | None
    evaluations: int


class DreamixPipeline:
    """Edit a clip by a prompt: tune the model on it, corrupt it, restore it by the prompt.

    family: the model (`families`). All randomness is drawn on the CPU from seeds: equal arguments give equal results.
    """

    def __init__(self, family: Family):
        self.family = family

    @classmethod
    def from_pretrained(
        cls, path: str | Path, torch_dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> DreamixPipeline:
        """Load a WanPipeline or TextToVideoSDPipeline in diffusers' layout. ValueError for a model of another kind."""
        return cls(load_family(path, torch_dtype, device))

    def check_clip(self, frames: Tensor) -> None:
        """ValueError unless frames are a clip that the model takes: [T >= 2, 3, H, W], T = 4 n + 1 for Wan."""
        check_frames(frames, self.family.multiple, least=2)
        stride = self.family.stride
        if (len(frames) - 1) % stride:
            fitting = (len(frames) - 1) // stride * stride + 1
            raise ValueError(f"got {len(frames)} frames; this model takes {stride} n + 1: {fitting} for example")

    # --- fine-tuning --------------------------------------------------------------------------------------------------

    def fine_tune(
        self,
        frames: Tensor,
        token: str = "sks",
        settings: FineTuning = FineTuning(),
        callback: Callback | None = None,
        checkpoints: Path | None = None,
    ) -> Tuned:
        """Train adapters on a clip, or with alpha = 0 on a set of pictures. frames: [T or M, 3, H, W] in 0..1.

        token: the prompt of the fine-tuning, the rare word alone. checkpoints: a folder, see `finetuning.fine_tune`.
        The network is as before afterwards. Raises ValueError for bad input, before anything is trained.
        """
        if not token.strip():
            raise ValueError("the token is empty: give a rare word such as sks")
        if settings.alpha > 0:
            self.check_clip(frames)
        else:
            check_frames(frames, self.family.multiple, "set of pictures")
        family, context = self.family, self.family.embed([token])
        subject = Subject(
            network=family.network,
            video=lambda x, sigma: family.denoise(x, sigma, context),
            pictures=lambda x, sigma: family.denoise(x, sigma, context, as_pictures=True),
            clip=family.encode_clip(frames) if settings.alpha > 0 else None,
            frames=family.encode_pictures(frames) if settings.alpha < 1 else None,
            path=family.path,
            sigma_range=family.sigma_range,
        )
        return fine_tune(subject, settings, callback, checkpoints)

    # --- sampling -----------------------------------------------------------------------------------------------------

    def _sample(
        self, x: Tensor, sigmas: Tensor, prompt: str, settings: DreamixSettings, callback: Callback | None
    ) -> tuple[Tensor, int]:
        family = self.family
        context, empty = family.embed([prompt]), family.embed([settings.negative])
        model = GuidedDenoiser(
            lambda x, sigma: family.denoise(x, sigma, context),
            lambda x, sigma: family.denoise(x, sigma, empty),
            settings.guidance,
            settings.guidance,
        )
        x = sample_euler(model, x.to(family.device), sigmas, callback=callback, disable=True)
        return x, model.evaluations

    def _restore(
        self, clip: Tensor, s: float, prompt: str, settings: DreamixSettings, seed: int, callback: Callback | None
    ) -> tuple[Tensor, int]:
        """From z at time s to a clip of latents. At s = 1 the clip tells its shape alone."""
        noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(seed)).to(clip)
        sigmas = sigmas_from(self.family.schedule(settings.steps), s, self.family.path)
        if len(sigmas) < 2:
            return clip, 0
        first = float(sigmas[0])
        if s < 1:
            x = add_noise(clip, noise, first, self.family.path)
        else:
            x = noise if self.family.path.kind == "flow" else noise * (1 + first**2) ** 0.5
        return self._sample(x, sigmas, prompt, settings, callback)

    def edit(
        self,
        frames: Tensor,
        prompt: str,
        settings: DreamixSettings = DreamixSettings(),
        seed: int = 0,
        lora: State | None = None,
        callback: Callback | None = None,
    ) -> DreamixResult:
        """Corrupt a clip and restore it by a prompt, with the adapters of a fine-tuning where there are any.

        frames: [T, 3, H, W] in 0..1; at s = 1 only its shape counts. prompt: without the token, which is put into it
        where there are adapters. Raises ValueError for bad input.
        """
        self.check_clip(frames)
        prompt = with_token(prompt, settings.token, settings.place) if lora is not None else prompt
        adapters = from_state(self.family.network, lora) if lora is not None else None
        clip = self.family.encode_clip(
            degrade(frames, settings.factor, settings.size, settings.stride, settings.temporal)
        )
        if adapters is not None:
            adapters.attach()
        try:
            clip, calls = self._restore(clip, settings.s, prompt, settings, seed, callback)
            first = result = self.family.decode(clip)
            if settings.second_pass > 0:
                larger = self.family.encode_clip(self._enlarge(first, settings.scale))
                clip, more = self._restore(larger, settings.second_pass, prompt, settings, seed + 1, callback)
                result, calls = self.family.decode(clip), calls + more
        finally:
            if adapters is not None:
                adapters.detach()
        return DreamixResult(result, first, None, calls)

    def _enlarge(self, frames: Tensor, scale: float) -> Tensor:
        """The cascade's super-resolution in a latent world begins here: bicubic, to sides that the model takes."""
        multiple = self.family.multiple
        size = [max(multiple, round(side * scale / multiple) * multiple) for side in frames.shape[-2:]]
        if size == list(frames.shape[-2:]):
            return frames
        return interpolate(frames, size, mode="bicubic", align_corners=False).clamp(0, 1)

    # --- the paper's applications -------------------------------------------------------------------------------------

    def __call__(
        self,
        frames: Tensor,
        prompt: str,
        settings: DreamixSettings = DreamixSettings(),
        tuning: FineTuning = FineTuning(),
        seed: int = 0,
        callback: Callback | None = None,
        checkpoints: Path | None = None,
    ) -> DreamixResult:
        """Tune on the clip (not at all with 0 steps), then edit it."""
        self.check_clip(frames)
        with_token(prompt, settings.token, settings.place)  # these raise before the long work
        coarse_size(*frames.shape[2:], settings.factor, settings.size)
        degrade_time(frames, settings.stride, settings.temporal)
        tuned = self.fine_tune(frames, settings.token, tuning, callback, checkpoints) if tuning.steps else None
        result = self.edit(frames, prompt, settings, seed, tuned.lora if tuned else None, callback)
        return replace(result, tuned=tuned)

    def animate(
        self,
        picture: Tensor,
        frames: int,
        prompt: str,
        end: View = View(),
        settings: DreamixSettings = DreamixSettings(),
        tuning: FineTuning = FineTuning(alpha=0.0),
        seed: int = 0,
        callback: Callback | None = None,
        checkpoints: Path | None = None,
        **coarse: Any,
    ) -> DreamixResult:
        """Animate a picture [3, H, W]: a coarse video of it, tuned on as frames alone, is the clip that is edited.

        coarse: start, fill and easing of `coarse_video`. Raises ValueError for an alpha that is not 0, as the paper has
        it for this task (a coarse video's motion is not to be learnt).
        """
        if tuning.alpha != 0:
            raise ValueError(f"alpha is {tuning.alpha}; a picture is animated with 0, its coarse motion is not learnt")
        video = coarse_video(picture, frames, end, **coarse)
        return self(video, prompt, settings, tuning, seed, callback, checkpoints)

    def subject(
        self,
        pictures: Tensor,
        frames: int,
        prompt: str,
        settings: DreamixSettings = DreamixSettings(s=1.0),
        tuning: FineTuning = FineTuning(alpha=0.0),
        seed: int = 0,
        callback: Callback | None = None,
        checkpoints: Path | None = None,
    ) -> DreamixResult:
        """A new clip of the subject of a set of pictures [M, 3, H, W], from pure noise, with temporal layers active."""
        if tuning.alpha != 0 or settings.s != 1:
            raise ValueError(
                f"got alpha {tuning.alpha} and s {settings.s}; a subject is put in a new clip with 0 and 1"
            )
        with_token(prompt, settings.token, settings.place)
        tuned = self.fine_tune(pictures, settings.token, tuning, callback, checkpoints) if tuning.steps else None
        blank = torch.zeros(frames, *pictures.shape[1:])
        result = self.edit(blank, prompt, settings, seed, tuned.lora if tuned else None, callback)
        return replace(result, tuned=tuned)
