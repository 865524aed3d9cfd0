"""Chunks of a clip: where they lie, and that what they show goes over from one to the next."""

from __future__ import annotations

import pytest
import torch

from rewind.pipelines.chunks import decode_in_chunks, spans


@pytest.mark.parametrize("frames", [1, 2, 7, 8, 9, 13, 14, 15, 25, 56, 100])
@pytest.mark.parametrize(("chunk", "overlap"), [(1, 0), (2, 1), (7, 0), (8, 2), (8, 4), (14, 3), (14, 7)])
def test_chunks_cover_the_clip_and_overlap(frames, chunk, overlap):
    parts = spans(frames, chunk, overlap)
    assert parts[0][0] == 0 and parts[-1][1] == frames
    sizes = [end - start for start, end in parts]
    assert max(sizes) <= chunk and max(sizes) - min(sizes) <= 1
    assert all(before[1] - after[0] == overlap for before, after in zip(parts, parts[1:]))
    fewer = len(parts) - 1
    assert fewer == 0 or fewer * (chunk - overlap) + overlap < frames, "one chunk less would not cover it"
    assert sum(sizes) == frames + (len(parts) - 1) * overlap, "nothing is decoded oftener than it must be"


@pytest.mark.parametrize(("chunk", "overlap"), [(0, 0), (8, 5), (8, -1), (1, 1)])
def test_chunks_that_cannot_be_are_refused(chunk, overlap):
    with pytest.raises(ValueError, match="at least|at most half"):
        spans(20, chunk, overlap)


@pytest.mark.parametrize(("chunk", "overlap"), [(4, 0), (5, 2), (6, 3), (20, 3)])
def test_a_decoder_that_sees_frames_alone_is_not_changed(chunk, overlap):
    latents = torch.randn(17, 4, 3, 2, generator=torch.Generator().manual_seed(0))
    sizes = []

    def decode(z):
        sizes.append(len(z))
        return z[:, :3] * 2 + 1

    torch.testing.assert_close(decode_in_chunks(decode, latents, chunk, overlap), decode(latents))
    assert max(sizes[:-1]) <= chunk


def test_without_overlap_the_chunks_stand_next_to_each_other_exactly():
    latents = torch.randn(10, 4, 3, 2, generator=torch.Generator().manual_seed(0))

    def decode(z):
        return z - z.mean()  # sees the chunk as a clip

    assert torch.equal(decode_in_chunks(decode, latents, 5, 0), torch.cat([decode(latents[:5]), decode(latents[5:])]))
    assert torch.equal(decode_in_chunks(decode, latents, 10, 5), decode(latents)), "all at once is what decode gives"


def test_chunks_go_over_into_each_other_in_even_steps():
    """A decoder that shows how often it was called: chunk 0 is black, chunk 1 white."""
    calls = []

    def decode(z):
        calls.append(len(z))
        return torch.full((len(z), 1), float(len(calls) - 1))

    shown = decode_in_chunks(decode, torch.zeros(13, 1), 8, 3)
    assert calls == [8, 8]
    wanted = [0] * 5 + [0.25, 0.5, 0.75] + [1] * 5
    torch.testing.assert_close(shown[:, 0], torch.tensor(wanted))


def test_a_step_at_a_chunks_end_is_spread_over_the_overlap():
    """Where each chunk is off by its own constant, the largest jump between two frames falls with the overlap."""
    jumps = {}
    for overlap in (0, 1, 3):
        offsets = iter((0.0, 1.0, 0.0, 1.0, 0.0, 1.0))
        shown = decode_in_chunks(lambda z, offsets=offsets: z + next(offsets), torch.zeros(30, 1), 12, overlap)
        jumps[overlap] = float(shown.diff(dim=0).abs().max())
    assert jumps == pytest.approx({0: 1.0, 1: 0.5, 3: 0.25})
