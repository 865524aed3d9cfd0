"""The presets say what the paper's ablation says, and nothing that the methods refuse."""

from __future__ import annotations

import re

import pytest
import torch

from rewind.pipelines.dreamix.corruption import coarse_size, degrade_time, noise_to_signal
from rewind.pipelines.dreamix.finetuning import FineTuning
from rewind.pipelines.dreamix.presets import PRESETS, Preset


def test_there_is_one_for_each_kind_of_edit():
    assert list(PRESETS) == ["motion", "style", "object", "background", "animate", "subject"]


def test_the_papers_ablation():
    trained = {kind: preset.fine_tune_steps > 0 for kind, preset in PRESETS.items()}
    assert not trained.pop("style") and not trained.pop("object")
    assert all(trained.values())
    assert all(0 < PRESETS[kind].alpha < 1 for kind in ("motion", "background")), "mixed"
    assert PRESETS["object"].alpha == 1, "the clip alone is the second choice"
    assert PRESETS["animate"].alpha == PRESETS["subject"].alpha == 0, "frames alone"


def test_only_a_subject_begins_from_pure_noise():
    assert [kind for kind, preset in PRESETS.items() if noise_to_signal(preset.s) == float("inf")] == ["subject"]
    assert all(0.2 <= preset.second_pass <= 0.4 for preset in PRESETS.values())


@pytest.mark.parametrize("kind", PRESETS)
def test_every_setting_is_accepted(kind):
    preset = PRESETS[kind]
    FineTuning(steps=preset.fine_tune_steps, alpha=preset.alpha)
    assert coarse_size(96, 96, preset.factor)[0] <= 96
    assert degrade_time(torch.zeros(8, 3, 8, 8), preset.stride).shape == (8, 3, 8, 8)


def test_a_preset_tells_all_of_itself():
    preset = Preset(s=0.91, factor=3.5, stride=7, alpha=0.25, fine_tune_steps=120, second_pass=0.35)
    assert {float(number) for number in re.findall(r"[\d.]+", str(preset))} == set(vars(preset).values())
