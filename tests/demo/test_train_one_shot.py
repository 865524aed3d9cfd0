"""The one-shot weights that come with Rewind: tuned on the clip that the workflow edits, the same bytes each time."""

from __future__ import annotations

import json

import pytest

from rewind.demo import train, train_one_shot
from rewind.demo.text_edits import KINDS, text_example
from rewind.demo.text_to_image import EI2_TUNING, EI2_WEIGHTS, build_image_unet
from rewind.pipelines.ei2.inflation import InflationSettings, architecture
from rewind.pipelines.ei2.weights import load_weights

SEED = train_one_shot.CLIP_SEED


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function: the command with words, and the file that it wrote."""
    file = tmp_path / "ei2" / "ei2.safetensors"
    monkeypatch.setattr(train_one_shot, "EI2_WEIGHTS", file)

    def command(*words):
        train.main(["one-shot", "--folder", str(tmp_path / "kept"), *words])
        assert not any((tmp_path / "kept").iterdir()), "a run that ended well leaves nothing behind"
        return file

    return command


def test_equal_runs_write_equal_files_and_another_clip_another(run):
    first, again, other = (
        run("--steps", "2", "--clip-seed", str(seed)).read_bytes() for seed in (SEED, SEED, SEED + 1)
    )
    assert first == again and len(first) < 3e6
    assert first != other


def test_the_file_tells_the_clip_and_how_it_was_tuned(run):
    """In the settings of the embedded model, but for what is given."""
    weights = load_weights(run("--steps", "1", "--seed", "3"))
    clip = text_example(SEED)
    assert weights.caption == clip.caption
    assert weights.settings == InflationSettings() and weights.architecture == architecture(build_image_unet())
    assert weights.about == {
        "steps": 1,
        "learning_rate": EI2_TUNING.learning_rate,
        "seed": 3,
        "frames": len(clip.source),
    }
    assert load_weights(run("--steps", "1", "--lr", "0.01")).about["learning_rate"] == 0.01


def test_by_default_it_is_the_clip_that_the_workflow_edits(root):
    workflow = json.loads((root / "workflows" / "ei2_load_weights.json").read_text(encoding="utf-8"))
    values = {node["type"]: node["widgets_values"] for node in workflow["nodes"]}
    edit, seed, *_ = values["RewindDemoTextEdit"]
    assert edit in KINDS and seed == SEED, "demo/train_one_shot.py tunes on another clip: change CLIP_SEED"
    assert values["RewindEI2LoadWeights"] == [EI2_WEIGHTS.name]
