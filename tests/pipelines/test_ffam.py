"""FFAM and the attentions beside it, against their definitions written out token by token."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rewind.pipelines.ei2 import ffam
from rewind.pipelines.ei2.ffam import ATTENTIONS, frame_attention, pool_tokens

HEADS, WIDTH = 2, 8
GRIDS = [(4, 6), (9, 5), (3, 3)]


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def projected(clips: int, frames: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B frames, h w, C]."""
    return tuple(tokens(clips * frames, grid[0] * grid[1], WIDTH, seed=seed) for seed in range(3))


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt d) V of one frame's queries [n, C] over keys and values [m, C], head by head."""
    d, out = WIDTH // HEADS, []
    for head in range(HEADS):
        part = slice(head * d, (head + 1) * d)
        scores = torch.einsum("nd,md->nm", q[:, part], k[:, part]) / math.sqrt(d)
        out.append(torch.softmax(scores, -1) @ v[:, part])
    return torch.cat(out, -1)


def coarse(frame: Tensor, grid: tuple[int, int], factor: int) -> Tensor:
    """One frame's tokens [h w, C], averaged window by window; those at an odd edge hold fewer tokens."""
    h, w = grid
    windows = []
    for top in range(0, h, factor):
        for left in range(0, w, factor):
            inside = [
                frame[y * w + x] for y in range(top, min(top + factor, h)) for x in range(left, min(left + factor, w))
            ]
            windows.append(sum(inside) / len(inside))
    return torch.stack(windows)


# --- against the definitions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("factor", [2, 3])
def test_ffam_is_attention_to_the_own_fine_and_the_others_coarse_tokens(grid, factor):
    frames = 4
    q, k, v = projected(1, frames, grid)
    got = frame_attention(q, k, v, frames, grid, HEADS, "FFAM", factor)
    for i in range(frames):
        others = [j for j in range(frames) if j != i]
        keys, values = (torch.cat([x[i], *(coarse(x[j], grid, factor) for j in others)]) for x in (k, v))
        assert torch.allclose(got[i], written_out(q[i], keys, values), atol=1e-12)


@pytest.mark.parametrize("grid", GRIDS)
def test_without_pooling_it_is_dense_attention_over_space_and_time(grid):
    frames = 3
    q, k, v = projected(1, frames, grid)
    got = frame_attention(q, k, v, frames, grid, HEADS, "FFAM", 1)
    dense = written_out(*(x.reshape(-1, WIDTH) for x in (q, k, v))).view_as(q)
    assert torch.allclose(got, dense, atol=1e-12)


@pytest.mark.parametrize("kind", ATTENTIONS)
@pytest.mark.parametrize("factor", [1, 2])
def test_of_one_frame_every_kind_is_its_plain_self_attention(kind, factor):
    grid = (9, 5)
    q, k, v = projected(2, 1, grid)
    got = frame_attention(q, k, v, 1, grid, HEADS, kind, factor)
    for i in range(2):
        assert torch.allclose(got[i], written_out(q[i], k[i], v[i]), atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "seen"),
    [
        ("sparse-causal", [[0, 0], [0, 0], [0, 1], [0, 2]]),  # the first and the previous, the first one twice itself
        ("first frame", [[0], [0], [0], [0]]),
        ("own frame", [[0], [1], [2], [3]]),
    ],
)
def test_the_other_kinds_see_whole_frames(kind, seen):
    grid = (3, 5)
    q, k, v = projected(1, 4, grid)
    got = frame_attention(q, k, v, 4, grid, HEADS, kind)
    for i, frames in enumerate(seen):
        expected = written_out(q[i], torch.cat([k[j] for j in frames]), torch.cat([v[j] for j in frames]))
        assert torch.allclose(got[i], expected, atol=1e-12)


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_clips_of_a_batch_do_not_see_each_other(kind):
    grid, frames = (9, 5), 3
    q, k, v = projected(2, frames, grid)
    together = frame_attention(q, k, v, frames, grid, HEADS, kind)
    for own in (slice(0, frames), slice(frames, None)):
        alone = frame_attention(q[own], k[own], v[own], frames, grid, HEADS, kind)
        assert torch.allclose(together[own], alone, atol=1e-12)


def test_ffam_knows_no_order_of_frames():
    grid, order = (4, 6), torch.tensor([2, 0, 3, 1])
    q, k, v = projected(1, 4, grid)
    plain = frame_attention(q, k, v, 4, grid, HEADS)
    assert torch.allclose(frame_attention(q[order], k[order], v[order], 4, grid, HEADS), plain[order], atol=1e-12)


def test_gradients_are_those_of_dense_attention():
    grid, frames = (3, 3), 2
    inputs = [x.requires_grad_(True) for x in projected(1, frames, grid)]
    ours = frame_attention(*inputs, frames, grid, HEADS, "FFAM", 1).square().sum()
    dense = written_out(*(x.reshape(-1, WIDTH) for x in inputs)).square().sum()
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(dense, inputs)):
        assert torch.allclose(a, b, atol=1e-10)


# --- pooling and its cost ---------------------------------------------------------------------------------------------


def test_windows_that_the_edge_cuts_are_averages_of_what_they_hold():
    grid = torch.arange(9.0).view(1, 9, 1)  # 0 1 2 / 3 4 5 / 6 7 8
    assert pool_tokens(grid, (3, 3), 2).flatten().tolist() == [2.0, 3.5, 6.5, 8.0]
    assert torch.equal(pool_tokens(grid, (3, 3), 1), grid)


@pytest.mark.parametrize("grid", GRIDS)
def test_pooled_after_the_projection_is_projected_after_pooling(grid):
    x, weight = tokens(2, grid[0] * grid[1], WIDTH), tokens(5, WIDTH, seed=1)
    pooled = torch.stack([coarse(frame, grid, 2) for frame in x])
    assert torch.allclose(pool_tokens(x @ weight.T, grid, 2), pooled @ weight.T, atol=1e-12)


@pytest.mark.parametrize("frames", [2, 5, 8])
def test_the_cost_against_sparse_causal_attention_is_that_of_the_formula(frames):
    grid = (4, 6)
    pairs = {}

    def attend(q, k, v, heads):
        pairs[kind] = pairs.get(kind, 0) + q.shape[1] * k.shape[1]
        return q

    for kind in ("FFAM", "sparse-causal"):
        frame_attention(*projected(1, frames, grid), frames, grid, HEADS, kind, 2, attend)
    assert pairs["FFAM"] / pairs["sparse-causal"] == pytest.approx((frames + 3) / 8)


def test_coarse_tokens_are_made_once_a_clip(monkeypatch):
    made = []
    monkeypatch.setattr(ffam, "pool_tokens", lambda *args: made.append(len(args[0])) or pool_tokens(*args))
    frame_attention(*projected(2, 5, (4, 6)), 5, (4, 6), HEADS)
    assert made == [10, 10]  # all frames' keys, all frames' values


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"kind": "linear"}, 'the attention is "linear"; it must be one of FFAM'),
        ({"factor": 0}, "the coarse factor is 0"),
        ({"frames": 4}, "got a batch of 6 for clips of 4 frames"),
        ({"grid": (4, 5)}, "got 24 tokens for a grid of 4 x 5: another patch"),
    ],
)
def test_what_does_not_fit_is_told(changed, told):
    given = {"frames": 3, "grid": (4, 6), "heads": HEADS, "kind": "FFAM", "factor": 2} | changed
    with pytest.raises(ValueError, match=told):
        frame_attention(*projected(2, 3, (4, 6)), **given)
