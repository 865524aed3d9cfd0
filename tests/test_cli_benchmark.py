"""`rewind benchmark`: which benchmarks it starts, with what, and what it refuses before any work."""

from __future__ import annotations

import inspect

import pytest

from rewind import cli
from rewind.benchmarks import cost, dreamix, model, round_trip, sweep, videoshop

DREAMIX_MAIN = dreamix.main  # tests put others in its place


@pytest.fixture
def asked(monkeypatch):
    """Which benchmarks were started, and with what."""
    calls = []
    for module in (model, videoshop, round_trip, sweep, dreamix, cost):
        name = module.__name__.rsplit(".", 1)[-1]
        monkeypatch.setattr(module, "main", lambda *a, _name=name, **k: calls.append((_name, a, k)))
    return calls


def test_a_failed_gate_fails_the_command_only_when_strict(monkeypatch):
    for passed, code in ((False, 1), (True, 0)):
        monkeypatch.setattr(model, "main", lambda *a, _passed=passed, **k: _passed)
        assert cli.main(["benchmark", "model"]) == 0
        assert cli.main(["benchmark", "model", "--strict"]) == code


def test_each_benchmark_has_its_seeds_and_number_of_clips(asked):
    for words in (["model"], ["videoshop"], ["videoshop", "--sweep", "threshold=1,2"], ["dreamix"], ["cost"]):
        assert cli.main(["benchmark", *words]) == 0
    assert [(name, a) for name, a, _ in asked] == [
        ("model", (64, "test")),
        ("videoshop", (32, "test", cli.EDITS)),
        ("round_trip", (16, "test")),
        ("sweep", (["threshold=1,2"], 8, "validation", sweep.KINDS)),
        ("dreamix", (10, "test")),
        ("cost", (None, 7, asked[-1][1][2])),
    ]


def test_a_part_of_the_benchmark_can_be_asked_for(asked):
    options = ["--clips", "3", "--seeds", "validation", "--workers", "2", "--kinds", "recolour", "add"]
    assert cli.main(["benchmark", "videoshop", *options, "--only", "edits"]) == 0
    assert cli.main(["benchmark", "videoshop", *options, "--only", "round-trip"]) == 0
    assert [(name, a, k["workers"]) for name, a, k in asked] == [
        ("videoshop", (3, "validation", ["recolour", "add"]), 2),
        ("round_trip", (3, "validation"), 2),
    ]


def test_too_few_clips_are_refused_before_any_work(asked, capsys):
    assert cli.main(["benchmark", "model", "--clips", "1"]) == 2
    assert not asked and "at least 2" in capsys.readouterr().err


def test_the_benchmark_of_dreamix_is_passed_its_options(asked, tmp_path, capsys):
    python = tmp_path / "python"
    python.touch()
    options = ["--clips", "3", "--seeds", "validation", "--workers", "2", "--runs", "4", "--tuning-clips", "0"]
    options += ["--motion-clips", "6"]
    options += ["--timed-runs", "5", "--python", str(python), "-o", str(tmp_path)]
    assert cli.main(["benchmark", "dreamix"]) == cli.main(["benchmark", "dreamix", *options]) == 0
    (_, _, plain), (_, given, told) = asked
    inspect.signature(DREAMIX_MAIN).bind(*given, **told)  # raises where the benchmark takes no such argument
    assert (plain["runs"], plain["swept_clips"], plain["cost_runs"], plain["python"]) == (1, 3, 3, None)
    assert plain["motion_clips"] == 0
    own = {"runs": 4, "swept_clips": 0, "cost_runs": 5, "python": python, "motion_clips": 6}
    assert (given, told) == ((3, "validation"), {"workers": 2, "output": tmp_path, **own})


@pytest.mark.parametrize(
    "options",
    [
        ["--runs", "0"],
        ["--tuning-clips", "-1"],
        ["--timed-runs", "-1"],
        ["--motion-clips", "-1"],
        ["--python", "absent/python"],
    ],
)
def test_hours_of_benchmark_are_refused_before_they_begin(asked, capsys, options):
    assert cli.main(["benchmark", "dreamix", *options]) == 2
    assert not asked and options[0] in capsys.readouterr().err
