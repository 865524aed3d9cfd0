"""EI² without a host: the whole job on diffusers' Stable Diffusion (arXiv 2305.17431)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..denoiser import truncate_sigmas
from ..video import check_frames
from ..videoshop.denoising import GuidedDenoiser, sample_euler
from ..videoshop.inversion import GUESSES, sample_edm_inversion
from .covariate_shift import Probe, Reading
from .family import TextToImage, load_family
from .inflation import Inflation, InflationSettings, chosen_blocks, inflated, transformer_blocks
from .tuning import OneShot, Queries, Subject, one_shot_tune
from .weights import EI2Weights, query_layers

Callback = Callable[[dict[str, Any]], None]
EI2_GUESSES = tuple(guess for guess in GUESSES if guess != "random")  # nothing is drawn in an edit


@dataclass(frozen=True)
class EI2Settings:
    """How a clip is edited.

    steps: of the inversion and of the way back (50 in Tune-A-Video). guidance: classifier-free, of the way back alone;
    1 is none (12.5 in Tune-A-Video; ours suits the embedded model). strength: 0..1, how far the clip is rewound; 1 to
    pure noise, as in the paper. guess: of the inversion, one of EI2_GUESSES (`videoshop.inversion`); "current" is plain
    DDIM inversion, which the paper has. refine: fixed-point iterations a step of the inversion. place: the blocks that
    are inflated (`inflation.PLACES`); patch_strength: 0..1, of the inflation; 0 is the model as it was.
    """

    steps: int = 50
    guidance: float = 7.5
    negative: str = ""
    strength: float = 1.0
    guess: str = "current"
    refine: int = 0
    place: str = "all"
    patch_strength: float = 1.0

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of its range."""
        if self.steps < 1:
            raise ValueError(f"got {self.steps} steps; at least 1 is needed")
        if not 0 < self.strength <= 1:
            raise ValueError(f"the strength is {self.strength}; it must be above 0 and at most 1")
        if not 0 <= self.patch_strength <= 1:
            raise ValueError(f"the strength of the patch is {self.patch_strength}; it must be 0 (none) to 1")
        if self.guess not in EI2_GUESSES:
            raise ValueError(f'the guess is "{self.guess}"; it must be one of {", ".join(EI2_GUESSES)}')
        if self.refine < 0:
            raise ValueError(f"got {self.refine} refinements; they must be 0 or more")
        chosen_blocks([], self.place)


@dataclass(frozen=True)
class EI2Result:
    """The edited clip [T, 3, H, W] in 0..1, the weights and losses of the tuning, and the network calls of the edit."""

    frames: Tensor
    weights: EI2Weights | None
    losses: list[float]
    evaluations: int


class EI2Pipeline:
    """Tune a text-to-image model on a clip and its caption, then edit the clip by another prompt.

    family: the model (`family`). All randomness is drawn on the CPU from seeds: equal arguments give equal results.
    """

    def __init__(self, family: TextToImage):
        self.family = family

    @classmethod
    def from_pretrained(
        cls, path: str | Path, torch_dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> EI2Pipeline:
        """Load a StableDiffusionPipeline in diffusers' layout. ValueError for a model of another kind."""
        return cls(load_family(path, torch_dtype, device))

    def check_clip(self, frames: Tensor) -> None:
        """ValueError unless frames are a clip that the model takes: [T >= 2, 3, H, W] in 0..1."""
        check_frames(frames, self.family.multiple, least=2)

    # --- tuning -------------------------------------------------------------------------------------------------------

    def tune(
        self,
        frames: Tensor,
        caption: str,
        settings: OneShot = OneShot(),
        inflation: InflationSettings = InflationSettings(),
        callback: Callback | None = None,
        checkpoints: Path | None = None,
    ) -> tuple[EI2Weights, list[float]]:
        """One-shot tuning on a clip [T, 3, H, W] in 0..1 and its caption; the weights and the loss of every step.

        The network is as before afterwards. Raises ValueError for bad input, before anything is trained.
        """
        self.check_clip(frames)
        if not caption.strip():
            raise ValueError("the caption is empty: say what the clip shows, the edited prompt differs from it")
        family, context = self.family, self.family.embed([caption])
        subject = Subject(
            network=family.network,
            denoise=lambda x, sigma: family.denoise(x, sigma, context),
            clip=family.encode_clip(frames),
            sigmas=family.times.log_sigmas.exp().float(),
            inflate=lambda inflation: inflated(family.network, inflation, len(frames)),
            path=family.path,
            caption=caption,
        )
        return one_shot_tune(subject, settings, inflation, callback, checkpoints)

    # --- editing ------------------------------------------------------------------------------------------------------

    @contextmanager
    def patched(
        self,
        frames: int,
        weights: EI2Weights | None,
        settings: EI2Settings,
        inflation: InflationSettings,
        probe: Probe | None = None,
    ) -> Iterator[None]:
        """Inside, the model is inflated with weights, or with what `inflation` can do without any (its attention)."""
        network = self.family.network
        if settings.patch_strength == 0:
            yield
            return
        chosen = chosen_blocks(list(transformer_blocks(network)), settings.place)
        temporal = weights.temporal(network) if weights is not None else {}
        place = {"device": self.family.device, "dtype": network.dtype}
        temporal = {name: module.to(**place) for name, module in temporal.items() if name in chosen}
        inflation = weights.settings if weights is not None else inflation
        observer = probe.observer if probe is not None else None
        patch = Inflation(inflation, chosen, temporal, settings.patch_strength, observer)
        queries = nullcontext()
        if weights is not None:
            queries = Queries(query_layers(network)).requires_grad_(False)
            queries.load({name: settings.patch_strength * diff for name, diff in weights.queries(chosen).items()})
        with queries, inflated(network, patch, frames):
            yield

    @torch.no_grad()
    def edit(
        self,
        frames: Tensor,
        prompt: str,
        settings: EI2Settings = EI2Settings(),
        weights: EI2Weights | None = None,
        inflation: InflationSettings = InflationSettings(temporal="none"),
        callback: Callback | None = None,
    ) -> EI2Result:
        """Invert a clip with the empty prompt and without guidance, then sample it back by the prompt.

        frames: [T, 3, H, W] in 0..1. weights: of a tuning; without them the model gets `inflation`'s attention alone,
        untrained. Raises ValueError for bad input.
        """
        self.check_clip(frames)
        family = self.family
        sigmas = truncate_sigmas(family.schedule(settings.steps), settings.strength)
        context, empty = family.embed([prompt]), family.embed([settings.negative])
        plain = empty if not settings.negative else family.embed([""])
        with self.patched(len(frames), weights, settings, inflation):
            rewinding = GuidedDenoiser(lambda x, sigma: family.denoise(x, sigma, plain), None)
            latents = sample_edm_inversion(
                rewinding,
                family.encode_clip(frames),
                sigmas.flip(0),
                callback=callback,
                disable=True,
                path=family.path,
                guess_above=settings.guess,
                guess_below=settings.guess,
                refine=settings.refine,
            )
            model = GuidedDenoiser(
                lambda x, sigma: family.denoise(x, sigma, context),
                lambda x, sigma: family.denoise(x, sigma, empty),
                settings.guidance,
                settings.guidance,
            )
            latents = sample_euler(model, latents, sigmas, callback=callback, disable=True)
        return EI2Result(family.decode(latents), weights, [], rewinding.evaluations + model.evaluations)

    @torch.no_grad()
    def covariate_shift(
        self,
        frames: Tensor,
        prompt: str,
        weights: EI2Weights,
        times: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
        seed: int = 0,
    ) -> list[Reading]:
        """The shift of every temporal module on a clip under a prompt, at some shares of the training times."""
        self.check_clip(frames)
        family, context, probe = self.family, self.family.embed([prompt]), Probe()
        clean = family.encode_clip(frames)
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed)).to(clean)
        levels = family.times.log_sigmas.exp().float()
        with self.patched(len(frames), weights, EI2Settings(), weights.settings, probe):
            for time in times:
                probe.sigma = float(levels[round(time * (len(levels) - 1))])
                sigma = torch.full((len(clean),), probe.sigma, device=clean.device)
                family.denoise(clean + probe.sigma * noise, sigma, context)
        return probe.readings

    def __call__(
        self,
        frames: Tensor,
        caption: str,
        prompt: str,
        settings: EI2Settings = EI2Settings(),
        tuning: OneShot = OneShot(),
        inflation: InflationSettings = InflationSettings(),
        callback: Callback | None = None,
        checkpoints: Path | None = None,
    ) -> EI2Result:
        """Tune on the clip (not at all with 0 steps), then edit it."""
        self.check_clip(frames)
        if tuning.steps == 0:
            return self.edit(frames, prompt, settings, None, replace(inflation, temporal="none"), callback)
        weights, losses = self.tune(frames, caption, tuning, inflation, callback, checkpoints)
        return replace(self.edit(frames, prompt, settings, weights, callback=callback), losses=losses)
