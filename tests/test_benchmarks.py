"""The benchmarks measure what they say they measure."""

from __future__ import annotations

import json
import math
import operator
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_text_image
import tiny_text_video
import torch
from quick import quick_pipeline

from rewind.benchmarks import cost, editing, model, round_trip, runner, sweep, text_to_image, text_to_video, videoshop
from rewind.demo.clip import SEEDS, example
from rewind.pipelines.dreamix.pipeline import DreamixPipeline
from rewind.pipelines.evaluation.metrics import PSNR_CAP
from rewind.pipelines.videoshop.settings import DEFAULT, NAIVE, PAPER, REFERENCE

SEED = SEEDS["validation"]


@pytest.fixture(scope="module")
def pipeline():
    return quick_pipeline()


@pytest.fixture(scope="module")
def text_pipeline():
    """The embedded text-to-video model's architecture, tiny and with fresh weights."""
    return DreamixPipeline(tiny_text_video.family("TextSVD"))


def short(settings, steps=4):
    return replace(settings, steps=steps)


# --- runner -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_work_comes_back_in_order_with_its_progress(workers, capsys):
    assert runner.run(operator.add, [5, 3, 8], "sums", workers, load=int) == [5, 3, 8]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and lines[-1].startswith("sums: 3/3")


class Counting:
    """A model, and how often it was asked."""

    def __init__(self):
        self.asked = []

    def answer(self, item):
        self.asked.append(item)
        if item == "broken":
            raise RuntimeError("interrupted")
        return {"of": item, "value": math.nan}


def test_an_interrupted_run_goes_on_from_what_was_kept(tmp_path):
    kept, counting = tmp_path / "new" / "kept.jsonl", Counting()
    with pytest.raises(RuntimeError):
        runner.run(Counting.answer, ["a", "b", "broken"], "work", 1, lambda: counting, kept)
    again = Counting()
    results = runner.run(Counting.answer, ["a", "c", "b"], "work", 1, lambda: again, kept)
    assert (again.asked, [r["of"] for r in results]) == (["c"], ["a", "c", "b"])
    assert math.isnan(results[0]["value"])


def test_what_other_weights_gave_is_not_kept(tmp_path, monkeypatch):
    from rewind.demo import models

    kept, weights = tmp_path / "kept.jsonl", tmp_path / "weights"
    monkeypatch.setattr(models, "WEIGHTS", weights)
    for content, asked in ((b"one", ["a"]), (b"one", []), (b"two", ["a"])):
        weights.write_bytes(content)
        counting = Counting()
        runner.run(Counting.answer, ["a"], "work", 1, lambda held=counting: held, kept)
        assert counting.asked == asked


def test_summaries_leave_out_what_is_no_number():
    assert runner.summary([1.0, math.nan, 3.0]) == {"mean": 2.0, "sd": pytest.approx(2**0.5), "n": 2}
    assert runner.mean_sd([1.0, 3.0], 1) == "2.0 ± 1.4"
    assert runner.mean_sd([2.0], 1) == "2.0"
    assert runner.mean_sd([math.nan], 1) == "-"


def test_results_are_printed_and_written(tmp_path, capsys):
    runner.save("a", runner.table(["x", "y"], [["1", "2"]]), {"v": [math.nan, 1.0, {"w": math.inf}]}, tmp_path / "new")
    assert (tmp_path / "new" / "a.md").read_text() == "| x | y |\n| :-- | --: |\n| 1 | 2 |\n"
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"v": [None, 1.0, {"w": None}]}
    assert "| 1 | 2 |" in capsys.readouterr().out


# --- editing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [PAPER, REFERENCE], ids=["paper", "reference"])
def test_the_reusable_steps_are_the_pipeline(pipeline, settings):
    chosen, settings = example(SEED), short(settings)
    generator = torch.Generator().manual_seed(SEED)
    whole = pipeline(chosen.source, chosen.edited_frame, settings, generator, progress=False)
    editor = editing.ClipEditor(pipeline, chosen.source, SEED)
    inversion = editor.invert(settings)
    latents, calls = editor.play(inversion, chosen.edited_frame, settings)
    torch.testing.assert_close(editor.finish(latents, chosen.edited_frame, settings), whole.frames)
    assert {"inversion": inversion.evaluations, "denoising": calls} == whole.evaluations


def test_the_hosts_naive_inversion_is_another_one(pipeline):
    editor, settings = editing.ClipEditor(pipeline, example(SEED).source, SEED), short(NAIVE)
    ours, host = editor.invert(settings), editor.invert(settings, "host")
    assert torch.equal(ours.sigmas, host.sigmas)
    assert ours.evaluations == host.evaluations == len(host.sigmas) - 1
    assert not torch.allclose(ours.latent, host.latent)
    assert torch.isfinite(host.latent).all()


def test_a_measure_knows_the_truth_from_the_source():
    chosen = example(SEED, "recolour")
    truth, source = (editing.measure(clip, chosen, with_flow=False) for clip in (chosen.target, chosen.source))
    assert truth["psnr_edit"] == source["psnr_source"] == truth["psnr_unedited"] == PSNR_CAP
    assert truth["psnr_source"] == source["psnr_edit"] < 15
    assert truth["colour_transfer"] == pytest.approx([1.0] * 8)
    assert source["colour_transfer"] == pytest.approx([0.0] * 8)
    assert editing.measure(chosen.source, example(SEED, "reshape"), with_flow=False)["colour_transfer"] is None


def test_the_flow_error_tells_the_true_motion_from_a_still():
    pytest.importorskip("cv2")
    chosen = example(SEED, "recolour")
    still = chosen.target[:1].expand_as(chosen.target)
    assert editing.measure(chosen.target, chosen)["flow_error"] < 0.5 * editing.measure(still, chosen)["flow_error"]


def test_variants_share_inversions_but_not_results(pipeline):
    base = short(PAPER, 2)
    chosen = [
        editing.Variant("a", base),
        editing.Variant("b", replace(base, rescale=0.0)),
        editing.Variant("c", replace(base, first_guidance=2.0, last_guidance=2.0)),
        editing.Variant("d", replace(base, guess_below="current")),
        editing.Variant("e", base, "noise"),
    ]
    work_list = editing.jobs([SEED], ("recolour", "remove"), chosen, with_flow=False)
    assert sorted(tuple(v.name for v in job.variants) for job in work_list) == [(), ("a", "b", "c"), ("d",), ("e",)]
    with editing.counted(pipeline.unet) as calls:
        records = [record for job in work_list for record in editing.work(pipeline, job)]
    # Inversions of a-c and d; for each of two kinds: a = b, c with guidance, d, e.
    assert len(calls) == 2 + 2 + 2 * (2 + 4 + 2 + 2)
    assert len(records) == 2 * (len(editing.REFERENCES) + 5)
    by_name = {r["variant"]: r for r in records if r["kind"] == "recolour"}
    assert (by_name["c"]["evaluations_inversion"], by_name["c"]["evaluations_denoising"]) == (2, 4)
    assert (by_name["e"]["evaluations_inversion"], by_name["e"]["evaluations_denoising"]) == (0, 2)
    assert len({by_name[name]["psnr_edit"] for name in "abcde"}) == 5
    assert by_name["true edit"]["psnr_edit"] == PSNR_CAP


def test_in_turn_each_clip_gets_one_kind_of_edit_and_none_is_left_out():
    work_list = editing.jobs([5, 6, 7], ("recolour", "add"), [editing.Variant("a", PAPER)], in_turn=True)
    assert [(job.seed, job.kinds) for job in work_list if job.variants] == [
        (5, ("recolour",)),
        (6, ("add",)),
        (7, ("recolour",)),
    ]


# --- the gates --------------------------------------------------------------------------------------------------------


def rows(value, spread, count=64):
    return [{gate.key: value(gate) + spread * (-1) ** i for gate in model.GATES} for i in range(count)]


def test_a_gate_is_passed_by_its_lower_bound_not_by_its_mean():
    above = model.judge(rows(lambda gate: gate.limit + 0.1, 0.1))
    wide = model.judge(rows(lambda gate: gate.limit + 0.1, 1.0))
    assert all(verdict["passed"] for verdict in above)
    assert not any(verdict["passed"] for verdict in wide)
    assert all(verdict["mean"] > verdict["needed"] > verdict["lower_bound"] for verdict in wide)


def test_the_gates_are_those_of_the_embedded_model():
    limits = {gate.key: gate.limit for gate in model.GATES}
    assert limits == {
        "vae": 32,
        "image_to_video": 24,
        "image_to_video_gain": 5,
        "colour_transfer": 0.8,
        "edit_over_static": 3,
        "edit_over_random": 3,
    }


def test_plain_image_to_video_is_guided_as_svd_is_and_videoshop_as_by_default(pipeline, monkeypatch):
    asked, plain = [], pipeline.image_to_video

    def record(picture, settings, *rest):
        asked.append((settings.first_guidance, settings.last_guidance, settings.motion_bucket))
        return plain(picture, settings, *rest)

    monkeypatch.setattr(pipeline, "image_to_video", record)
    model.measure(pipeline, SEEDS["validation"], short(DEFAULT, 2))
    told = round(example(SEEDS["validation"], motion="predictable").motion_bucket)
    assert asked == [(1.0, 3.0, told), (1.0, 3.0, DEFAULT.motion_bucket)]
    assert (DEFAULT.first_guidance, DEFAULT.last_guidance) == (1.0, 1.0)


def test_a_failed_gate_is_printed_with_its_true_numbers(pipeline, text_pipeline, tmp_path, capsys):
    by_text = (lambda: text_pipeline), replace(text_to_video.SETTINGS, steps=2)
    of_images = tiny_text_image.family, text_to_image.Sampling(steps=2)
    passed = model.main(2, "validation", 1, tmp_path, lambda: pipeline, short(DEFAULT, 2), *by_text, *of_images)
    assert not passed
    text, data = capsys.readouterr().out, json.loads((tmp_path / "model.json").read_text())
    assert text.count("FAILED") + text.count("PASSED") == len(model.GATES) + 3 + 2
    assert [len(data["captions"]), data["captions"][0]["caption"].count(" on a ")] == [2, 1]
    assert [len(data["pictures"]), data["pictures"][0]["caption"].count("moves")] == [2 * text_to_image.PICTURES, 0]
    assert "FAILED" in text and f"{data['gates'][0]['lower_bound']:.2f} dB" in text
    assert [len(data["clips"]), data["gates"][0]["n"]] == [2, 2]
    first = data["clips"][0]
    assert first["edit_over_static"] == pytest.approx(first["edit"] - first["edit_static"])
    assert first["image_to_video_gain"] == pytest.approx(first["image_to_video"] - first["frozen"])


# --- the tables -------------------------------------------------------------------------------------------------------


def test_the_rows_are_the_methods_each_with_normalisation_and_rescaling_turned():
    chosen = videoshop.variants()
    names = [variant.name for variant in chosen]
    assert len(set(names)) == len(names) == 7 + 2 * 6
    assert [v.start for v in chosen[:3]] == ["noise", "host", "inversion"]
    settings = {variant.name: variant.settings for variant in chosen}
    assert (settings["reference code"], settings["paper"], settings["our default"]) == (REFERENCE, PAPER, DEFAULT)
    assert settings["paper, without normalisation"] == replace(PAPER, normalise="off")
    assert settings["paper, without rescaling"] == replace(PAPER, rescale=0.0)


def test_the_table_tells_means_over_clips_of_means_over_kinds(pipeline, tmp_path, capsys):
    chosen = [editing.Variant("only", short(PAPER, 2))]
    records = videoshop.main(2, "validation", ("recolour", "remove"), 1, tmp_path, lambda: pipeline, chosen)
    own = [r for r in records if r["variant"] == "only"]
    clips = [[r["psnr_edit"] for r in own if r["seed"] == SEED + i] for i in range(2)]
    assert all(len(values) == 2 for values in clips)
    assert videoshop.per_clip(own, "psnr_edit") == pytest.approx([sum(values) / 2 for values in clips])
    transfers = [r["colour_transfer"][-1] for r in own if r["kind"] == "recolour"]
    assert videoshop.per_clip(own, "colour_transfer") == pytest.approx(transfers)
    text = (tmp_path / "videoshop.md").read_text()
    assert text in capsys.readouterr().out
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## Mean of recolour, remove",
        "## recolour",
        "## remove",
    ]
    assert text.count("| only |") == 3 and "2 + 2 |" in text
    assert f"| {runner.mean_sd(videoshop.per_clip(own, 'psnr_edit'), 2)} |" in text
    assert "a lead, not a result" in text
    assert len(json.loads((tmp_path / "videoshop.json").read_text())["records"]) == len(records)
    assert not list(tmp_path.glob("*.partial*"))


def test_the_round_trip_is_told_for_each_guess(pipeline, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(round_trip, "STEPS", (3,))
    monkeypatch.setattr(round_trip, "REFINEMENTS", (1,))
    few = dict(list(round_trip.GUESSES.items())[:3])
    monkeypatch.setattr(round_trip, "GUESSES", few)
    base = replace(DEFAULT, steps=3, strength=1.0, sigma_max=5.0, tolerance=0.0)
    records = round_trip.main(2, "validation", 1, tmp_path, lambda: pipeline, base)
    own = {r["trip"]: r for r in records if r["seed"] == SEED}
    assert len(own) == 1 + 1 + 2 * 2
    vae = own["VAE alone"]["psnr_source"]
    for name, record in own.items():
        if name != "VAE alone":
            assert record["evaluations"] == (6 if "refined" in name else 3)
            assert record["latent_error"] > 0
            assert record["psnr_source"] < vae + 3
    text = (tmp_path / "round_trip.md").read_text()
    assert all(f"| {name} |" in text for name in own)


# --- the sweep --------------------------------------------------------------------------------------------------------


def test_choices_are_read_in_the_settings_own_types():
    assert sweep.parse("steps=5,10") == [{"steps": 5}, {"steps": 10}]
    assert sweep.parse("threshold=0.5") == [{"threshold": 0.5}]
    assert sweep.parse("denormalise=true,false") == [{"denormalise": True}, {"denormalise": False}]
    assert sweep.parse("guess=current:random") == [{"guess_above": "current", "guess_below": "random"}]
    assert sweep.parse("guidance=1:3,2") == [
        {"first_guidance": 1.0, "last_guidance": 3.0},
        {"first_guidance": 2.0, "last_guidance": 2.0},
    ]
    assert sweep.parse("guidance_interval=0:50") == [{"guidance_interval": (0.0, 50.0)}]


@pytest.mark.parametrize("bad", ["colour=1", "steps=many", "denormalise=1", "normalise=sometimes"])
def test_bad_choices_are_refused(bad):
    with pytest.raises(ValueError):
        sweep.candidates([bad], DEFAULT)


def test_named_choices_are_combined_and_others_tried_one_at_a_time():
    base = replace(PAPER, threshold=1.0)
    grid = sweep.candidates(["threshold=0.5,1", "rescale=0,1"], base)
    assert [v.name for v in grid] == ["base", "threshold 0.5, rescale 0.0", "threshold 0.5", "rescale 0.0"]
    alone = sweep.candidates([], base)
    assert len(alone) > 15 and all(v.name == "base" or v.name.count(", ") <= 1 for v in alone)


def test_nothing_is_chosen_on_test_seeds(tmp_path):
    with pytest.raises(ValueError, match="validation"):
        sweep.main([], 2, "test", output=tmp_path)


def test_the_ranking_puts_the_best_edit_first():
    def record(variant, seed, value, transfer=0.5):
        measures = {"psnr_edit": value, "psnr_unedited": 30.0, "colour_transfer": [0.9, transfer]}
        counts = {"evaluations_inversion": 13, "evaluations_denoising": 26}
        return {"variant": variant, "seed": seed, **measures, **counts}

    scores = {"base": (10.0, 12.0), "good": (13.0, 14.0), "bad": (9.0, 8.0)}
    records = [record(name, seed, v) for name, values in scores.items() for seed, v in enumerate(values)]
    text = sweep.ranking(records, [editing.Variant(name, DEFAULT) for name in scores])
    assert [line.split(" | ")[0] for line in text.splitlines()[2:]] == ["| good", "| base", "| bad"]
    assert "| good | 13.50 | +2.50 ± 0.50 | 0.500 | 30.00 | 13 + 26 |" in text


def test_a_sweep_runs_and_is_saved(pipeline, tmp_path):
    base = short(PAPER, 2)
    records = sweep.main(["rescale=0"], 2, "validation", ("recolour",), 1, tmp_path, lambda: pipeline, base)
    assert {r["variant"] for r in records} == {"base", "rescale 0.0"}
    text = (tmp_path / "sweep.md").read_text()
    assert "| rescale 0.0 |" in text
    assert "`rewind benchmark videoshop --sweep rescale=0 --clips 2 --kinds recolour`" in text


# --- cost -------------------------------------------------------------------------------------------------------------


def test_the_cost_is_told_against_the_hosts_own_sampler():
    euler, ours = [1.0, 2.0, 3.0, 2.0, 2.0, 2.0, 2.0], [2.2] * 7
    result = {
        "host": "9.9",
        "torch": "2",
        "device": "cpu",
        "runs": 7,
        "steps": 25,
        "seconds": {cost.HOST_EULER: euler, "ours": ours},
        "evaluations": {cost.HOST_EULER: [25] * 7, "ours": [25] * 6 + [26]},
    }
    text = cost.report(result)
    assert "| the host's euler | 2.000 | 2.000 to 2.000 | +0.0% | [25] |  |" in text
    assert "| ours | 2.200 | 2.200 to 2.200 | +10.0% | [25, 26] | +0.5 |" in text


def test_the_cost_needs_a_host_and_seven_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="COMFYUI_PATH"):
        cost.main(output=tmp_path)
    with pytest.raises(ValueError, match="at least 7"):
        cost.main(runs=3, output=tmp_path)


def test_a_host_that_fails_is_told_with_its_last_words(tmp_path, monkeypatch):
    (tmp_path / "comfy").mkdir()
    (tmp_path / "comfy" / "samplers.py").touch()
    (tmp_path / "comfy" / "cli_args.py").write_text("raise RuntimeError('no such luck')\n")
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(ValueError, match="no such luck"):
        cost.main(output=tmp_path)
    # An interpreter told from where the user stands, although the host runs elsewhere.
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "python").symlink_to(sys.executable)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="no such luck"):
        cost.main(Path("python"), output=tmp_path)
    with pytest.raises(FileNotFoundError, match="no interpreter at"):
        cost.main(Path("elsewhere"), output=tmp_path)


def test_the_lead_is_told_clip_by_clip():
    scores = {"our default": (20.0, 24.0), "other": (19.0, 21.0)}
    records = [
        {"variant": name, "seed": seed, "psnr_edit": value}
        for name, values in scores.items()
        for seed, value in enumerate(values)
    ]
    assert videoshop.lead_table(records, list(scores)).endswith("| other | +2.00 ± 1.00 |\n")
