"""`rewind benchmark long`: its windows and its ways are what they say, its figures those of a known error."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import tiny_svd
import torch

from rewind import cli
from rewind.benchmarks import long, windows
from rewind.demo.clip import example, world_of
from rewind.pipelines.videoshop.pipeline import VideoshopPipeline
from rewind.pipelines.videoshop.settings import VideoshopSettings

QUICK = VideoshopSettings(steps=2, strength=1.0, sigma_max=20.0)


@pytest.fixture(scope="module")
def pipeline() -> VideoshopPipeline:
    return VideoshopPipeline(*tiny_svd.components())


@pytest.fixture(scope="module")
def chosen():
    return example(1000, "recolour", world=world_of(long.FRAMES))


# --- windows ----------------------------------------------------------------------------------------------------------


def test_a_window_can_be_told_of_its_own_frame_of_the_step_before(pipeline):
    told, settings = [], VideoshopSettings(augmentation=0.0)
    made = windows.OwnFramePipeline(pipeline, 4).condition(torch.rand(3, 32, 48), settings)

    class Unet:
        dtype = torch.float32

        def __call__(self, sample, *rest, **more):
            told.append(sample[0, 0, 4:].clone())
            return (pipeline.unet(sample, *rest, **more)[0],)

    made.unet, first = Unet(), made.image_latents[0]
    x, sigma = torch.randn(6, 4, 4, 6, generator=torch.Generator().manual_seed(0)), 3.0 * torch.ones(6)
    before = made(x, sigma)
    made(x, sigma)
    assert len(told) == 4 and all(torch.equal(frame, first) for frame in told[:3])
    torch.testing.assert_close(told[3], before[2] / pipeline.scaling_factor)


# --- the ways ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", long.WAYS, ids=lambda way: way.name)
def test_each_way_edits_the_whole_clip(pipeline, chosen, way):
    small = replace(chosen, source=chosen.source[:, :, ::3, ::3], target=chosen.target[:, :, ::3, ::3])
    job = long.Job(1000, ("recolour",), way, QUICK)
    called = []
    hook = pipeline.unet.register_forward_hook(lambda *_: called.append(1))
    ((frames, calls),) = long.edited(pipeline, job, [small])
    hook.remove()
    assert frames.shape == small.source.shape and torch.isfinite(frames).all()
    assert calls == 2 * (5 if way.at_once else 7 if way.windows else 1)
    assert len(called) == 2 * calls, "as many there as back"
    ((other, _),) = long.edited(pipeline, replace(job, seed=1001), [small])
    assert not torch.equal(frames, other), "the seed draws the random direction"


def test_a_known_error_is_measured_at_the_joins(chosen):
    """From the third part on the clip is lighter: one step of the colour, at a join."""
    at = long.joins()
    assert len(at) == 4 and all(start in range(6, 32) for start in at)
    right = long.measure(chosen.target, chosen)
    assert right["psnr_edit"] == 100 and right["colour_joins"] == right["colour_middles"] == right["drift"] == 0
    lighter = chosen.target.clone()
    lighter[at[1] + 1 :] += 10 / 255
    found = long.measure(lighter, chosen)
    assert found["colour_middles"] == pytest.approx(0, abs=1e-3)
    assert found["colour_joins"] == pytest.approx(3**0.5 * 10 / len(at), rel=1e-3)
    assert found["drift"] == pytest.approx(3**0.5 * 10, rel=1e-3)
    still = chosen.target.clone()
    still[at[1] + 1 :] = still[at[1]]
    assert long.measure(still, chosen)["flow_middles"] > right["flow_middles"] + 0.1


def test_everything_is_measured_and_written(pipeline, tmp_path, capsys, monkeypatch):
    taken = {
        name: {part: {"before": 10.0, "peak": 10.0 + 5 * number * size} for size, part in enumerate(long.PARTS, 1)}
        for number, name in enumerate(long.MEMORY, 1)
    }
    monkeypatch.setattr(long, "measure_memory", lambda load: taken)
    monkeypatch.setattr(long, "edited", lambda model, job, chosen: [(c.target, 13) for c in chosen])
    records = long.main(2, "validation", ("recolour", "background"), 1, tmp_path, lambda: pipeline, QUICK)
    assert len(records) == 2 * 2 * (1 + len(long.WAYS))
    text = (tmp_path / "long.md").read_text()
    assert text in capsys.readouterr().out
    assert "2 clips of validation seeds, edits recolour, background" in text
    assert "| 8 frames at once: one window | 5 | 1.00 | 10 | 1.00 |" in text and "| 10 | 2.00 | 20 | 2.00 |" in text
    assert f"Fewer than {long.CLIPS} clips: a lead, not a result." in text
    assert text.count("inside the noise") == len(long.WAYS) - 1, "all are right here"
    assert len(json.loads((tmp_path / "long.json").read_text())["records"]) == len(records)


@pytest.mark.slow
def test_memory_is_measured_in_processes_of_their_own():
    found = long.measure_memory(tiny_svd.pipeline)
    assert list(found) == list(long.MEMORY)
    for own in found.values():
        assert list(own) == list(long.PARTS) and all(one["peak"] >= one["before"] > 0 for one in own.values())
    assert long.THRESHOLD not in os.environ


def test_without_the_vae_the_network_is_what_is_left(pipeline):
    bare = VideoshopPipeline(pipeline.unet, long.NoVae(), pipeline.image_encoder)
    result = bare(torch.rand(4, 3, 32, 48), torch.rand(3, 32, 48), QUICK, progress=False)
    assert result.frames.shape == (4, 3, 32, 48) and result.latents.shape == (4, 4, 4, 6)


def test_the_command_passes_its_options(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(long, "main", lambda *args, **options: asked.append((args, options)))
    assert cli.main(["benchmark", "long"]) == 0
    words = ["--clips", "3", "--seeds", "validation", "--kinds", "add", "--workers", "1", "-o", str(tmp_path)]
    assert cli.main(["benchmark", "long", *words]) == 0
    assert asked[0][0] == (long.CLIPS, "test", long.KINDS)
    assert asked[1] == ((3, "validation", ["add"]), {"workers": 1, "output": tmp_path})
