"""The benchmarks of the text models measure what they say they measure."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tiny_text_image
import tiny_text_video
import torch

from rewind.benchmarks import cost, dreamix, dreamixing, statistics, text_to_image, text_to_video
from rewind.demo import captions
from rewind.demo import world as W
from rewind.demo.text_edits import KINDS, SEEDS, VARIANTS
from rewind.pipelines.dreamix.corruption import sigmas_from
from rewind.pipelines.dreamix.finetuning import FineTuning
from rewind.pipelines.dreamix.pipeline import DreamixPipeline, DreamixResult, DreamixSettings
from rewind.pipelines.dreamix.presets import PRESETS

SEED = SEEDS["validation"]
QUICK = DreamixSettings(steps=3)
BRIEF = FineTuning(steps=2, rank=2)


@pytest.fixture(scope="module")
def pipeline():
    return DreamixPipeline(tiny_text_video.family("TextSVD"))


class Knowing:
    """In place of a pipeline: answers by drawing, each method in its own way, and records what it was asked."""

    def __init__(self, family):
        self.family, self.tuned, self.asked = family, [], []
        self.known = [example for seed in (SEED, SEED + 1) for _, example in dreamixing.edits(seed, KINDS)]

    def fine_tune(self, frames, token, settings):
        self.tuned.append((settings.alpha, settings.steps, settings.seed))
        return type("Tuned", (), {"lora": {"alpha": settings.alpha}})

    def edit(self, frames, prompt, settings, seed, lora=None):
        """Mixed: the right answer. The clip alone: the source. Anything else: an empty clip."""
        self.asked.append((prompt, seed, settings.second_pass))
        (chosen,) = [e for e in self.known if torch.equal(e.source, frames) and e.prompt("") == prompt]
        alpha = None if lora is None else lora["alpha"]
        answer = {0.5: chosen.target, 1.0: chosen.source}.get(alpha, torch.zeros_like(frames))
        return DreamixResult(chosen.source if settings.second_pass else answer, answer, None, 7)


# --- the gates --------------------------------------------------------------------------------------------------------


class Drawing:
    """In place of a pipeline: draws the caption's clip, with a look or motion that may be wrong."""

    def __init__(self, wrong=(), present=True):
        self.wrong, self.present = wrong, present

    def edit(self, frames, prompt, settings, seed, lora=None):
        words = captions.draw_words(1, torch.Generator().manual_seed(seed), styled=0.0)
        assert prompt == captions.caption(words, 0) and settings.s == 1
        options = {"direction": 4, "hue": 4, "speed": 2, "shape": 3}
        changes = {name: (getattr(words, name) + 1) % options[name] for name in self.wrong}
        scene = captions.scenes(replace(words, **changes), torch.Generator().manual_seed(seed))
        scene = replace(scene, present=torch.tensor([self.present]))
        return DreamixResult(W.render(scene)[0][0], frames, None, 1)


@pytest.mark.parametrize(
    ("wrong", "seen"), [((), ()), (("direction",), ("direction",)), (("shape", "hue"), ("shape", "background"))]
)
def test_the_gates_see_what_the_clip_shows(wrong, seen):
    row = text_to_video.measure(Drawing(wrong), SEED)
    assert {key for key in text_to_video.READ if not row[key]} == set(seen)


def test_an_empty_clip_is_right_in_nothing_but_the_background():
    row = text_to_video.measure(Drawing(present=False), SEED)
    assert [key for key in text_to_video.READ if row[key]] == ["background"]


def test_a_share_passes_by_its_bound_and_only_gates_have_a_verdict():
    row = dict.fromkeys(text_to_video.READ, True)
    rows = [row | {"shape": i < 56, "direction": i < 52} for i in range(64)]  # 0.875 and 0.81 of 64
    shares = {share.key: share for share in text_to_video.judge(rows)}
    verdicts = {key: share.verdict for key, share in shares.items()}
    assert verdicts == {
        "colour": "PASSED",
        "shape": "FAILED",
        "direction": "FAILED",
        "speed": "",
        "background": "",
        "object": "",
    }
    assert shares["direction"].right / 64 > text_to_video.LIMIT > shares["direction"].bound
    assert "0.81 (52 of 64)" in shares["direction"].cells()


def test_a_clip_is_generated_from_noise_alone(pipeline):
    settings = replace(text_to_video.SETTINGS, steps=2)
    one, again, other = (text_to_video.generate(pipeline, "a red circle moves up", s, settings) for s in (1, 1, 2))
    assert one.shape == (8, 3, 96, 96) and torch.equal(one, again) and not torch.equal(one, other)


class DrawingPictures:
    """In place of a text-to-image model: whatever the latents, the caption's picture, which may be wrong."""

    device = "cpu"

    def __init__(self, seed, wrong=(), present=True):
        self.seed, self.wrong, self.present, self.prompts, self.noise = seed, wrong, present, [], []

    def embed(self, prompts):
        self.prompts += prompts
        return torch.zeros(1, 1, 1)

    def schedule(self, steps):
        return torch.linspace(14.6, 0, steps + 1)

    def denoise(self, x, sigma, context):
        self.noise.append(float(x.std() / sigma[0]))
        return torch.zeros_like(x)

    def decode(self, latents):
        assert latents.shape == (1, 4, 12, 12)
        words = captions.draw_words(1, torch.Generator().manual_seed(self.seed), styled=0.0)
        changes = {name: (getattr(words, name) + 1) % 3 for name in self.wrong}
        scene = captions.scenes(replace(words, **changes), torch.Generator().manual_seed(self.seed))
        return W.render(replace(scene, present=torch.tensor([self.present])))[0][0, 3:4]


@pytest.mark.parametrize(
    ("wrong", "seen"), [((), ()), (("colour",), ("colour",)), (("shape", "hue"), ("shape", "background"))]
)
def test_the_gates_see_what_the_picture_shows(wrong, seen):
    model = DrawingPictures(SEED, wrong)
    row = text_to_image.measure(model, SEED, text_to_image.Sampling(steps=2))
    assert {key for key in text_to_image.READ if not row[key]} == set(seen)
    assert model.prompts == [row["caption"], ""] and row["caption"].startswith("a ")
    assert not set(row["caption"].split()) & {"moves", *captions.DIRECTIONS, *captions.SPEEDS}
    assert len(model.noise) == 2 * 2 and model.noise[0] == pytest.approx(1, abs=0.1), "from noise alone, guided"


def test_an_empty_picture_is_right_in_nothing_but_the_background():
    row = text_to_image.measure(DrawingPictures(SEED, present=False), SEED, text_to_image.Sampling(steps=2))
    assert [key for key in text_to_image.READ if row[key]] == ["background"]


def test_nine_of_ten_pictures_must_be_right_beyond_doubt():
    rows = [dict.fromkeys(text_to_image.READ, True) | {"shape": i < 239, "colour": i < 238} for i in range(256)]
    shares = {share.key: share for share in text_to_image.judge(rows)}
    assert {key: share.verdict for key, share in shares.items()} == {
        "colour": "FAILED",
        "shape": "PASSED",
        "background": "",
        "object": "",
    }
    assert shares["colour"].right / 256 > 0.92 and shares["shape"].cells()[:2] == [
        "text-to-image: the caption's shape",
        "0.9",
    ]
    seeds = text_to_image.seeds_of("test", 64)
    assert len(set(seeds)) == 256 and seeds[0] == SEEDS["test"]


def test_a_picture_is_generated_from_noise_alone():
    model, settings = tiny_text_image.family(), text_to_image.Sampling(steps=2)
    one, again, other = (text_to_image.generate(model, "a red circle", seed, settings) for seed in (1, 1, 2))
    assert one.shape == (1, 3, 96, 96) and torch.equal(one, again) and not torch.equal(one, other)
    assert not torch.equal(one, text_to_image.generate(model, "a blue square", 1, settings))


# --- the edits --------------------------------------------------------------------------------------------------------


def test_each_method_tunes_once_a_clip_and_run_and_edits_all(pipeline):
    knowing = Knowing(pipeline.family)
    work_list = dreamixing.jobs([SEED, SEED + 1], list(dreamix.METHODS), runs=2, settings=QUICK, tuning=BRIEF)
    records = [record for job in work_list for record in dreamixing.work(knowing, job)]
    assert len(knowing.tuned) == 2 * 2 * 2  # clips, runs, methods that tune
    assert {alpha for alpha, *_ in knowing.tuned} == {0.5, 1.0} and {seed for *_, seed in knowing.tuned} == {0, 1}
    edits = sum(VARIANTS.values())
    assert len(knowing.asked) == 2 * 2 * 3 * edits
    assert len({seed for _, seed, _ in knowing.asked}) == 2 * 2 * max(VARIANTS.values())
    assert len(records) == 2 * edits * (2 * 3 + len(dreamixing.REFERENCES))
    assert all("sks" not in prompt for prompt, *_ in knowing.asked)

    def rates(name, key):
        return {kind: statistics.per_clip(dreamix.of(records, name, kind), key) for kind in KINDS}

    everywhere, nowhere = dict.fromkeys(KINDS, [1.0, 1.0]), dict.fromkeys(KINDS, [0.0, 0.0])
    assert rates(dreamix.MIXED, "success") == everywhere
    assert rates("video alone, alpha 1", "appearance") == everywhere
    assert rates("video alone, alpha 1", "accuracy") == rates("video alone, alpha 1", "success") == nowhere
    assert rates("no fine-tuning", "success") == rates("the source itself", "accuracy") == nowhere
    second = dreamix.after_second_pass(dreamix.of(records, dreamix.MIXED))
    assert len(second) == 2 * 2 * edits and not any(record["success"] for record in second)
    assert all(record["appearance"] for record in second)


def test_the_margin_is_paired_and_its_bound_says_whether_it_is_noise():
    def records(name, successes):
        return [
            {"method": name, "kind": "motion", "seed": seed, "success": met}
            for seed, of_clip in enumerate(successes)
            for met in of_clip
        ]

    mixed = records(dreamix.MIXED, [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 1, 1]])
    close = records("video alone, alpha 1", [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0], [0, 1, 1, 1]])
    mean, bound = dreamix.margin(mixed, close)
    assert mean == pytest.approx((0.25 - 0.5 + 0.25 + 0) / 4) and bound < 0
    far = records("no fine-tuning", [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]])
    table = dreamix.lead_table([*mixed, *close, *far], ["video alone, alpha 1", "no fine-tuning"])
    noisy, clear = table.splitlines()[2:]
    assert noisy.endswith("| NO |") and clear.endswith("| yes |")


def test_shares_are_told_with_an_interval_over_clips():
    records = [{"seed": seed, "success": met} for seed, met in ((1, 1), (1, 0), (2, 1), (2, 1), (3, 0), (3, 1))]
    assert statistics.per_clip(records, "success") == [0.5, 1.0, 0.5]
    # Student's t of 2 degrees of freedom is 4.30: 0.667 +- 4.30 * 0.2887 / sqrt(3), cut to shares.
    low, high = statistics.interval([0.5, 1.0, 0.5])
    assert (low + high) / 2 == pytest.approx(2 / 3) and (high - low) / 2 == pytest.approx(0.717, abs=0.06)
    assert dreamix.share(records, "success") == "0.67 (0.00 to 1.00)"
    assert dreamix.share(records[:2], "success") == "0.50"
    assert dreamix.share([], "success") == "-"


@pytest.mark.slow
def test_the_run_prints_every_table_and_saves_its_records(pipeline, tmp_path, capsys):
    brief = {"cost_runs": 0, "motion_clips": 1}
    dreamix.main(1, "validation", 1, tmp_path, lambda: pipeline, 1, 1, (0, 1), QUICK, BRIEF, **brief)
    text, data = capsys.readouterr().out, json.loads((tmp_path / "dreamix.json").read_text())
    assert text.strip() == (tmp_path / "dreamix.md").read_text().strip()
    for words in (*KINDS, "ordering", "second pass", "Steps of fine-tuning", "Cost", "Not measured here"):
        assert words in text
    assert "13 edits of 2 clips of validation seeds (1 of them for motion edits alone), 1 run of" in text
    assert len(data["records"]) == (9 + 4) * 5 and len(data["steps"]) == 3 * 4
    assert text.count("a right answer, through the VAE") == len(KINDS)
    tuned = [r for r in data["records"] if r["method"] == dreamix.MIXED]
    assert all(r["second_pass"] for r in tuned)
    # Two network calls for each level from that of the preset's s on.
    family, plain = pipeline.family, [r for r in data["records"] if r["method"] == "no fine-tuning"]
    for kind in KINDS:
        levels = sigmas_from(family.schedule(QUICK.steps), PRESETS[kind].s, family.path)
        assert {r["evaluations"] for r in plain if r["kind"] == kind} == {2 * (len(levels) - 1)}
    assert not list(tmp_path.glob("*.partial*"))


def test_costs_are_told_against_the_hosts_own_training():
    def runs(second, peak):
        return [{"seconds": [second] * 5, "peak_mib": peak, "host": "0.33.0", "torch": "2", "device": "cpu"}] * 2

    costs = {dreamix.HOST: runs(0.5, 100.0), "mixed": runs(0.4, 80.0)}
    lines = dreamix.cost_table(costs).splitlines()[2:]
    assert [line.split(" | ")[1::2] for line in lines] == [["0.500", "1.00"], ["0.400", "0.80"]]
    assert lines[1].endswith("| 80 |")


def test_costs_need_a_host(monkeypatch, tmp_path):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    assert dreamix.measure_costs() is None


def test_costs_are_measured_in_turn(monkeypatch):
    asked = []
    monkeypatch.setattr(cost, "host_folder", lambda: None)
    monkeypatch.setattr(cost, "in_host", lambda part, given, python: asked.append(json.loads(given[0])) or {})
    costs = dreamix.measure_costs(runs=2, steps=4)
    assert asked == 2 * [[*way, 4] for way in dreamix.WAYS.values()]
    assert {name: len(found) for name, found in costs.items()} == dict.fromkeys(dreamix.WAYS, 2)


def test_noise_differs_by_edit_and_run_but_not_by_method():
    job = dreamixing.Job(SEED, KINDS, dreamix.METHODS[0])
    seeds = {
        dreamixing._noise_seed(replace(job, seed=seed, run=run), variant)
        for seed in (SEED, SEED + 1)
        for run in (0, 1)
        for variant in range(4)
    }
    assert len(seeds) == 16
    assert dreamixing._noise_seed(job, 1) == dreamixing._noise_seed(replace(job, method=dreamix.METHODS[2]), 1)
