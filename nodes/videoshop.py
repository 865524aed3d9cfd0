"""The nodes of Videoshop (arXiv 2403.14617) that rewind a clip to noise."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..pipelines.denoiser import truncate_sigmas
from ..pipelines.videoshop.inversion import GUESSES
from ..pipelines.videoshop.parts import AT_ONCE, Recorder
from ..pipelines.videoshop.settings import DEFAULT
from ..pipelines.videoshop.trajectory import DTYPES
from .host import checks, costs, parts, sampling
from .host.noise import InvertedNoise, random_direction
from .host.schema import ADVANCED, InversionType, Schema
from .preparation import CATEGORY, NORMALISATION, ORIGINAL

logger = logging.getLogger(__name__)


def _guess_inputs() -> list[io.Input]:
    """The inputs that say how a step of the inversion guesses, the same for the node and the SAMPLER."""
    return [
        io.Combo.Input(
            "guess_above",
            options=list(GUESSES),
            default=DEFAULT.guess_above,
            tooltip='What the network is shown above the threshold. "extrapolation" carries the noise found so far '
            'on (the paper), "last_direction" carries the last step on (returns a clip best), "random" shows '
            'fresh noise, "current" shows the lower level itself (naive inversion). The default edits the validation '
            "clips of the embedded model best.",
        ),
        io.Combo.Input(
            "guess_below",
            options=list(GUESSES),
            default=DEFAULT.guess_below,
            tooltip='The same below the threshold, where little noise has been found yet. "random" is the paper\'s '
            "choice.",
        ),
        io.Float.Input(
            "threshold",
            default=DEFAULT.threshold,
            min=0.0,
            max=1000.0,
            step=0.01,
            tooltip="Noise-to-signal ratio at which the second guess hands over to the first. Raise it to use "
            "guess_below longer, lower it to use guess_above earlier; 1 (as much noise as signal) is what the "
            "authors' code takes.",
        ),
        io.Int.Input(
            "refine",
            default=DEFAULT.refine,
            min=0,
            max=50,
            tooltip="Most repetitions of a step with its own result as the guess. Higher returns the clip more "
            "exactly and costs one network call each, fewer where it converges early; 0 is the paper's single call.",
        ),
    ]


def _damping_input() -> io.Input:
    return io.Float.Input(
        "damping",
        default=DEFAULT.damping,
        min=0.0,
        max=0.95,
        step=0.05,
        optional=True,
        extra_dict=ADVANCED,
        tooltip="Share of the old value that a repetition (refine) keeps. Higher is steadier and slower, 0 moves all "
        "the way and may swing to and fro at medium noise; 0.5 converged on every model tried.",
    )


def inversion_outputs() -> list[io.Output]:
    return [
        io.Latent.Output(
            "latent",
            tooltip="The inverted clip, at the first of the SIGMAS. A sampler with DisableNoise takes it for "
            "SVD and Stable Diffusion; on every family the NOISE does.",
        ),
        io.Sigmas.Output("sigmas", tooltip="The noise levels to come back on. Other ones do not return the clip."),
        io.Noise.Output(
            "noise",
            tooltip="Starts SamplerCustomAdvanced exactly at the inverted clip, for every family of models. "
            "Connect an EMPTY latent of the clip's size beside it, and the euler sampler (VOIDSampler on CogVideoX).",
        ),
        InversionType.Output("inversion", tooltip="All of it in one: connect to SVD Denoise and the checks."),
    ]


def _original(model: Any, latent: dict[str, Any], samples: Tensor) -> Tensor:
    """The clip in the VAE's space as it was before Latent Normalize, on the CPU.

    What that node kept is it to the bit. Where the LATENT was changed since, the normalisation is undone instead.
    """
    normalisation = latent.get(NORMALISATION)
    if normalisation is None:
        return samples.cpu()
    to_model, to_vae = model.model.process_latent_in, model.model.process_latent_out
    kept = latent.get(ORIGINAL)
    if kept is not None and kept.shape == samples.shape:
        again = to_vae(normalisation.apply(to_model(kept)))
        if torch.allclose(again.to(samples), samples, rtol=1e-4, atol=1e-4):
            return kept.cpu()
    return to_vae(normalisation.undo(to_model(samples.float()))).cpu()


class EDMInversion(io.ComfyNode):
    """A clip back to the noise that would make it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="RewindEDMInversion",
            display_name="EDM Inversion with Noise Extrapolation",
            category=CATEGORY,
            description="Rewinds a clip to the noise from which the model would make it again (Videoshop). Works on "
            "every native model that samples by noise levels or flow: Stable Video Diffusion, Stable Diffusion, Wan, "
            "LTXV, Hunyuan Video and others. LoRA, ControlNet and context windows on the MODEL apply. A noise_mask "
            "in the LATENT does not: the whole clip is inverted.",
            search_aliases=["unsample", "unsampler", "DDIM inversion", "noise inversion", "invert"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL that will also play the clip again."),
                io.Conditioning.Input("positive", tooltip="What the SOURCE clip shows; for SVD source_positive."),
                io.Latent.Input(
                    "latent",
                    tooltip="The VAE-encoded source clip, best through Latent Normalize. Its noise_mask is ignored.",
                ),
                io.Sigmas.Input(
                    "sigmas",
                    tooltip="Noise levels as a scheduler gives them, falling to 0 (never through FlipSigmas); for "
                    "SVD BasicScheduler with karras. More steps return the clip more exactly and take longer; 25 is "
                    "what the authors' code takes.",
                ),
                io.Float.Input(
                    "strength",
                    default=DEFAULT.strength,
                    min=0.05,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the steps to rewind. Lower keeps more of the source and takes fewer steps, "
                    "higher lets the edit change more. The default edits the validation clips of the embedded model "
                    "best.",
                ),
                *_guess_inputs(),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip='Draws the random direction of the guess "random"; another seed is another variant of '
                    "the result.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="Needed only with cfg above 1.",
                ),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=1.0,
                    max=100.0,
                    step=0.1,
                    optional=True,
                    extra_dict=ADVANCED,
                    tooltip="Guidance during the inversion. Above 1 each step costs twice as much and returns the clip "
                    "less exactly; 1, no guidance, is what the authors' code takes.",
                ),
                _damping_input(),
                io.Combo.Input(
                    "trajectory_dtype",
                    options=list(DTYPES),
                    default="float32",
                    optional=True,
                    extra_dict=ADVANCED,
                    tooltip="Precision in which the clip at every noise level is kept in main memory, and saved. "
                    "float16 and bfloat16 take half, float16 is the closer one; what starts the way back is "
                    "exact in any.",
                ),
                io.Int.Input(
                    "frames_at_once",
                    default=0,
                    min=0,
                    max=4096,
                    optional=True,
                    tooltip="For Stable Video Diffusion and a clip longer than the model: rewound, and by SVD Denoise "
                    "played, in parts of at most so many frames, each of which goes on from the last frame of the one "
                    "before; 14 is what the model was trained on. 0 takes the whole clip at once.",
                ),
            ],
            outputs=inversion_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: list,
        latent: dict[str, Any],
        sigmas: Tensor,
        strength: float,
        guess_above: str,
        guess_below: str,
        threshold: float,
        refine: int,
        seed: int,
        negative: list | None = None,
        cfg: float = 1.0,
        damping: float = DEFAULT.damping,
        trajectory_dtype: str = "float32",
        frames_at_once: int = 0,
    ) -> io.NodeOutput:
        samples = checks.check_latent(model, latent)
        found = parts.check_parts(model, samples, frames_at_once)
        model_sampling = model.get_model_object("model_sampling")
        path = sampling.noise_path(model_sampling)
        sigmas = truncate_sigmas(sampling.schedule(sigmas, model_sampling), strength)
        checks.check_conditioning(model, positive, samples, "positive")
        if cfg > 1 and negative is None:
            raise ValueError(f"cfg is {cfg:g} but negative is not connected: connect it, or set cfg to 1")
        if cfg > 1:
            checks.check_conditioning(model, negative, samples, "negative")
        clean, normalisation = model.model.process_latent_in(samples.float().cpu()), latent.get(NORMALISATION)
        source = clean if normalisation is None else normalisation.undo(clean)
        if "noise_mask" in latent:
            logger.warning("EDM Inversion: the noise_mask in the LATENT is not applied, the whole clip is inverted")

        options = {
            "guess_above": guess_above,
            "guess_below": guess_below,
            "threshold": threshold,
            "refine": refine,
            "damping": damping,
        }
        dtype, steps = DTYPES[trajectory_dtype], len(sigmas) - 1
        guider = sampling.guider(model, positive, negative, cfg)
        costs.tell_inversion(cls.hidden.unique_id, guider, samples, steps, refine, cfg > 1, dtype, found)
        original, noise = _original(model, latent, samples), random_direction(samples, seed)
        record, rewound = Recorder(clean, sigmas, found, dtype), []
        for number, (start, stop) in enumerate(found):
            if number:
                told = parts.told_of(positive, original[start : start + 1])
                guider = sampling.guider(model, told, negative, cfg)
            sampler = sampling.inversion_sampler(record.of(number), **options)
            part = samples[start:stop], noise[: stop - start]  # the same direction for all parts
            result = sampling.sample(guider, sampler, sigmas, *part, seed, (number, len(found)))
            rewound.append(result[1:] if number else result)

        settings = {**options, "strength": strength, "seed": seed, "cfg": cfg, "path": path}
        inversion = record.inversion(
            sigmas=sigmas.cpu(),
            normalisation=normalisation,
            settings=settings | ({AT_ONCE: frames_at_once} if len(found) > 1 else {}),
            source=source,
            original=original,
            model=sampling.model_fingerprint(model),
        )
        # A mask would make the next sampler paste the inverted clip back; its normalisation is the inversion's now.
        kept = {name: value for name, value in latent.items() if name not in ("noise_mask", NORMALISATION, ORIGINAL)}
        resume = InvertedNoise(inversion, model_sampling)
        return io.NodeOutput({**kept, "samples": torch.cat(rewound)}, inversion.sigmas, resume, inversion)


class EDMInversionSampler(io.ComfyNode):
    """The inversion as a SAMPLER for the host's own SamplerCustomAdvanced."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="RewindEDMInversionSampler",
            display_name="EDM Inversion Sampler",
            category=CATEGORY,
            description="The inversion as a SAMPLER for SamplerCustomAdvanced: give it the clip as LATENT, a "
            "scheduler's SIGMAS as they are, any GUIDER, and RandomNoise, which is the random direction. Its output "
            "is the clip rewound to the first of the SIGMAS. A noise_mask in the LATENT is not applied.",
            search_aliases=["unsample", "unsampler", "inversion sampler"],
            inputs=[*_guess_inputs(), _damping_input()],
            outputs=[
                io.Sampler.Output("sampler", tooltip="Connect to SamplerCustomAdvanced; it runs from clean to noise.")
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        guess_above: str,
        guess_below: str,
        threshold: float,
        refine: int,
        damping: float = DEFAULT.damping,
    ) -> io.NodeOutput:
        return io.NodeOutput(
            sampling.inversion_sampler(
                before=partial(costs.tell_sampling, cls.hidden.unique_id, "EDM Inversion Sampler", refine),
                guess_above=guess_above,
                guess_below=guess_below,
                threshold=threshold,
                refine=refine,
                damping=damping,
            )
        )
