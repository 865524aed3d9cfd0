"""`rewind benchmark chunks`: what it calls a join, and that its figures are those of a known error."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from rewind import cli
from rewind.benchmarks import chunks


def test_a_join_is_what_two_chunks_share_and_a_frame_to_each_side():
    assert [list(join) for join in chunks.joins([(0, 8), (6, 14), (14, 20)])] == [[5, 6, 7, 8], [13, 14]]


def test_figures_are_those_of_a_known_error():
    """The second chunk is off by 0.1, all else is right: one step of the error, at the join."""
    whole = torch.full((12, 3, 4, 4), 0.5)
    shown = whole.clone()
    shown[6:] += 0.1
    found = chunks.beside(shown, whole, [(0, 6), (6, 12)])
    assert found["step_joins"] == pytest.approx(25.5, rel=1e-4) and found["step_middles"] == 0
    assert found["psnr_joins"] == pytest.approx(10 * torch.log10(torch.tensor(2 / 0.01)).item(), abs=0.01)  # half
    off = found["psnr_middles"] - 10 * torch.log10(torch.tensor(2 / 0.01)).item()
    assert abs(off) < 0.01, "half of the middles is off as well"


class Vae:
    """Whose frames are off by the length of the clip that it is told of."""

    def decode(self, part, num_frames):
        assert num_frames == len(part)
        return SimpleNamespace(sample=part[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3) + 0.01 * num_frames)


class Pipeline:
    vae, scaling_factor = Vae(), 0.18215

    def encode(self, video):
        return 0.1 * torch.rand(len(video), 4, 12, 12, generator=torch.Generator().manual_seed(0))


def test_every_way_to_cut_is_measured_and_written(tmp_path, capsys):
    records = chunks.main(2, "validation", 1, tmp_path, load=Pipeline)
    ways = sum(len(overlaps) for overlaps in chunks.CHUNKS.values())
    assert len(records) == 2 * ways
    by_way = {(r["chunk"], r["overlap"]): r for r in records}
    assert by_way[8, 0]["decoded"] == 1 and by_way[8, 4]["decoded"] == pytest.approx(1 + 4 * 6 / 32)
    assert by_way[8, 0]["psnr_middles"] == pytest.approx(-20 * torch.log10(torch.tensor(0.005 * 24)).item(), abs=0.1)
    text = (tmp_path / "chunks.md").read_text()
    assert text in capsys.readouterr().out and text.count("| 8 frames |") == len(chunks.CHUNKS[8])
    assert "2 clips of 32 frames of validation seeds" in text
    assert len(json.loads((tmp_path / "chunks.json").read_text())["records"]) == 2 * ways


def test_the_command_passes_its_options(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(chunks, "main", lambda *a, **k: asked.append((a, k)))
    assert cli.main(["benchmark", "chunks"]) == 0
    options = ["--clips", "3", "--seeds", "validation", "--workers", "2", "-o", str(tmp_path)]
    assert cli.main(["benchmark", "chunks", *options]) == 0
    assert asked[0][0] == (8, "test") and asked[1] == ((3, "validation"), {"workers": 2, "output": tmp_path})
