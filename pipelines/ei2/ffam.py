"""FFAM, EI²'s fine-coarse frame attention (arXiv 2305.17431), and the attentions that the paper compares it with.

They take the place of a text-to-image UNet's self-attention and use its pretrained projections. Queries are a frame's
own tokens; what differs is whose tokens are the keys and values.

Known (the paper's figure 2): "for each patch in the latent, it interacts with the fine patches in the current frame
and coarse patches in other frames", drawn with half the resolution on each side, over all other frames. Ours: average
pooling, after the projection (these have no bias, so pooling before gives the same), windows cut by an odd edge are
averages of what they hold, coarse tokens count as any others in the softmax.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

# "FFAM": all others, coarse. "sparse-causal": the first frame and the one before (Tune-A-Video, arXiv 2212.11565,
# instead of the own). "first frame": it alone (Video-P2P, arXiv 2303.04761). "own frame": the plain self-attention.
ATTENTIONS = ("FFAM", "sparse-causal", "first frame", "own frame")

# (queries [B, n, C], keys [B, m, C], values [B, m, C], heads) -> [B, n, C]
Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(Q K^T / sqrt d) V of several heads, by torch. q: [B, n, C]; k, v: [B, m, C]."""
    q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")


def pool_tokens(tokens: Tensor, grid: tuple[int, int], factor: int) -> Tensor:
    """Tokens [B, h w, C] on a grid (h, w), averaged over windows of factor x factor: [B, ceil(h/r) ceil(w/r), C]."""
    h, w = grid
    if tokens.shape[1] != h * w:
        raise ValueError(
            f"got {tokens.shape[1]} tokens for a grid of {h} x {w}: another patch (token merging, for example) changed "
            "them; take it off, or leave these blocks out"
        )
    if factor == 1:
        return tokens
    picture = rearrange(tokens, "b (h w) c -> b c h w", h=h)
    pooled = F.avg_pool2d(picture, factor, ceil_mode=True, count_include_pad=False)
    return rearrange(pooled, "b c h w -> b (h w) c")


def check_attention(kind: str, factor: int) -> None:
    """ValueError for another kind of attention, or a factor below 1."""
    if kind not in ATTENTIONS:
        raise ValueError(f'the attention is "{kind}"; it must be one of {", ".join(ATTENTIONS)}')
    if factor < 1:
        raise ValueError(f"the coarse factor is {factor}; it must be 1 (no pooling) or more")


def frame_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    frames: int,
    grid: tuple[int, int],
    heads: int,
    kind: str = "FFAM",
    factor: int = 2,
    attend: Attend = attend,
) -> Tensor:
    """Attention of each frame's tokens to its own and other frames'.

    q, k, v: projected tokens [B frames, h w, C], the frames of each of B clips in a row; grid: (h, w). kind: one of
    ATTENTIONS. factor: of the coarse tokens, on each side; 1 makes FFAM the dense attention over space and time.
    Returns [B frames, h w, C], before the output projection. With one frame every kind is plain self-attention.
    FFAM's coarse tokens are made once a clip; beyond them only one frame's keys and values are held at a time.
    Cost of a frame against sparse-causal attention with factor 2: (frames + 3) / 8.
    """
    check_attention(kind, factor)
    if len(q) % frames:
        raise ValueError(f"got a batch of {len(q)} for clips of {frames} frames")
    if frames == 1 or kind == "own frame":
        return attend(q, k, v, heads)
    pooled_by = factor if kind == "FFAM" else 1  # the others see no coarse tokens
    coarse = [rearrange(pool_tokens(x, grid, pooled_by), "(b f) n c -> b f n c", f=frames) for x in (k, v)]
    q, k, v = (rearrange(x, "(b f) n c -> b f n c", f=frames) for x in (q, k, v))

    def seen(x: Tensor, pooled: Tensor, i: int) -> Tensor:
        if kind == "sparse-causal":
            return torch.cat([x[:, 0], x[:, max(i - 1, 0)]], 1)
        if kind == "first frame":
            return x[:, 0]
        return torch.cat([x[:, i], *(pooled[:, j] for j in range(frames) if j != i)], 1)

    out = [attend(q[:, i], seen(k, coarse[0], i), seen(v, coarse[1], i), heads) for i in range(frames)]
    return rearrange(torch.stack(out, 1), "b f n c -> (b f) n c")
