"""Denoisers with known answers, and the clips to try them on.

For Gaussian data the ideal denoiser and the ODE's solution are closed forms: data N(mu, s^2) in each element, so the
noisy clip at sigma is N(a mu, v) with a = signal(sigma) and v = a^2 s^2 + sigma^2, and
    D(x; sigma) = mu + a s^2 / v (x - a mu)                the mean of x0 given x
    x(sigma) = a mu + sqrt(v) / s (x0 - mu)                the probability-flow ODE's solution from x0
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rewind.pipelines.denoiser import NoisePath


class Gaussian:
    """The ideal denoiser of N(mu, s^2) on a noise path; it keeps each x and sigma that it was called with."""

    def __init__(self, path: NoisePath, s: float = 1.0, mu: float = 0.0):
        self.path, self.s, self.mu = path, s, mu
        self.seen: list[tuple[Tensor, Tensor]] = []

    @property
    def sigmas(self) -> list[float]:
        return [float(sigma[0]) for _, sigma in self.seen]

    def _moments(self, sigma: float) -> tuple[float, float]:
        a = 1 - sigma if self.path.kind == "flow" else 1.0
        return a, a**2 * self.s**2 + sigma**2

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        assert sigma.shape == (x.shape[0],) and (sigma == sigma[0]).all()
        assert float(sigma[0]) > 0, "the network is never called at level 0"
        self.seen.append((x.clone(), sigma.clone()))
        a, v = self._moments(float(sigma[0]))
        return self.mu + a * self.s**2 / v * (x - a * self.mu)

    def solution(self, clean: Tensor, sigma: float) -> Tensor:
        """The exact inversion of a clean clip, up to sigma."""
        a, v = self._moments(sigma)
        return a * self.mu + math.sqrt(v) / self.s * (clean - self.mu)


class Network:
    """SVD's preconditioning of a smooth nonlinear F that mixes channels and frames: no closed form, but no surprise."""

    def __init__(self, strength: float = 0.5, seed: int = 0):
        self.mix = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.strength = strength
        self.sigmas: list[float] = []

    def raw(self, scaled: Tensor, sigma: float) -> Tensor:
        """F, of c_in x: [T, 4, h, w]."""
        mixed = torch.einsum("dc,tchw->tdhw", self.mix.to(scaled), scaled)
        return self.strength * torch.tanh(mixed + 0.3 * scaled.roll(1, 0) + 0.1 * sigma / (1 + sigma))

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        s = float(sigma[0])
        self.sigmas.append(s)
        return x / (s**2 + 1) - s / (s**2 + 1) ** 0.5 * self.raw(x / (s**2 + 1) ** 0.5, s)


def clip(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """A fixed random clip, [4, 4, 3, 5] unless told."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape or (4, 4, 3, 5), generator=generator, dtype=torch.float64).to(dtype)


def relative(x: Tensor, reference: Tensor) -> float:
    """|x - reference| / |reference|."""
    return float((x.double() - reference.double()).norm() / reference.double().norm())
