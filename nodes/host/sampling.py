"""One adapter between the host's sampling and the samplers of `pipelines`.

The host's CFGGuider loads the model, prepares the conditions, scales the latent to the model's space and back, and
calls `sample` of a `comfy.samplers.Sampler`; LoRA, ControlNet, context windows, previews and Cancel all hang on that.
So every sampling of this pack goes through `sample` below, and every method through `DirectSampler`.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.model_sampling
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ...pipelines.denoiser import COSMOS, DDPM, EDM, EPS, FLOW, NoisePath
from ...pipelines.fingerprint import Fingerprint, fingerprint
from ...pipelines.videoshop.denoising import frame_guidance, guided, sample_euler
from ...pipelines.videoshop.inversion import FLOW_END, Inversion, sample_edm_inversion
from .checks import is_svd, latent_axes

logger = logging.getLogger(__name__)

AUTOMATIC = "automatic"  # a scheduler that is chosen by the kind of model
Step = dict[str, Any]  # what a sampler of `pipelines` tells after each step
Before = Callable[[comfy.samplers.CFGGuider, Tensor, Tensor], None]  # told of a guider, the latent and the levels


def noise_path(model_sampling: torch.nn.Module) -> NoisePath:
    """How the model mixes signal and noise, told by how its `model_sampling` makes a denoised estimate.

    ValueError for every other kind: image-to-image models have no noise, distilled ones (LCM) mix the input in.
    """
    classes, own = comfy.model_sampling, type(model_sampling).calculate_denoised
    if own in (classes.EDM.calculate_denoised, classes.V_PREDICTION.calculate_denoised):  # alike but for the sign of F
        return EDM(float(model_sampling.sigma_data))
    known = {classes.EPS: EPS, classes.CONST: FLOW, classes.COSMOS_RFLOW: COSMOS}
    if hasattr(classes, "V_PREDICTION_DDPM"):  # CogVideoX, which older hosts do not have
        known[classes.V_PREDICTION_DDPM] = DDPM
    for kind, path in known.items():
        if own is kind.calculate_denoised:
            return path
    # The host mixes a class of levels and one of these into a nameless class: the second is what a user may know.
    mixed, *bases = (base for base in type(model_sampling).__mro__ if hasattr(base, "calculate_denoised"))
    kind = mixed if "calculate_denoised" in vars(mixed) else bases[0]
    raise ValueError(
        f"this model samples as {kind.__name__}, which Rewind cannot use (image-to-image and distilled models): use a "
        "model of another family, such as Stable Video Diffusion, Stable Diffusion or Wan"
    )


def plainly_guided(guider: comfy.samplers.CFGGuider) -> bool:
    """Whether a guider's guidance is by `cfg` alone; one with a prediction of its own (DualCFGGuider) has another."""
    return type(guider).predict_noise is comfy.samplers.CFGGuider.predict_noise


def without_negative(guider: comfy.samplers.CFGGuider, options: dict[str, Any]) -> bool:
    """Whether the host leaves out the negative side, as it does at guidance 1. options: of the model."""
    if not plainly_guided(guider) or options.get("disable_cfg1_optimization", False):
        return False
    return math.isclose(guider.cfg, 1.0)


def fit_windows(model: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a MODEL with context windows that fit Stable Video Diffusion.

    Newer hosts add the clip's first frame to every later window (`causal_window_fix`), for VAEs that pack frames, but
    do not tell Stable Video Diffusion of it, which then fails. Its own frames are not packed.
    """
    handler = options.get("context_handler")
    if not is_svd(model) or not getattr(handler, "causal_window_fix", False):
        return options
    handler = copy.copy(handler)
    handler.causal_window_fix = False
    return {**options, "context_handler": handler}


class DirectSampler(comfy.samplers.Sampler):
    """A SAMPLER that runs a function of `pipelines` from the latent as it is.

    The host's KSAMPLER scales noise onto the latent, pastes back what a mask protects and, for flow models, divides by
    1 - sigma at the end: on the way to an inverted latent and back all three are wrong.

    function: (denoiser, x, sigmas, noise, path, extra_args, callback) -> x, in model space, sigmas descending.
    on_step gets each step's dict; before is called when the model and its levels are checked,
    ahead of the first network call.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        on_step: Callable[[Step], None] | None = None,
        before: Before | None = None,
    ):
        self.function = function
        self.on_step = on_step
        self.before = before

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Callable | None,
        noise: Tensor,
        latent_image: Tensor,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        if denoise_mask is not None:
            # Wan 2.2 TI2V and LTXV hand it to the network, which then takes those frames for clean at every level.
            if any("denoise_mask" in cond["model_conds"] for conds in model_wrap.conds.values() for cond in conds):
                raise ValueError(
                    "the LATENT has a noise_mask, by which this MODEL takes frames for clean that are noise here: "
                    "connect the latent of VAE Encode, or use EDM Inversion, which leaves the mask out"
                )
            logger.warning("the noise_mask in the LATENT is not applied: the whole clip is inverted")
        model_sampling = model_wrap.inner_model.model_sampling
        path = noise_path(model_sampling)
        options = fit_windows(model_wrap.model_patcher, extra_args.get("model_options", {}))
        # A guidance function such as VideoLinearCFGGuidance's would mix in zeros for the negative side.
        if without_negative(model_wrap, options):
            options.pop("sampler_cfg_function", None)
        levels = schedule(sigmas, model_sampling)
        if self.before is not None:
            self.before(model_wrap, latent_image, levels)

        def denoiser(x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
            # The progress bar asks too, but not at every call.
            comfy.model_management.throw_exception_if_processing_interrupted()
            return model_wrap(path.shown(x, sigma), sigma, **kwargs)

        def report(step: Step) -> None:
            if self.on_step is not None:
                self.on_step(step)
            if callback is not None:
                callback(step["i"], step["denoised"], step["x"], len(sigmas) - 1)

        return self.function(
            denoiser,
            latent_image,
            levels,
            noise=noise,
            path=path,
            extra_args={**extra_args, "model_options": options},
            callback=report,
        )


def inversion_sampler(
    on_step: Callable[[Step], None] | None = None, before: Before | None = None, **options: Any
) -> DirectSampler:
    """EDM inversion as a SAMPLER; the noise it is given is the random direction. options: see sample_edm_inversion."""

    def invert(denoiser, x, sigmas, *, noise, path, extra_args, callback):
        if "random" in (options["guess_above"], options["guess_below"]) and not torch.count_nonzero(noise):
            raise ValueError(
                'the guess "random" needs a direction: connect RandomNoise instead of DisableNoise, or choose '
                "another guess"
            )
        return sample_edm_inversion(
            denoiser, x, sigmas.flip(0), extra_args, callback, disable=True, path=path, noise=noise, **options
        )

    return DirectSampler(invert, on_step, before)


def euler_sampler(
    finish: Callable[[Tensor], Tensor] | None = None,
    put_back: Callable[[Tensor, float], Tensor] | None = None,
    before: Before | None = None,
) -> DirectSampler:
    """The Euler sampler that the inversion inverts, from the latent as it is; `finish` is applied to its result.

    put_back: see `sample_euler`.
    """

    def denoise(denoiser, x, sigmas, *, noise, path, extra_args, callback):
        x = sample_euler(denoiser, x, sigmas, extra_args, callback, disable=True, put_back=put_back)
        return x if finish is None else finish(x)

    return DirectSampler(denoise, before=before)


class FrameGuider(comfy.samplers.CFGGuider):
    """Classifier-free guidance that runs linearly from the first frame to the last, inside an interval of noise levels.

    Where it would change nothing, the negative side is not computed. It replaces a guidance function on the MODEL.
    """

    def __init__(self, model: Any):
        super().__init__(model)
        self.model_options = fit_windows(model, self.model_options)

    def set_guidance(self, first: float, last: float, interval: tuple[float, float] = (0.0, math.inf)) -> None:
        self.first, self.last, self.interval = first, last, interval

    def predict_noise(
        self, x: Tensor, timestep: Tensor, model_options: dict[str, Any], seed: int | None = None
    ) -> Tensor:
        low, high = self.interval
        needed = not (self.first == self.last == 1.0) and low <= float(timestep.max()) <= high

        def mix(args: dict[str, Any]) -> Tensor:
            denoised = args["cond_denoised"]
            weights = frame_guidance(self.first, self.last, frame_count(denoised)).to(denoised)
            return args["input"] - guided(denoised, args["uncond_denoised"], weights)

        options = {name: value for name, value in model_options.items() if name != "sampler_cfg_function"}
        if needed:
            options |= {"sampler_cfg_function": mix, "disable_cfg1_optimization": True}
        negative, positive = self.conds["negative"], self.conds["positive"]
        scale = max(self.first, self.last) if needed else 1.0
        return comfy.samplers.sampling_function(
            self.inner_model,
            x,
            timestep,
            negative if needed else None,
            positive,
            scale,
            model_options=options,
            seed=seed,
        )


def frame_count(x: Tensor) -> int:
    """Frames of a clip in latent space: the batch of a 4-D latent [T, C, h, w], the third axis of [B, C, T, h, w]."""
    return x.shape[0] if x.ndim == 4 else x.shape[2]


def sample(
    guider: comfy.samplers.CFGGuider,
    sampler: DirectSampler,
    sigmas: Tensor,
    samples: Tensor,
    noise: Tensor,
    seed: int,
    part: tuple[int, int] = (0, 1),
) -> Tensor:
    """Sample through the host's guider, with its previews and progress. samples and result are in the VAE's space.

    part: its number and how many there are, for one progress bar over all of them.
    """
    steps, (number, parts) = len(sigmas) - 1, part
    show = latent_preview.prepare_callback(guider.model_patcher, steps * parts)

    def callback(step: int, x0: Tensor, x: Tensor, total_steps: int) -> None:
        show(number * steps + step, x0, x, steps * parts)

    disable = not comfy.utils.PROGRESS_BAR_ENABLED
    result = guider.sample(noise, samples, sampler, sigmas, callback=callback, disable_pbar=disable, seed=seed)
    return result.to(comfy.model_management.intermediate_device())


def guider(model: Any, positive: list, negative: list | None = None, cfg: float = 1.0) -> comfy.samplers.CFGGuider:
    """The host's guider with its conditions set; without a negative one it is never guided."""
    made = comfy.samplers.CFGGuider(model)
    made.model_options = fit_windows(model, made.model_options)
    made.inner_set_conds({"positive": positive} if negative is None else {"positive": positive, "negative": negative})
    made.set_cfg(cfg)
    return made


def model_fingerprint(model: Any) -> Fingerprint:
    """What tells a MODEL's own weights from others', without the patches on it (a LoRA), which the host puts in place
    while it is loaded."""
    weights = model.model_state_dict("diffusion_model.")
    own = {name: kept.weight for name, kept in model.backup.items() if name in weights}
    return fingerprint(type(model.model).__name__, {**weights, **own})


def state_of(model: Any, inversion: Inversion) -> Tensor:
    """The inverted latent in the VAE's space, as the guider takes it; ValueError for another model."""
    dimensions, channels = latent_axes(model)
    if inversion.latent.ndim != dimensions or inversion.latent.shape[1] != channels:
        raise ValueError(
            f"the inversion holds a latent of shape {tuple(inversion.latent.shape)}, this model takes {channels} "
            f"channels in {dimensions} axes: connect the MODEL that made the inversion"
        )
    if inversion.model is not None:
        inversion.model.check(model_fingerprint(model), "this inversion")
    schedule(inversion.sigmas, model.get_model_object("model_sampling"))
    return model.model.process_latent_out(inversion.latent.float())


def schedulers() -> list[str]:
    """What can be chosen as the scheduler of a node: one that fits the model, and the host's."""
    return [AUTOMATIC, *comfy.samplers.SCHEDULER_NAMES]


def noise_levels(model: Any, scheduler: str, steps: int) -> Tensor:
    """The whole schedule of a MODEL, [steps + 1], descending to 0.

    scheduler: one of `schedulers`. "automatic" is karras, and for flow models simple, which keeps to their own
    shift.
    """
    model_sampling = model.get_model_object("model_sampling")
    if scheduler == AUTOMATIC:
        scheduler = "simple" if noise_path(model_sampling).kind == "flow" else "karras"
    return comfy.samplers.calculate_sigmas(model_sampling, scheduler, steps).cpu()


def schedule(sigmas: Tensor, model_sampling: torch.nn.Module) -> Tensor:
    """The SIGMAS in descending order, ending in 0; ValueError where they do not fit the model or cannot be inverted."""
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(f"got SIGMAS of shape {tuple(sigmas.shape)}: connect a scheduler with at least 1 step")
    if not torch.isfinite(sigmas).all():
        raise ValueError("the SIGMAS hold NaN or infinite values")
    if sigmas[0] < sigmas[-1]:
        sigmas = sigmas.flip(0)
    if not (sigmas.diff() < 0).all():
        raise ValueError("the SIGMAS do not fall from step to step: connect a scheduler's output as it is")
    if sigmas[-1] != 0:
        raise ValueError(
            f"the SIGMAS end at {float(sigmas[-1]):g}; an inversion starts from the clean clip, so they must end in 0: "
            "connect a scheduler's output as it is, without FlipSigmas or the upper part of SplitSigmas"
        )
    highest, limit = float(sigmas[0]), float(model_sampling.sigma_max)
    if highest > limit * (FLOW_END if noise_path(model_sampling) == FLOW else 1.01):
        raise ValueError(
            f"the SIGMAS go up to {highest:g}, but this model's noise levels end at {limit:g}: connect a scheduler "
            "that is connected to the same MODEL (BasicScheduler), or set its sigma_max"
        )
    return sigmas
