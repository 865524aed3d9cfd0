"""STAM, EI²'s shift-restricted temporal attention (arXiv 2305.17431), and the temporal attention it is compared with.

    Y = X + softmax(Q K^T / sqrt d) V Wo,   Q, K, V = Xc Wq, Xc Wk, Xc Wv,   Xc = X - mean(X)

over the frames at each location, X [frames, C]. Instance Centering takes the place of LayerNorm, so that the residual
has (under uniform attention exactly) no mean; the value and output projections are spectrally normalised, so that the
residual is bounded by how far the location's features differ over time. LayerNorm has neither: it gives what enters the
attention a mean per channel, and unit variance however small X varies.

Known: the abstract and figure 2 (what is quoted in the names). Ours, since neither text nor code is public: the mean is
per channel over frames ("frames + space" is an option); W / max(1, sigma_max), which keeps a zero-initialised output
zero; only Wv and Wo are normalised; no output bias, since a bias is a mean shift.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .ffam import attend

AXES = ("frames", "frames + space")
LOCATIONS = 4096  # that are attended to at once: some kernels take no more than 65535 locations times heads
FIRST_ITERATIONS = 15  # of a new layer's power iteration, as torch's own spectral_norm begins


@dataclass(frozen=True)
class TemporalKind:
    """What a temporal attention is made of."""

    centred: bool  # Instance Centering, else LayerNorm
    spectral: bool  # normalised value and output projections
    bias: bool = False  # of the output


# Tune-A-Video's (arXiv 2212.11565) own LayerNorm is never trained, so it has no scale or bias here; its output bias
# begins at 0 here, where the authors' code leaves it random (a shift before any training). It comes last in its block
# there; here everything stands at STAM's place, between self- and cross-attention, so that the module alone differs.
TEMPORALS = {
    "STAM": TemporalKind(True, True),
    "STAM with LayerNorm": TemporalKind(False, True),
    "STAM without spectral normalisation": TemporalKind(True, False),
    "Tune-A-Video": TemporalKind(False, False, bias=True),
}


def centre(x: Tensor, frames: int, axes: str = "frames") -> Tensor:
    """Instance Centering: x [B frames, n, C] without its mean per channel, over frames or over frames and space."""
    clips = rearrange(x, "(b f) n c -> b f n c", f=frames)
    dims = (1,) if axes == "frames" else (1, 2)
    return rearrange(clips - clips.mean(dims, keepdim=True), "b f n c -> (b f) n c")


class SpectralLinear(nn.Module):
    """A linear layer W / max(1, sigma_max(W)); sigma_max by power iteration in float32, whose vector u persists.

    `iterate` moves u, a pass does not: a block that is computed again on the way back sees the weight that it saw. In a
    zero matrix, which has no direction, u stays what it was.
    """

    def __init__(self, width: int, generator: torch.Generator, zero: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, width) if zero else _drawn(width, generator))
        self.register_buffer("u", F.normalize(torch.randn(width, generator=generator), dim=0))
        for _ in range(FIRST_ITERATIONS):
            self.iterate()

    @torch.no_grad()
    def iterate(self) -> None:
        """One step of power iteration, after each step of the optimiser."""
        weight = self.weight.float()
        with torch.autocast(weight.device.type, enabled=False):
            u = weight @ F.normalize(weight.mT @ self.u, dim=0)
        if u.norm() > 1e-12:
            self.u.copy_(F.normalize(u, dim=0))

    def normalised(self) -> Tensor:
        """The weight that is applied, [out, in]."""
        weight = self.weight.float()
        with torch.autocast(weight.device.type, enabled=False):
            with torch.no_grad():
                v = F.normalize(weight.mT @ self.u, dim=0)
            sigma = self.u @ (weight @ v)
        return weight / sigma.clamp(min=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.normalised().to(x.dtype))


def _drawn(width: int, generator: torch.Generator) -> Tensor:
    """torch's own start of a linear layer: uniform within 1 / sqrt(C)."""
    return (2 * torch.rand(width, width, generator=generator) - 1) / math.sqrt(width)


class TemporalAttention(nn.Module):
    """One of TEMPORALS on tokens [B frames, n, C]; `forward` gives the residual. A new one changes nothing.

    It computes in its weights' precision, and answers in the tokens'.
    folded: for weights in which the normalisation is folded already (`folded`), so that inference needs none of it.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kind: str = "STAM",
        axes: str = "frames",
        generator: torch.Generator | None = None,
        folded: bool = False,
    ):
        super().__init__()
        if kind not in TEMPORALS:
            raise ValueError(f'the temporal module is "{kind}"; it must be one of {", ".join(TEMPORALS)}')
        if axes not in AXES:
            raise ValueError(f'the centring is over "{axes}"; it must be one of {", ".join(AXES)}')
        parts, generator = TEMPORALS[kind], generator or torch.Generator().manual_seed(0)
        self.kind, self.axes, self.heads = kind, axes, heads
        self.to_q, self.to_k = (_linear(_drawn(width, generator)) for _ in range(2))
        if parts.spectral and not folded:
            self.to_v, self.to_out = SpectralLinear(width, generator), SpectralLinear(width, generator, zero=True)
        else:
            self.to_v, self.to_out = _linear(_drawn(width, generator)), _linear(torch.zeros(width, width), parts.bias)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        h = x.to(self.to_q.weight.dtype)
        h = centre(h, frames, self.axes) if TEMPORALS[self.kind].centred else F.layer_norm(h, h.shape[-1:])
        n = h.shape[1]
        h = rearrange(h, "(b f) n c -> (b n) f c", f=frames)
        out = [self.to_out(self._mixed(piece)) for piece in h.split(LOCATIONS)]
        return rearrange(torch.cat(out), "(b n) f c -> (b f) n c", n=n).to(x.dtype)

    def _mixed(self, h: Tensor) -> Tensor:
        return attend(self.to_q(h), self.to_k(h), self.to_v(h), self.heads)

    def folded(self) -> dict[str, Tensor]:
        """Plain weights on the CPU, with the exact spectral norm divided out; what `folded=True` loads."""
        state = {}
        for name, layer in self.named_children():
            weight = layer.weight.detach().float().cpu()
            if isinstance(layer, SpectralLinear):
                weight = weight / torch.linalg.matrix_norm(weight, 2).clamp(min=1)
            state[f"{name}.weight"] = weight.clone()
            if getattr(layer, "bias", None) is not None:
                state[f"{name}.bias"] = layer.bias.detach().float().cpu().clone()
        return state


def folded_shapes(kind: str, width: int) -> dict[str, tuple[int, ...]]:
    """What `folded` of a module of a kind holds, without making one."""
    shapes: dict[str, tuple[int, ...]] = {f"to_{part}.weight": (width, width) for part in ("q", "k", "v", "out")}
    return shapes | ({"to_out.bias": (width,)} if TEMPORALS[kind].bias else {})


def _linear(weight: Tensor, bias: bool = False) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias:
            layer.bias.zero_()
    return layer
