"""`rewind ei2`: what it takes, what it says, what it refuses before any model is loaded, and that it can go on."""

from __future__ import annotations

import importlib
import json
import signal
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import tiny_models
import tiny_text_image as tiny
import torch
from ctrl_c import interrupt_at
from safetensors.torch import load_file, save_file

from rewind import cli
from rewind.commands import ei2 as command
from rewind.demo import text_to_image
from rewind.pipelines.ei2.inflation import InflationSettings, architecture
from rewind.pipelines.ei2.pipeline import EI2Pipeline, EI2Result, EI2Settings
from rewind.pipelines.ei2.tuning import OneShot
from rewind.pipelines.ei2.weights import EI2Weights, load_weights, save_weights
from rewind.pipelines.video import read_video, write_video

CAPTION, PROMPT = "a red circle on a blue background", "a green circle on a blue background"
MODEL = ["--model", "model"]
# A real run in seconds.
SAMPLING = [*MODEL, "--sampling-steps", "2", "--frames", "3", "--size", "32x32"]
TUNING = ["--fine-tune-steps", "3", "--learning-rate", "0.01"]
BRIEF = [*SAMPLING, *TUNING]


class FakePipeline:
    """Gives the clip back and remembers what it was asked."""

    def __init__(self):
        self.family = tiny.family()
        self.tuned, self.asked = [], []

    def tune(self, frames, caption, settings, inflation, callback, checkpoints):
        self.tuned.append(SimpleNamespace(frames=frames, caption=caption, settings=settings, inflation=inflation))
        return EI2Weights({}, inflation, "", caption), [0.5, 0.25]

    def edit(self, frames, prompt, settings, weights, inflation, callback):
        asked = {"frames": frames, "prompt": prompt, "settings": settings, "weights": weights, "inflation": inflation}
        self.asked.append(SimpleNamespace(**asked))
        return EI2Result(frames, weights, [], 7)


@pytest.fixture
def pipeline(monkeypatch):
    fake = FakePipeline()
    monkeypatch.setattr(command, "load_pipeline", lambda name: fake)
    return fake


@pytest.fixture
def tiny_pipeline(monkeypatch):
    real = EI2Pipeline(tiny.family())
    monkeypatch.setattr(command, "load_pipeline", lambda name: real)
    return real


@pytest.fixture
def no_model(monkeypatch):
    def load(name):
        raise AssertionError("a model was loaded before the input was checked")

    monkeypatch.setattr(command, "load_pipeline", load)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder: clip.mp4 of 10 frames whose grey level rises, and the tiny model without its weights."""
    clip = torch.arange(10)[:, None, None, None].expand(-1, 3, 96, 96) * 20 / 255
    write_video(tmp_path / "clip.mp4", clip, 12, crf=0)
    tiny.unet().save_config(tmp_path / "model" / "unet")
    write_index(tmp_path, "StableDiffusionPipeline")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_index(folder, kind):
    index = {"_class_name": kind, "_diffusers_version": "0.33.0"}
    (folder / "model" / "model_index.json").write_text(json.dumps(index))


def ei2(*options, caption=CAPTION, prompt=PROMPT, out="out.mp4"):
    told = [] if caption is None else ["--caption", caption]
    return cli.main(["ei2", "clip.mp4", *told, "--prompt", prompt, "-o", out, *options])


# --- what is asked of the model ---------------------------------------------------------------------------------------


def test_the_embedded_model_has_its_own_defaults(folder, pipeline, capsys):
    assert ei2("--seed", "5") == 0
    (tuned,), (asked,) = pipeline.tuned, pipeline.asked
    assert tuned.settings == replace(command.EMBEDDED_TUNING, seed=5)
    assert asked.settings == command.EMBEDDED_SETTINGS
    assert (tuned.caption, tuned.inflation) == (CAPTION, InflationSettings())
    assert (asked.prompt, asked.weights.caption, len(asked.frames)) == (PROMPT, CAPTION, 8)
    assert torch.equal(tuned.frames, asked.frames)
    said = capsys.readouterr().out
    assert "STAM and FFAM by 2 in all blocks, strength 1; 60 steps of fine-tuning at 0.001; 25 steps" in said
    assert "only a demonstration" in said and "trimmed to the first 8 frames" in said
    assert "out.mp4: 8 frames at 12 frames a second" in said
    assert "(loss 0.500 at first and 0.250 at last), 7 network evaluations" in said


def test_a_model_of_ones_own_has_the_methods_defaults(folder, pipeline, capsys):
    assert ei2(*MODEL) == 0
    assert pipeline.tuned[0].settings == OneShot(checkpointing=True)
    assert pipeline.asked[0].settings == EI2Settings()
    assert pipeline.asked[0].frames.shape == (10, 3, 512, 512)
    said = capsys.readouterr().out
    assert "500 steps of fine-tuning at 3e-05" in said and "only a demonstration" not in said
    assert "96x96 to 512x512" in said and "trained on" not in said


def test_options_change_the_defaults(folder, pipeline):
    options = "--sampling-steps 9 --guidance 4 --negative blurred --strength 0.5 --guess extrapolation --refine 2"
    options += " --blocks output --patch-strength 0.75 --fine-tune-steps 8 --learning-rate 0.01 --factor 3"
    options += " --axes frames-space --frames 5 --size 128x64 --fps 6"
    assert ei2(*options.split()) == 0
    assert pipeline.asked[0].settings == EI2Settings(9, 4.0, "blurred", 0.5, "extrapolation", 2, "output", 0.75)
    assert pipeline.tuned[0].settings == replace(command.EMBEDDED_TUNING, steps=8, learning_rate=0.01)
    assert pipeline.tuned[0].inflation == InflationSettings("FFAM", 3, "STAM", "frames + space")
    assert pipeline.asked[0].frames.shape == (5, 3, 64, 128) and read_video("out.mp4").fps == 6


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (["--temporal", "tune-a-video", "--attention", "sparse-causal"], ("sparse-causal", 2, "Tune-A-Video")),
        (
            ["--temporal", "STAM with LayerNorm", "--attention", "first-frame"],
            ("first frame", 2, "STAM with LayerNorm"),
        ),
        (["--temporal", "stam-without-spectral-normalisation"], ("FFAM", 2, "STAM without spectral normalisation")),
        (["--temporal", "none", "--attention", "Own Frame"], ("own frame", 2, "none")),
    ],
)
def test_modules_go_by_their_names_as_listed_or_as_typed(folder, pipeline, options, settings):
    assert ei2(*options) == 0
    assert pipeline.tuned[0].inflation == InflationSettings(*settings)


def test_without_fine_tuning_the_attention_alone_is_put_in(folder, pipeline, capsys):
    assert ei2("--fine-tune-steps", "0", "--factor", "1", caption=None) == 0
    assert pipeline.tuned == [] and pipeline.asked[0].weights is None
    assert pipeline.asked[0].inflation == InflationSettings(factor=1, temporal="none")
    said = capsys.readouterr().out
    assert "FFAM by 1 in all blocks, strength 1; no fine-tuning" in said and "0 steps of fine-tuning, 7" in said


def test_nothing_is_overwritten_without_force(folder, pipeline, capsys):
    (folder / "out.mp4").write_bytes(b"precious")
    assert ei2() == 2
    assert (folder / "out.mp4").read_bytes() == b"precious"
    assert not pipeline.tuned and "--force" in capsys.readouterr().err
    assert ei2("--force") == 0
    assert len(read_video("out.mp4").frames) == 8


def test_losses_are_told_by_their_first_and_last_tenths():
    losses = [3.0, 1.0, *[9.0] * 16, 0.25, 0.75]
    assert command.told_losses(losses) == "loss 2.000 at first and 0.500 at last"
    assert command.told_losses([1.0]) == "loss 1.000 at first and 1.000 at last"


# --- bad input --------------------------------------------------------------------------------------------------------


def weights_file(make):
    """Writes weights.safetensors as it would be kept of a tuning of the network that is made."""

    def write(folder):
        kept = EI2Weights({"a": torch.zeros(1)}, InflationSettings(), architecture(make()), CAPTION)
        save_weights(folder / "weights.safetensors", kept)

    return write


def truncated(folder):
    weights_file(tiny.unet)(folder)
    whole = (folder / "weights.safetensors").read_bytes()
    (folder / "weights.safetensors").write_bytes(whole[:-3])


def pickled(folder):
    torch.save({"a": torch.zeros(1)}, folder / "weights.safetensors")


WEIGHTS = ["--weights", "weights.safetensors"]
BAD = [
    # the clip
    (lambda f: (f / "clip.mp4").unlink(), [], "no file"),
    (lambda f: (f / "clip.mp4").write_text("x"), [], "does not decode"),
    (lambda f: write_video(f / "clip.mp4", torch.zeros(1, 3, 96, 96), 12), [], "one frame; a clip has at least 2"),
    # what is written
    (None, ["-o", "out.gif"], "must end in .mp4"),
    (None, ["-o", "absent/out.mp4"], "no folder"),
    (None, ["-o", "clip.mp4", "--force"], "one of the inputs"),
    (None, ["--save-weights", "weights.pt"], "must end in .safetensors"),
    (None, ["--save-weights", "absent/weights.safetensors"], "no folder"),
    (pickled, ["--save-weights", "weights.safetensors"], "--force overwrites it"),
    (None, ["--checkpoints", "clip.mp4"], "clip.mp4 is a file"),
    # the words
    (None, ["--prompt", "  "], "the prompt is empty"),
    (None, ["--caption", " "], "the caption is missing"),
    # names
    (None, ["--attention", "full"], "invalid choice: 'full'"),
    (None, ["--temporal", "LSTM"], "invalid choice: 'LSTM'"),
    (None, ["--axes", "space"], "invalid choice: 'space'"),
    (None, ["--blocks", "first"], "invalid choice: 'first'"),
    (None, ["--guess", "random"], "invalid choice: 'random'"),
    # numbers
    (None, ["--sampling-steps", "0"], "got 0 steps"),
    (None, ["--guidance", "-1"], "got --guidance -1"),
    (None, ["--guidance", "nan"], "got --guidance nan"),
    (None, ["--strength", "0"], "the strength is 0"),
    (None, ["--strength", "1.5"], "the strength is 1.5"),
    (None, ["--refine", "-1"], "got -1 refinements"),
    (None, ["--patch-strength", "2"], "the strength of the patch is 2"),
    (None, ["--factor", "0"], "coarse factor is 0"),
    (None, ["--fine-tune-steps", "-1"], "steps is -1"),
    (None, ["--learning-rate", "0"], "learning rate is 0"),
    (None, ["--frames", "1"], "at least 2"),
    (None, ["--fps", "0"], "got --fps 0"),
    (None, ["--size", "100x96"], "the nearest is 96x96"),
    # what would do nothing
    (None, ["--attention", "sparse-causal", "--factor", "2"], "--factor is of FFAM's coarse tokens"),
    (None, ["--temporal", "tune-a-video", "--axes", "frames"], "--axes is of STAM's centring"),
    (None, ["--temporal", "none", "--axes", "frames"], "--axes is of STAM's centring"),
    (None, ["--fine-tune-steps", "0", "--temporal", "stam"], "without fine-tuning --temporal would do nothing"),
    (None, ["--fine-tune-steps", "0", "--checkpoints", "kept"], "without fine-tuning --checkpoints would do nothing"),
    (None, ["--patch-strength", "0"], "--patch-strength 0 would make no use of the fine-tuning"),
    (None, [*WEIGHTS, "--fine-tune-steps", "3", "--factor", "2"], "leave out --fine-tune-steps, --factor"),
    (None, [*WEIGHTS, "--save-weights", "more.safetensors"], "leave out --save-weights"),
    # weights and models
    (None, WEIGHTS, "no EI² weights at weights.safetensors"),
    (truncated, WEIGHTS, "not a whole safetensors file"),
    (pickled, WEIGHTS, "not a whole safetensors file"),
    (lambda f: save_file({"a": torch.zeros(1)}, f / "weights.safetensors"), WEIGHTS, "holds no EI² weights"),
    (weights_file(tiny.unet), WEIGHTS, "tuned on a model of another architecture"),
    (weights_file(text_to_image.build_image_unet), [*WEIGHTS, *MODEL], "tuned on a model of another architecture"),
    (None, ["--model", "./absent/model"], "not a model"),
    (lambda f: write_index(f, "StableDiffusionXLPipeline"), MODEL, "holds a StableDiffusionXLPipeline"),
]


@pytest.mark.parametrize(("spoil", "options", "words"), BAD, ids=[" ".join([*o, "->", w]) for _, o, w in BAD])
@pytest.mark.usefixtures("no_model")
def test_bad_input_is_one_line_before_any_model_is_loaded(folder, capsys, spoil, options, words):
    if spoil is not None:
        spoil(folder)
    before = sorted(path.name for path in folder.iterdir())
    try:
        code = ei2(*options)
    except SystemExit as stop:  # argparse's own
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2
    assert words in error and error.startswith("rewind") and error.count("\n") == 1
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.usefixtures("no_model")
def test_a_fine_tuning_needs_a_caption(folder, capsys):
    assert ei2(caption=None) == 2
    assert "the caption is missing: say with --caption" in capsys.readouterr().err


# --- real runs on tiny models -----------------------------------------------------------------------------------------


def test_the_embedded_model_edits_without_a_model_named(folder, monkeypatch, capsys):
    """Its own classes, tokenizer and files, with random weights in place of the trained UNet's."""
    pack = SimpleNamespace(module=lambda name: importlib.import_module(f"rewind.{name}"))
    weights = tiny_models.save_weights(tiny_models.image_checkpoint(pack), folder / "unet.safetensors")
    load = partial(text_to_image.load_image_components, weights)
    monkeypatch.setattr(text_to_image, "load_image_components", load)
    options = "--sampling-steps 2 --strength 1 --fine-tune-steps 2 --save-weights kept.safetensors".split()
    assert ei2(*options) == 0
    assert read_video("out.mp4").frames.shape == (8, 3, 96, 96)
    kept = load_weights(folder / "kept.safetensors")
    assert kept.caption == CAPTION and any(t.any() for key, t in kept.tensors.items() if "temporal.to_out" in key)
    said = capsys.readouterr()
    assert "2 steps of fine-tuning (loss" in said.out and "only a demonstration" in said.out
    # Two steps of inversion, and two of the way back with guidance, which calls twice.
    assert "6 network evaluations" in said.out
    bars = [line.split("\r")[-1] for line in said.err.rstrip("\n").split("\n")]
    phases = ["fine-tuning: 100%", "inversion: 100%", "sampling: 100%"]
    assert [bar.split("|")[0].strip() for bar in bars] == phases


def test_a_model_folder_tells_its_size_before_its_weights(folder):
    facts = command.model_facts("model")
    assert (facts.frames, facts.area, facts.multiple) == (16, 512**2, 16)
    assert all(parameter.is_meta for parameter in facts.network.parameters())
    assert architecture(facts.network) == architecture(tiny.unet())
    tiny.unet(sample_size=96).save_config(folder / "model" / "unet")
    assert command.model_facts("model").area == 768**2
    own = command.model_facts(None)
    assert (own.frames, own.area, own.multiple) == (8, 96**2, 32)


def test_a_model_of_ones_own_edits(folder, capsys):
    tiny.save(folder / "saved")
    assert ei2(*BRIEF, "--model", "saved") == 0
    assert read_video("out.mp4").frames.shape == (3, 3, 32, 32)
    said = capsys.readouterr().out
    assert "only a demonstration" not in said and "3 steps of fine-tuning (loss" in said


def test_a_kept_fine_tuning_gives_the_same_clip(folder, tiny_pipeline, capsys):
    assert ei2(*BRIEF, "--save-weights", "kept.safetensors") == 0
    # The caption need not be told again; neither the steps nor the seed matter any more.
    assert ei2(*SAMPLING, "--weights", "kept.safetensors", "--seed", "8", caption=None, out="again.mp4") == 0
    assert ei2(*SAMPLING, "--fine-tune-steps", "0", out="plain.mp4") == 0
    assert ei2(*SAMPLING, "--weights", "kept.safetensors", "--patch-strength", "0", out="frames.mp4") == 0
    names = ("out", "again", "plain", "frames")
    first, again, plain, frames = (read_video(f"{name}.mp4").frames for name in names)
    assert torch.equal(first, again)
    assert not torch.equal(first, plain) and not torch.equal(first, frames)
    capsys.readouterr()
    assert ei2(*SAMPLING, "--weights", "kept.safetensors", "--force", caption="a dog") == 0
    assert f'kept.safetensors was tuned on "{CAPTION}", not "a dog"' in capsys.readouterr().out


def test_the_written_clip_is_the_pipelines(folder, tiny_pipeline):
    options = ["--strength", "0.5", "--guidance", "2", "--refine", "1", "--blocks", "output", "--seed", "4"]
    assert ei2(*BRIEF, *options, "--size", "96x96", "--axes", "frames-space") == 0
    clip = read_video("clip.mp4", frames=3).frames
    tuning, inflation = OneShot(3, 0.01, checkpointing=True, seed=4), InflationSettings(axes="frames + space")
    weights, _ = tiny_pipeline.tune(clip, CAPTION, tuning, inflation)
    settings = EI2Settings(2, 2.0, strength=0.5, refine=1, place="output")
    write_video("expected.mp4", tiny_pipeline.edit(clip, PROMPT, settings, weights).frames, 12)
    assert torch.equal(read_video("out.mp4").frames, read_video("expected.mp4").frames)


def test_an_interrupted_run_tells_how_to_go_on_and_goes_on_exactly(folder, tiny_pipeline, monkeypatch, capsys):
    assert ei2(*BRIEF, "--save-weights", "whole.safetensors", out="whole.mp4") == 0
    losses = capsys.readouterr().out.split("(loss")[1]
    again = [*BRIEF, "--checkpoints", "kept", "--save-weights", "parts.safetensors"]
    before = signal.getsignal(signal.SIGINT)
    interrupt_at(tiny_pipeline, monkeypatch, 2)  # the second step of three
    assert ei2(*again) == 130
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "rewind: stopped after 2 of 3 steps of fine-tuning; the same command goes on from what kept holds"
    assert not (folder / "out.mp4").exists() and len(list((folder / "kept").glob("ei2-*.safetensors"))) == 1
    interrupt_at(tiny_pipeline, monkeypatch, None)
    assert ei2(*again) == 0
    said = capsys.readouterr()
    assert "67%" in said.err  # the bar goes on where the first run stopped
    assert said.out.split("(loss")[1] == losses
    ours, theirs = load_file("parts.safetensors"), load_file("whole.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert torch.equal(read_video("out.mp4").frames, read_video("whole.mp4").frames)
    assert not list((folder / "kept").iterdir()) and signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("call", "options", "words"),
    [
        (
            1,
            TUNING,
            "stopped after 1 of 3 steps of fine-tuning; nothing is kept, with --checkpoints FOLDER it would be",
        ),
        # One call a step, then the inversion's.
        (
            4,
            TUNING,
            "stopped while sampling; no clip is written and the fine-tuning is lost, --save-weights FILE keeps it",
        ),
        (
            6,
            [*TUNING, "--save-weights", "kept.safetensors"],
            "stopped while sampling; no clip is written, but the fine-tuning is: "
            "--weights with its file takes its place",
        ),
        (1, ["--fine-tune-steps", "0"], "stopped while sampling; no clip is written"),
    ],
)
def test_what_is_lost_is_told(folder, tiny_pipeline, monkeypatch, capsys, call, options, words):
    interrupt_at(tiny_pipeline, monkeypatch, call)
    assert ei2(*SAMPLING, *options) == 130
    assert capsys.readouterr().err.splitlines()[-1] == f"rewind: {words}"
    assert not (folder / "out.mp4").exists()
    assert (folder / "kept.safetensors").exists() == ("--save-weights" in options)
