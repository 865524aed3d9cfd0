"""What a denoiser is, and what the families of diffusion models differ in.

A denoiser is k-diffusion's and ComfyUI's own contract: `denoised = model(x, sigma, **extra_args)` with x a batch of
noisy latents ([T, C, h, w], the frames as the batch, or [B, C, T, h, w]), sigma a tensor [x.shape[0]], and denoised
the model's estimate of the clean latents. The probability-flow ODE dx/dsigma = (x - denoised) / sigma is the same for
EPS, V, EDM and rectified flow; what differs is the path along which signal and noise are mixed, and which part of the
denoised estimate comes from the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class NoisePath:
    """How a family mixes signal and noise, and how its output is preconditioned.

    kind: "ve": x = x0 + sigma n; "flow": x = (1 - sigma) x0 + sigma n, 0 <= sigma <= 1.
    sigma_data: of EDM's skip connection, c_skip = sigma_data^2 / (sigma^2 + sigma_data^2); None for families without
        one (EPS: D = x - sigma F; flow: D = x - sigma F), whose c_skip is 1.
    rectified: a flow's network in VE coordinates (Cosmos): with t = sigma / (1 + sigma), D = (1 - t) x - t F.
    preserving: a denoiser in VP coordinates (CogVideoX), where x keeps its variance: see `shown`.
    """

    kind: Literal["ve", "flow"] = "ve"
    sigma_data: float | None = None
    rectified: bool = False
    preserving: bool = False

    def signal(self, sigma: float) -> float:
        """The factor of x0 in x at a noise level."""
        return 1.0 - sigma if self.kind == "flow" else 1.0

    def noise_to_signal(self, sigma: float) -> float:
        """The noise level that means the same for every family: sigma (VE), sigma / (1 - sigma) (flow)."""
        signal = self.signal(sigma)
        return sigma / signal if signal > 0 else float("inf")

    def shown(self, x: Tensor, sigma: Tensor) -> Tensor:
        """What a denoiser of this family is shown for x: itself, or x / sqrt(1 + sigma^2) in VP coordinates.

        In these x = alpha x0 + sqrt(1 - alpha^2) n with alpha = 1 / sqrt(1 + sigma^2): VE's x times alpha. The ODE is
        solved in VE coordinates for every family; at level 0 both are the same. x: [B, ...]; sigma: [B].
        """
        return x / torch.sqrt(1 + sigma.to(x) ** 2).view(-1, *[1] * (x.ndim - 1)) if self.preserving else x

    def c_skip(self, sigma: float) -> float:
        """The share of x in the denoised estimate D = c_skip x + c_out F(x), F being the network."""
        if self.rectified:
            return 1 / (1 + sigma)
        if self.sigma_data is None:
            return 1.0
        return self.sigma_data**2 / (sigma**2 + self.sigma_data**2)


EPS = NoisePath("ve")
V = NoisePath("ve", sigma_data=1.0)  # v-prediction, Stable Video Diffusion's EDM form among it
FLOW = NoisePath("flow")
COSMOS = NoisePath("ve", rectified=True)
DDPM = NoisePath("ve", sigma_data=1.0, preserving=True)  # CogVideoX: v-prediction of a network in VP coordinates


def EDM(sigma_data: float = 0.5) -> NoisePath:  # noqa: N802
    """EDM's own preconditioning (arXiv 2206.00364, table 1)."""
    return NoisePath("ve", sigma_data=sigma_data)


class DiscreteTimes:
    """The training times 0..n - 1 of a discrete schedule as noise levels, and back.

    alphas: the schedule's cumulative products [n]. The level of a time is k-diffusion's sqrt((1 - alpha) / alpha);
    between two times ln sigma is interpolated. sigma_range: the lowest and the highest level.
    """

    def __init__(self, alphas: Tensor):
        self.log_sigmas = 0.5 * ((1 - alphas.double()) / alphas.double()).log()
        self.sigma_range = (math.exp(float(self.log_sigmas[0])), math.exp(float(self.log_sigmas[-1])))

    def time(self, sigma: Tensor) -> Tensor:
        """The time of noise levels, of sigma's shape; levels outside the range have that of its ends."""
        levels = self.log_sigmas.to(sigma.device)
        wanted = sigma.double().log().clamp(levels[0], levels[-1])
        above = torch.searchsorted(levels, wanted).clamp(1, len(levels) - 1)
        low, high = levels[above - 1], levels[above]
        return (above - 1 + (wanted - low) / (high - low)).float()


def discrete_denoised(
    network: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigma: Tensor, times: DiscreteTimes, path: NoisePath
) -> Tensor:
    """The denoised estimate of an EPS or V network that is called as (c_in x, time). x: [B, ...]; sigma: [B]."""
    s = sigma.float().view(-1, *[1] * (x.ndim - 1))
    scale = torch.sqrt(s**2 + 1)
    output = network(x.float() / scale, times.time(sigma)).float()
    if path.sigma_data is not None:
        return x.float() / scale**2 - s / scale * output
    return x.float() - s * output


def edm_scalings(sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """c_skip, c_out, c_in and c_noise of Stable Video Diffusion (v-prediction, sigma_data 1), of sigma's shape."""
    c_skip = 1 / (sigma**2 + 1)
    c_out = -sigma / torch.sqrt(sigma**2 + 1)
    c_in = 1 / torch.sqrt(sigma**2 + 1)
    return c_skip, c_out, c_in, 0.25 * sigma.log()


def karras_sigmas(steps: int, sigma_min: float = 0.002, sigma_max: float = 700.0, rho: float = 7.0) -> Tensor:
    """The schedule of EDM (arXiv 2206.00364, equation 5): [steps + 1] in float64, descending, ending in 0.

    The defaults are Stable Video Diffusion's; the host's scheduler `karras` gives the same. ValueError for steps < 1 or
    levels that are not 0 < sigma_min < sigma_max.
    """
    if steps < 1:
        raise ValueError(f"got {steps} steps; a schedule needs at least 1")
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"got sigma_min {sigma_min} and sigma_max {sigma_max}; they must satisfy 0 < min < max")
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return torch.cat([(high + ramp * (low - high)) ** rho, torch.zeros(1, dtype=torch.float64)])


def truncate_sigmas(sigmas: Tensor, strength: float) -> Tensor:
    """The last int(steps * strength) steps of a descending schedule, at least one: how far a clip is rewound.

    The rule of the authors' code (strength 0.55 of 25 steps: 13 steps, from sigma 15.6). strength in 0..1, 1 keeps all.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength is {strength}; it must be above 0 and at most 1 (1 rewinds to pure noise)")
    steps = len(sigmas) - 1
    return sigmas[steps - max(1, int(steps * strength)) :]
