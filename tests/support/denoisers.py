"""Denoisers whose exact answers are known."""

from __future__ import annotations

import torch
from torch import Tensor


def along(sigma: Tensor, x: Tensor) -> Tensor:
    return sigma.reshape(-1, *[1] * (x.ndim - 1))


class Gaussian:
    """The best denoiser of data N(0, deviation^2) on a noise path, and the exact solution of its ODE.

    Variance-exploding: D = s^2 / (s^2 + sigma^2) x and x(sigma) = x0 sqrt(1 + sigma^2 / s^2). Flow, with a = 1 - sigma:
    D = a s^2 / (a^2 s^2 + sigma^2) x and x(sigma) = x0 sqrt(a^2 + sigma^2 / s^2).
    """

    def __init__(self, deviation: float = 1.0, kind: str = "ve"):
        self.deviation, self.kind, self.levels = deviation, kind, []

    def signal(self, sigma):
        return 1 - sigma if self.kind == "flow" else sigma * 0 + 1

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.levels.append(float(sigma[0]))
        s, a, level = self.deviation**2, self.signal(sigma), sigma.double()
        return (along(a * s / (a**2 * s + level**2), x) * x).to(x.dtype)

    def exact(self, x0: Tensor, sigma: float) -> Tensor:
        a = self.signal(sigma)
        return x0 * (a**2 + sigma**2 / self.deviation**2) ** 0.5


class Network:
    """D = c_skip x + c_out F(c_in x; sigma) with a smooth nonlinear F that mixes channels and frames; SVD's scalings."""

    def __init__(self, strength: float = 0.5, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.mix = torch.randn(4, 4, generator=generator, dtype=torch.float64)
        self.strength, self.levels = strength, []

    def raw(self, scaled: Tensor, sigma: float) -> Tensor:
        mixed = torch.einsum("dc,tchw->tdhw", self.mix.to(scaled), scaled)
        return self.strength * torch.tanh(mixed + 0.3 * scaled.roll(1, 0) + 0.1 * sigma / (1 + sigma))

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        s = float(sigma[0])
        self.levels.append(s)
        return x / (s**2 + 1) - s / (s**2 + 1) ** 0.5 * self.raw(x / (s**2 + 1) ** 0.5, s)


def clip(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*(shape or (5, 4, 6, 6)), generator=torch.Generator().manual_seed(seed), dtype=dtype)
