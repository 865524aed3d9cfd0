"""EDM inversion with noise extrapolation (Videoshop, arXiv 2403.14617): from a clean clip to the noise it came from.

Notation: levels sigma_0 = 0 < sigma_1 < ... < sigma_T; one step goes from the lower level l to the higher level h. x
is the clip at level l, x_h the clip sought at level h, xb ("x bar") the guess of x_h at which the network is called.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import trange

from ..denoiser import NoisePath, V
from ..fingerprint import Fingerprint
from .latents import Normalisation, check_clip

GUESSES = ("extrapolation", "random", "current", "last_direction")
FLOW_END = 1.001  # the last level of a flow: a shifted schedule may round to a little more than 1
Denoiser = Callable[..., Tensor]
Callback = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Inversion:
    """All that the way back needs, as one value, so that nothing can be wired with a mismatched schedule.

    latent: the inverted clip in model space, at the noise level sigmas[0].
    sigmas: [steps + 1], descending and ending in 0: the levels to come back on.
    normalisation: how the clip was normalised before, or None.
    trajectory: [steps + 1, *latent.shape] on the CPU, from the clean clip (index 0) to the noise, in the precision that
        was chosen for it; None where not kept.
    residuals: the last relative residual of each step's refinement; empty without refinement.
    evaluations: how many times the network was called.
    settings: what it was made with, for the record.
    source: the clean latent in model space before it was normalised.
    augmentation_noise: what the headless pipeline adds to the edited first frame; the nodes' conditioning has its own.
    original: the clean latent in the VAE's space, as the nodes were given it: what a mask puts back, to the bit.
    model: of the model that it was made with, or None where that is not known.
    joins: [steps + 1, parts - 1, C, h, w] in float32 on the CPU, of an inversion in parts (see `parts`): the states of
        the frames that two parts share, as the later part has them, from clean to noise; None for one part.
    """

    latent: Tensor
    sigmas: Tensor
    normalisation: Normalisation | None = None
    trajectory: Tensor | None = None
    residuals: tuple[float, ...] = ()
    evaluations: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    source: Tensor | None = None
    augmentation_noise: Tensor | None = None
    original: Tensor | None = None
    model: Fingerprint | None = None
    joins: Tensor | None = None


def _check_levels(levels: list[float]) -> None:
    if len(levels) < 2 or levels[0] != 0 or not all(a < b < math.inf for a, b in zip(levels, levels[1:])):
        raise ValueError(
            f"the noise levels of an inversion must rise from 0, got {len(levels)} from {levels[:1]} to {levels[-1:]}: "
            "flip the schedule that the sampler will come back on"
        )


def _check_guesses(x: Tensor, guesses: tuple[str, ...], noise: Tensor | None, refine: int, damping: float) -> None:
    for guess in guesses:
        if guess not in GUESSES:
            raise ValueError(f'the guess is "{guess}"; it must be one of {", ".join(GUESSES)}')
    if "random" in guesses and (noise is None or noise.shape != x.shape):
        given = None if noise is None else tuple(noise.shape)
        raise ValueError(f'the guess "random" needs noise of the clip\'s shape {tuple(x.shape)}, got {given}')
    if "random" in guesses and not torch.isfinite(noise).all():
        raise ValueError('the noise of the guess "random" holds NaN or infinite values: draw it afresh')
    if refine < 0 or not 0 <= damping < 1:
        raise ValueError(f"got {refine} refinements with damping {damping}; they must be >= 0 and 0 <= damping < 1")


def solve_step(x: Tensor, denoised: Tensor, guess: Tensor, low: float, high: float, c_skip: float) -> Tensor:
    """The Euler step of the way back, solved for its start x_h with the network's output F held (paper, equation 4).

    The step down is x_l = x_h + (s_l - s_h) (x_h - D(x_h)) / s_h with D = c_skip x_h + c_out F. F comes from the guess:
    c_out F = D(xb) - c_skip xb. With r = 1 - s_l / s_h:
        x_h = [x_l - r (D(xb) - c_skip xb)] / [1 - r (1 - c_skip)]
    For v-prediction this is x_h = [(1 + s_h^2) x_l + (s_h - s_l) sqrt(1 + s_h^2) F] / (1 + s_l s_h), for c_skip = 1
    (EPS, flow) the Euler step with the direction held. It starts cleanly at s_l = 0, where r = 1.
    """
    r = 1 - low / high
    scale = 1 / (1 - r * (1 - c_skip)) if c_skip < 1 else 1.0
    return scale * (x - r * (denoised - c_skip * guess))


def guess_next(
    kind: str, x: Tensor, clean: Tensor, low: float, high: float, path: NoisePath, noise: Tensor | None, direction
) -> Tensor:
    """The guess xb of the clip at the higher level, at which the network is called.

    "extrapolation": x0 + (s_h / s_l) (x_l - x0), the noise found so far scaled up (paper, equation 6, above the
        threshold).
    "random": x0 + s_h n (paper, equation 6, below it), with one fixed n: the authors' code draws it once a clip.
    "current": x_l, the naive approximation (paper, equation 5).
    "last_direction": x_l + (s_h - s_l) d, with the direction d in which the last step went (ours; UniInv has the same
        idea for flows). It is the paper's guess with the last step's own estimate of x0 in the place of x0.
    On a flow path x0 is signal(s) x0. At level 0 nothing is known yet of the noise or the direction: "extrapolation"
    and "last_direction" are the current latent there.
    """
    if kind == "random":
        return path.signal(high) * clean + high * noise
    if kind == "extrapolation" and low > 0:
        return path.signal(high) * clean + (high / low) * (x - path.signal(low) * clean)
    if kind == "last_direction" and direction is not None:
        return x + (high - low) * direction
    return x


@torch.no_grad()
def sample_edm_inversion(
    model: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    *,
    path: NoisePath = V,
    guess_above: str = "extrapolation",
    guess_below: str = "random",
    threshold: float = 1.0,
    noise: Tensor | None = None,
    refine: int = 0,
    damping: float = 0.5,
    tolerance: float = 1e-4,
) -> Tensor:
    """EDM inversion with noise extrapolation (paper, equations 4 to 7), for every family with dx/ds = (x - D) / s.

    model: a denoiser (see `pipelines.denoiser`). It is never called at level 0, and once a step without refinement.
    x: the clean clip, [T, C, h, w] or [B, C, T, h, w], in model space, normalised or not; it is not changed.
    sigmas: ascending from 0, for a flow up to 1; flipped, they are the levels to come back on with `sample_euler`.
    path: the family's noise path and preconditioning; V is Stable Video Diffusion's.
    guess_above, guess_below, threshold: the kind of guess (see `guess_next`) where the noise-to-signal ratio of the
        LOWER level is above the threshold, and where it is not. The paper's are extrapolation and random; its
        threshold is only a symbol, the authors' code has 1.0 on the lower level.
    noise: the fixed random direction, of x's shape and unit variance; needed where a guess is "random".
    refine: at most so many damped fixed-point iterations a step, x <- damping x + (1 - damping) solve(D(x)), each one
        more network call; they stop when the relative residual |solve(D(x)) - x| / |x| is below `tolerance`. (Ours;
        AIDI and ReNoise are the same idea for DDIM.)
    callback: gets a dict with i, x (at sigma), sigma, sigma_low, denoised, residual (None without refinement) and
        evaluations so far.
    Returns the clip at sigmas[-1], in x's dtype; within it at least float32 is kept, and the coefficients are float64.
    Raises ValueError for a schedule that does not rise from 0, an unknown guess, missing noise, NaN.
    """
    check_clip(x)
    levels = sigmas.tolist()
    _check_levels(levels)
    if path.kind == "flow" and levels[-1] > FLOW_END:
        raise ValueError(f"the noise levels go up to {levels[-1]:g}; a flow's end at 1: connect its own schedule")
    _check_guesses(x, (guess_above, guess_below), noise, refine, damping)
    extra_args = extra_args or {}
    dtype, working = x.dtype, torch.promote_types(x.dtype, torch.float32)
    clean = x = x.to(working)
    noise = None if noise is None else noise.to(clean)
    ones = x.new_ones(x.shape[0])
    direction, evaluations = None, 0

    def solve(guess: Tensor) -> tuple[Tensor, Tensor]:
        guess = guess.to(dtype)  # what the network sees, in x's precision, is also what F is told apart from
        denoised = model(guess, high * ones, **extra_args).to(working)
        return solve_step(x, denoised, guess.to(working), low, high, path.c_skip(high)), denoised

    for i in trange(len(levels) - 1, disable=disable):
        low, high = levels[i], levels[i + 1]
        kind = guess_above if path.noise_to_signal(low) > threshold else guess_below
        solved, denoised = solve(guess_next(kind, x, clean, low, high, path, noise, direction))
        evaluations += 1
        residual = None
        for _ in range(refine):
            again, denoised = solve(solved)
            evaluations += 1
            residual = float((again - solved).norm() / solved.norm().clamp(min=1e-12))
            solved = torch.lerp(again, solved, damping)
            if residual < tolerance:
                break
        direction, x = (solved - x) / (high - low), solved
        if callback is not None:
            step = {"i": i, "x": x, "sigma": high, "sigma_low": low, "denoised": denoised}
            callback(step | {"residual": residual, "evaluations": evaluations})
    return x.to(dtype)


@torch.no_grad()
def sample_naive_inversion(
    model: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    *,
    first: float = 1e-4,
) -> Tensor:
    """The host's own way, for comparison: Euler on flipped sigmas, the network called at the LOWER level.

    x, sigmas: as in `sample_edm_inversion`. The first level 0 becomes `first` (the host's FlipSigmas puts 0.0001
    there), which lies outside what the model was trained on. Returns the clip at sigmas[-1].
    """
    check_clip(x)
    levels = sigmas.tolist()
    _check_levels(levels)
    if not 0 < first < levels[1]:
        raise ValueError(f"the level that replaces 0 is {first:g}; it must lie between 0 and the next, {levels[1]:g}")
    dtype, working = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x = x.to(working)
    levels[0] = first
    ones = x.new_ones(x.shape[0])
    for i in trange(len(levels) - 1, disable=disable):
        low, high = levels[i], levels[i + 1]
        denoised = model(x.to(dtype), low * ones, **(extra_args or {})).to(working)
        x = x + (high - low) / low * (x - denoised)
        if callback is not None:
            callback({"i": i, "x": x, "sigma": high, "sigma_low": low, "denoised": denoised, "evaluations": i + 1})
    return x.to(dtype)
