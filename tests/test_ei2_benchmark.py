"""The benchmark of EI² measures what it says it measures."""

from __future__ import annotations

import inspect
import itertools
import json
import math

import pytest
import tiny_text_image
import torch

from rewind import cli
from rewind.benchmarks import ei2, inflating, inflation_cost, statistics
from rewind.benchmarks.inflating import Job, Studio
from rewind.demo import image_edits
from rewind.demo.image_edits import EDITS, SEEDS, Score, image_edit
from rewind.demo.models import ImageToVideoConfig, build_image_encoder
from rewind.pipelines.ei2.covariate_shift import Reading
from rewind.pipelines.ei2.pipeline import EI2Pipeline, EI2Result, EI2Settings
from rewind.pipelines.ei2.tuning import OneShot

SEED = SEEDS["validation"]
CLIPS, RUNS = 2, 2
TUNED = [method for method in ei2.METHODS if method.inflation is not None]
BY_NAME = {method.name: method for method in ei2.METHODS}


@pytest.fixture(scope="module")
def encoder():
    """The embedded image encoder's architecture, smaller still and with fresh weights."""
    torch.manual_seed(0)
    config = ImageToVideoConfig(context=32, clip_hidden=32, clip_layers=1)
    return build_image_encoder(config).eval().requires_grad_(False)


class Same:
    """In place of a model: frames are their own latents."""

    encode_clip = decode = staticmethod(lambda frames: frames)


class Knowing:
    """In place of a pipeline: answers by drawing, each method in its own way, and records what it was asked."""

    def __init__(self, clips=CLIPS, stop_after=math.inf):
        self.family, self.stop_after = Same(), stop_after
        self.tuned, self.asked, self.probed = [], [], []
        self.known = [image_edit(SEED + index, name) for index in range(clips) for name in EDITS]

    def tune(self, frames, caption, settings, inflation):
        if len(self.tuned) >= self.stop_after:
            raise KeyboardInterrupt
        assert caption == next(e.caption for e in self.known if torch.equal(e.example.source, frames))
        self.tuned.append((inflation, settings.steps, settings.seed))
        return (inflation, settings.steps), [8.0 / (i + 1) for i in range(settings.steps)]

    def edit(self, frames, prompt, settings, weights):
        (edit,) = [e for e in self.known if torch.equal(e.example.source, frames) and e.prompt == prompt]
        (name,) = [m.name for m in ei2.METHODS if m.inflation == (weights[0] if weights else None)]
        self.asked.append((name, edit.name, settings.patch_strength))
        truth, sign = edit.example.target, torch.tensor([1.0, -1.0] * 4)[:, None, None, None]
        answers = {
            ei2.PER_FRAME: (truth + 0.02 * sign).clamp(0, 1),  # right, and flickers
            ei2.TUNE_A_VIDEO: edit.example.source,
            ei2.TUNE_FFAM: truth.flip(0),  # moves back
            ei2.STAM_SPARSE: truth if edit.name == "colour" else edit.example.source,
        }
        return EI2Result(answers.get(name, truth), None, [], 75)

    def covariate_shift(self, frames, prompt, weights, seed):
        self.probed.append((seed, prompt))
        temporal, steps = weights[0].temporal, weights[1]
        mean = {"STAM": 0.1, "STAM without spectral normalisation": 0.1}.get(temporal, 0.4)
        variance = {"STAM": 0.5, "STAM with LayerNorm": 0.5}.get(temporal, 0.2)
        return [Reading("block", sigma, (steps > 0) * mean, (steps > 0) * variance) for sigma in (1.0, 2.0)]


@pytest.fixture(scope="module")
def done(encoder, tmp_path_factory):
    """A whole run on what is known: its records, its folder, and what was asked. Equal results are scored once."""
    knowing, folder, scores = Knowing(), tmp_path_factory.mktemp("results"), {}

    def score(edit, frames):
        key = (edit.prompt, frames.numpy().tobytes())
        if key not in scores:
            scores[key] = image_edits.score(edit, frames)
        return scores[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inflating, "score", score)
        options = {"runs": RUNS, "steps": 8, "timed_runs": 0}
        records = ei2.main(CLIPS, "validation", 1, folder, lambda: Studio(knowing, encoder), **options)
    return records, folder, knowing


# --- the edits --------------------------------------------------------------------------------------------------------


def test_each_method_is_tuned_once_a_clip_and_run_and_edits_all(done):
    records, _, knowing = done
    tunings = [tuned for tuned in knowing.tuned if tuned[1] > 0]
    assert sorted(map(repr, tunings)) == sorted(
        repr((method.inflation, 8, run)) for method in TUNED for run in range(RUNS) for _ in range(CLIPS)
    )
    edited = [name for name, _, strength in knowing.asked if strength == 1]
    assert edited.count(ei2.OWN) == CLIPS * RUNS * len(EDITS) and len(edited) == len(tunings) * len(EDITS)
    plain = [(name, edit) for name, edit, strength in knowing.asked if strength == 0]
    assert plain == [(ei2.PER_FRAME, edit) for _ in range(CLIPS) for edit in EDITS]
    assert len(records) == CLIPS * len(EDITS) * (len(inflating.REFERENCES) + 1 + RUNS * len(TUNED))
    assert {seed for seed, _ in knowing.probed} == {SEED, SEED + 1}


def test_the_scores_tell_the_methods_apart(done):
    records = done[0]

    def rates(name):
        return [statistics.per_clip(ei2.of(records, name), key) for key in ("edited", "kept", "success")]

    everywhere, nowhere, third = [1.0, 1.0], [0.0, 0.0], [pytest.approx(1 / 3)] * 2
    assert rates(inflating.REFERENCES[0]) == rates(ei2.OWN) == rates(ei2.PER_FRAME) == [everywhere] * 3
    assert rates(inflating.REFERENCES[1]) == rates(ei2.TUNE_A_VIDEO) == [nowhere, everywhere, nowhere]
    assert rates(ei2.TUNE_FFAM) == [everywhere, nowhere, nowhere]
    assert rates(ei2.STAM_SPARSE) == [third, everywhere, third]
    own, flickering, backwards = (ei2.of(records, name) for name in (ei2.OWN, ei2.PER_FRAME, ei2.TUNE_FFAM))
    assert all(record["warp_error"] < 1e-3 for record in own)
    assert all(record["warp_error"] == pytest.approx(0.04, rel=0.05) for record in flickering)
    # The same frames in another order, along another path.
    for one, other in zip(own, backwards, strict=True):
        assert one["similarity"] == pytest.approx(other["similarity"], abs=1e-5)
        assert other["warp_error_object"] > 5 * one["warp_error_object"]


def test_shifts_and_losses_are_those_of_the_tuning(done):
    for record in ei2.of(done[0], ei2.LAYER_NORM):
        assert (record["mean_shift_before"], record["variance_shift_before"]) == (0, 0)
        assert record["mean_shift_source"] == record["mean_shift_edit"] == pytest.approx(0.4)
        assert record["variance_shift_edit"] == pytest.approx(0.5)
        assert record["loss"] == pytest.approx((8 / 7 + 8 / 8) / 2)  # of the last quarter of 8 steps
    assert all("mean_shift_edit" not in record and "loss" not in record for record in ei2.of(done[0], ei2.PER_FRAME))


def test_the_tables_are_printed_and_kept_with_the_records(done):
    records, folder, _ = done
    text, data = (folder / "ei2.md").read_text(), json.loads((folder / "ei2.json").read_text())
    for title in ("Edits", "Fidelity", "Consistency", "Covariate shift", "Seeds of tuning", "claims", "Cost"):
        assert f"\n## {title}" in text or f"\n## The paper's {title}" in text
    assert "Not measured (`--timed-runs 0`)" in text and data["costs"] is None
    assert f"{CLIPS * len(EDITS)} edits of {CLIPS} clips of validation seeds, {RUNS} seeds of tuning" in text
    assert data["records"] == json.loads(json.dumps(records)) and data["tuning"]["steps"] == 8
    assert text.count(inflating.REFERENCES[0]) == 3 and text.count("STAM raises") == 2
    assert not list(folder.glob("*.partial*"))


def test_an_interrupted_run_goes_on_where_it_stopped(encoder, tmp_path, monkeypatch):
    missing = Score(False, False, {}, *[math.nan] * 4)
    monkeypatch.setattr(inflating, "score", lambda edit, frames: missing)
    stopped, again = Knowing(1, stop_after=6), Knowing(1)
    settings = {"runs": 1, "steps": 1, "timed_runs": 0}
    with pytest.raises(KeyboardInterrupt):
        ei2.main(1, "validation", 1, tmp_path, lambda: Studio(stopped, encoder), **settings)
    ei2.main(1, "validation", 1, tmp_path, lambda: Studio(again, encoder), **settings)
    assert {name for name, *_ in stopped.asked} == {ei2.PER_FRAME, *(m.name for m in TUNED[:3])}
    assert {name for name, *_ in again.asked} == {m.name for m in TUNED[3:]}
    text = (tmp_path / "ei2.md").read_text()
    assert "paper's claims" not in text and "Seeds of tuning" not in text  # of one clip and one seed nothing is claimed


def test_the_work_is_done_on_a_real_pipeline(encoder):
    studio = Studio(EI2Pipeline(tiny_text_image.family()), encoder)
    brief = {"settings": EI2Settings(steps=1, guidance=3.0), "tuning": OneShot(steps=2, learning_rate=1e-2)}
    plain, own = (inflating.work(studio, Job(SEED, BY_NAME[name], **brief)) for name in (ei2.PER_FRAME, ei2.OWN))
    assert [record["edit"] for record in own] == [*EDITS]
    for record, other in zip(own, plain, strict=True):
        assert record["mean_shift_before"] == record["variance_shift_before"] == 0
        assert record["variance_shift_edit"] > 0 and record["mean_shift_edit"] > 0
        assert record["evaluations"] == other["evaluations"] == 3
        assert record["warp_error"] != other["warp_error"]


def test_equal_frames_are_alike_and_others_less(encoder):
    studio, frames = Studio(None, encoder), image_edit(SEED, "colour").example.source
    assert studio.similarity(frames[:1].expand(3, -1, -1, -1)) == pytest.approx(1, abs=1e-5)
    cut = torch.cat([frames[:4], 1 - frames[:4]])
    assert studio.similarity(cut) < studio.similarity(frames) < 1


# --- claims -----------------------------------------------------------------------------------------------------------


def test_the_claims_are_judged_by_the_numbers(done):
    rows = [line.split(" | ") for line in ei2.claims_table(done[0]).splitlines()[2:]]
    found = {(row[0].removeprefix("| "), row[1]): row[-1].removesuffix(" |") for row in rows}
    with_sparse = f"{ei2.STAM_SPARSE} against {ei2.TUNE_A_VIDEO}"
    with_ffam = f"{ei2.OWN} against {ei2.TUNE_FFAM}"
    assert len(found) == len(ei2.CLAIMS)
    assert found["STAM lowers the mean shift", with_sparse] == "reproduced"
    assert found["STAM lowers the mean shift", with_ffam] == "reproduced"
    assert found["STAM lowers the variance shift", with_ffam] == "NOT reproduced: the reverse holds"
    assert found["STAM raises the success of edits at equal tuning", with_ffam] == "reproduced"
    assert found["Instance Centering lowers the mean shift", f"{ei2.OWN} against {ei2.LAYER_NORM}"] == "reproduced"
    no_spectral = f"{ei2.OWN} against {ei2.NO_SPECTRAL}"
    assert found["spectral normalisation lowers the variance shift", no_spectral] == "NOT reproduced: the reverse holds"


@pytest.mark.parametrize(
    ("own", "base", "lower", "wanted"),
    [
        ([0.9, 0.8, 1.0, 0.9], [0.5, 0.4, 0.5, 0.4], False, "reproduced"),
        ([0.9, 0.8, 1.0, 0.9], [0.5, 0.4, 0.5, 0.4], True, "NOT reproduced: the reverse holds"),
        ([0.5, 0.4, 0.5, 0.4], [0.9, 0.8, 1.0, 0.9], True, "reproduced"),
        ([0.9, 0.2, 1.0, 0.3], [0.5, 0.4, 0.5, 0.4], False, "NOT reproduced: inside the noise"),
        ([0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5], True, "NOT reproduced: inside the noise"),
    ],
)
def test_a_claim_needs_a_gain_beyond_the_noise(own, base, lower, wanted):
    records = [
        {"method": name, "edit": "colour", "seed": seed, "x": value}
        for name, values in (("A", own), ("B", base))
        for seed, value in enumerate(values)
    ]
    *_, mean, bound, told = ei2.claim_row(records, ei2.Claim("it is better", "A", "B", "x", 2, lower))
    assert told == wanted and (float(bound) > 0) == (wanted == "reproduced") and float(mean) >= float(bound)


def test_what_is_no_number_does_not_count():
    records = [{"seed": seed, "x": value} for seed, value in ((1, 2.0), (1, math.nan), (2, 4.0), (3, math.nan))]
    assert statistics.per_clip(records, "x")[:2] == [2.0, 4.0] and math.isnan(statistics.per_clip(records, "x")[2])
    assert statistics.estimate(records[:2], "x", 1) == "2.0"
    assert statistics.estimate(records, "x", 1).startswith("3.0 (") and statistics.estimate(records[3:], "x") == "-"
    own = [{"seed": seed, "x": 5.0} for seed in (1, 2, 3)]
    assert statistics.margin(own, records, "x")[0] == pytest.approx(2.0)


def test_the_spread_over_seeds_of_tuning_is_that_of_whole_runs():
    keys = dict.fromkeys(ei2.OVER_SEEDS, 0.0)
    records = [
        keys | {"method": "A", "edit": "colour", "seed": seed, "run": run, "success": value}
        for seed, run, value in ((1, 0, 1.0), (2, 0, 0.0), (1, 1, 1.0), (2, 1, 1.0))
    ]
    assert "| A | 0.75 ± 0.35 |" in ei2.seeds_table(records, ["A"])


# --- costs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", inflation_cost.FRAMES)
def test_the_operations_are_those_of_the_formula(frames):
    sparse, ffam = (inflation_cost.operations(kind, frames, 8) for kind in ("sparse-causal", "FFAM"))
    assert sparse == 4 * frames * 64 * (2 * 64) * inflation_cost.WIDTH
    assert ffam / sparse == (frames + 3) / 8
    assert inflation_cost.operations("FFAM", frames, 9) > ffam * (81 / 64) ** 2  # an odd grid has more coarse tokens


def attention(factor=lambda frames: 1.0):
    """Rows as measured, FFAM's time being so many times what it should be."""
    return [
        {
            "frames": frames,
            "grid": grid,
            "seconds": {"sparse-causal": [1.0, 1.0, 9.0], "FFAM": [(frames + 3) / 8 * factor(frames)] * 3},
        }
        for frames in (4, 8)
        for grid in (4, 6)
    ]


def test_the_cost_is_reproduced_only_where_every_length_is_near():
    assert "**reproduced**" in ei2.attention_verdict(attention())
    assert "**reproduced**" in ei2.attention_verdict(attention(lambda frames: 1.1))
    for factor in (lambda frames: 1.3 if frames == 8 else 1.0, lambda frames: 0.7):
        assert "**NOT reproduced**" in ei2.attention_verdict(attention(factor))
    line = ei2.attention_table(attention(lambda frames: 2.0)).splitlines()[2]
    assert line.endswith("| 1.75 | 0.88 | 0.88 |")


def test_both_attentions_are_timed_in_turn(monkeypatch):
    asked = []
    monkeypatch.setattr(inflation_cost, "frame_attention", lambda *a, **k: asked.append((a[3], a[4], a[6])))
    seconds = inflation_cost.attention_seconds(None, inflation_cost.Attention(3, 4, 2, width=8, heads=2))
    assert asked == [(3, (4, 4), kind) for _ in range(3) for kind in ("FFAM", "sparse-causal")]
    assert {kind: len(taken) for kind, taken in seconds.items()} == {"FFAM": 2, "sparse-causal": 2}


def test_methods_are_timed_without_the_vae(encoder, monkeypatch):
    family = tiny_text_image.family()
    monkeypatch.setattr(family.vae, "encode", None)
    monkeypatch.setattr(family.vae, "decode", None)
    methods = (BY_NAME[ei2.PER_FRAME], BY_NAME[ei2.OWN])
    job = inflation_cost.Timing(4, methods, 1, steps=2)
    found = inflation_cost.method_seconds(Studio(EI2Pipeline(family), encoder), job)
    lengths = {name: {part: len(taken) for part, taken in parts.items()} for name, parts in found.items()}
    assert lengths == {ei2.PER_FRAME: {"tuning": 0, "sampling": 1}, ei2.OWN: {"tuning": 2, "sampling": 1}}
    assert all(second > 0 for parts in found.values() for taken in parts.values() for second in taken)


def test_memory_is_that_before_and_after_one_part(encoder, monkeypatch):
    pipeline, asked = EI2Pipeline(tiny_text_image.family()), []
    tune, edit = EI2Pipeline.tune, EI2Pipeline.edit
    monkeypatch.setattr(EI2Pipeline, "tune", lambda s, f, c, t, i: asked.append(t.steps) or tune(s, f, c, t, i))
    monkeypatch.setattr(EI2Pipeline, "edit", lambda *a: asked.append("edit") or edit(*a))
    held = itertools.count(100)
    monkeypatch.setattr(inflation_cost, "peak_memory", lambda: asked.append("?") or next(held))
    for part, wanted in (("tuning", [0, "?", 2, "?"]), ("sampling", [0, "?", "edit", "?"])):
        asked.clear()
        found = inflation_cost.peaks(Studio(pipeline, encoder), inflation_cost.Memory(4, BY_NAME[ei2.OWN], part))
        assert asked == wanted and found["peak"] == found["before"] + 1
    listed = [(job.method.name, job.part) for job in inflation_cost.memory_jobs(ei2.METHODS)]
    assert len(listed) == 2 * len(TUNED) + 1 and (ei2.PER_FRAME, "tuning") not in listed


def test_costs_are_told_against_tune_a_video():
    found = {
        ei2.PER_FRAME: {"tuning": [], "sampling": [0.2]},
        ei2.TUNE_A_VIDEO: {"tuning": [1.0, 1.0, 3.0], "sampling": [0.4]},
        ei2.OWN: {"tuning": [1.5], "sampling": [0.5]},
    }
    lines = ei2.seconds_table(found, OneShot(steps=60), 75).splitlines()[2:]
    assert lines[0] == "| per-frame editing | - | - | - | 0.200 | 0.50 | 15 |"
    assert lines[2] == "| EI² | 1.500 | 1.50 | 90 | 0.500 | 1.25 | 38 |"
    one = {"before": 500.0, "peak": 900.0}
    table = ei2.memory_table({ei2.PER_FRAME: {"sampling": one}, ei2.OWN: {"tuning": one | {"peak": 2000.0}}})
    loaded, plain, own = table.splitlines()[2:]
    assert loaded.endswith("| 500 | 500 |") and plain.endswith("| - | 900 |") and own.endswith("| 2000 | - |")


def test_the_costs_are_measured_for_every_method_and_size(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        inflation_cost, "memory", lambda model, job, load: asked.append(job) or {"before": 1.0, "peak": 2.0}
    )
    monkeypatch.setattr(
        inflation_cost,
        "attention_seconds",
        lambda model, job: asked.append(job) or {"FFAM": [(job.frames + 3) / 8], "sparse-causal": [1.0]},
    )
    monkeypatch.setattr(
        inflation_cost,
        "method_seconds",
        lambda model, job: asked.append(job) or {m.name: {"tuning": [1.0], "sampling": [model]} for m in job.methods},
    )
    costs = ei2.measure_costs(lambda: 0.5, 2, tmp_path / "kept")
    text = ei2.cost_report(costs, OneShot(steps=60), 75)
    assert len(asked) == 13 + len(ei2.FRAMES) * len(ei2.GRIDS) + len(ei2.SIDES)
    assert "Seconds on latents of 12 x 12" in text and "64 x 64" in text and "**reproduced**" in text
    assert text.count("| EI² |") == len(ei2.SIDES) + 1
    asked.clear()
    assert ei2.measure_costs(lambda: 0.5, 2, tmp_path / "kept") == costs and not asked


# --- the command ------------------------------------------------------------------------------------------------------

MAIN = ei2.main


@pytest.fixture
def started(monkeypatch):
    """With what the benchmark was started."""
    calls = []
    monkeypatch.setattr(ei2, "main", lambda *a, **k: calls.append((a, k)))
    return calls


def test_the_command_passes_its_options(started, tmp_path):
    options = ["--clips", "3", "--seeds", "validation", "--workers", "2", "--runs", "4", "--steps", "9"]
    options += ["--timed-runs", "5", "-o", str(tmp_path)]
    assert cli.main(["benchmark", "ei2"]) == cli.main(["benchmark", "ei2", *options]) == 0
    (given, told), (chosen, own) = started
    inspect.signature(MAIN).bind(*given, **told)  # raises where the benchmark takes no such argument
    assert given == (ei2.CLIPS, "test") and ei2.CLIPS * len(EDITS) >= 16
    assert (told["runs"], told["steps"], told["timed_runs"]) == (ei2.RUNS, ei2.TUNING.steps, ei2.TIMED_RUNS)
    assert chosen == (3, "validation")
    assert own == {"runs": 4, "steps": 9, "timed_runs": 5, "workers": 2, "output": tmp_path}


@pytest.mark.parametrize("options", [["--runs", "0"], ["--steps", "0"], ["--timed-runs", "-1"], ["--clips", "1"]])
def test_hours_of_benchmark_are_refused_before_they_begin(started, capsys, options):
    assert cli.main(["benchmark", "ei2", *options]) == 2
    assert not started and options[0] in capsys.readouterr().err
