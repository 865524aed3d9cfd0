"""`rewind dreamix`: what it takes, what it says, what it refuses before any model is loaded, and that it can go on."""

from __future__ import annotations

import importlib
import json
import signal
from functools import partial
from types import SimpleNamespace

import pytest
import tiny_models
import tiny_text_video as tiny
import torch
from ctrl_c import interrupt_at
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rewind import cli
from rewind.commands import dreamix as command
from rewind.demo import text
from rewind.pipelines.dreamix.coarse_video import coarse_video, move
from rewind.pipelines.dreamix.finetuning import FineTuning
from rewind.pipelines.dreamix.pipeline import DreamixPipeline, DreamixResult, DreamixSettings
from rewind.pipelines.dreamix.presets import PRESETS
from rewind.pipelines.video import read_image, read_video, write_image, write_video

PROMPT = "a red circle moves up"
# A real run in seconds.
SAMPLING = ["--steps", "2", "--frames", "4", "--size", "32x32"]
TUNING = ["--fine-tune-steps", "3", "--rank", "2"]
BRIEF = [*SAMPLING, *TUNING]


class FakePipeline:
    """Gives the clip back and remembers what it was asked."""

    def __init__(self):
        self.family = SimpleNamespace(schedule=lambda steps: torch.linspace(80, 0, steps + 1), path=tiny.TextSVD.path)
        self.tuned, self.asked = [], []

    def fine_tune(self, frames, token, settings, callback, checkpoints):
        self.tuned.append(SimpleNamespace(frames=frames, token=token, settings=settings))
        return SimpleNamespace(lora={"learnt": torch.zeros(1)})

    def edit(self, frames, prompt, settings, seed, lora, callback):
        self.asked.append(SimpleNamespace(frames=frames, prompt=prompt, settings=settings, seed=seed, lora=lora))
        return DreamixResult(frames, frames, None, 7)


@pytest.fixture
def pipeline(monkeypatch):
    fake = FakePipeline()
    monkeypatch.setattr(command, "load_pipeline", lambda name: fake)
    return fake


@pytest.fixture
def tiny_pipeline(monkeypatch):
    real = DreamixPipeline(tiny.family("TextSVD"))
    monkeypatch.setattr(command, "load_pipeline", lambda name: real)
    return real


@pytest.fixture
def no_model(monkeypatch):
    def load(name):
        raise AssertionError("a model was loaded before the input was checked")

    monkeypatch.setattr(command, "load_pipeline", load)


@pytest.fixture
def folder(tmp_path):
    """clip.mp4 of 10 frames whose grey level rises, a.png and b.png."""
    clip = torch.arange(10)[:, None, None, None].expand(-1, 3, 96, 96) * 20 / 255
    write_video(tmp_path / "clip.mp4", clip, 12, crf=0)
    write_image(tmp_path / "a.png", torch.rand(3, 96, 96, generator=torch.Generator().manual_seed(1)))
    write_image(tmp_path / "b.png", torch.full((3, 64, 128), 0.5))
    return tmp_path


def dreamix(folder, *options, files=("clip.mp4",), prompt=PROMPT, out="out.mp4"):
    words = [*(folder / name for name in files), "--prompt", prompt, "-o", folder / out, *options]
    return cli.main(["dreamix", *map(str, words)])


# --- what is asked of the model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", command.KINDS)
def test_each_kind_of_edit_has_its_preset_and_says_so(folder, pipeline, capsys, kind):
    assert dreamix(folder, "--kind", kind, "--seed", "5") == 0
    preset, (asked,) = PRESETS[kind], pipeline.asked
    taken = {"s": preset.s, "factor": preset.factor, "stride": preset.stride, "second_pass": preset.second_pass}
    assert asked.settings == DreamixSettings(**taken)
    assert (asked.prompt, asked.seed, len(asked.frames)) == (PROMPT, 5, 8)
    said = capsys.readouterr().out
    assert f"{kind}: noise {preset.s:g}, factor {preset.factor:g}, stride {preset.stride}" in said
    assert "only a demonstration" in said and "trimmed to the first 8 frames" in said
    if preset.fine_tune_steps == 0:
        assert not pipeline.tuned and asked.lora is None and "no fine-tuning" in said
        return
    (tuned,) = pipeline.tuned
    assert tuned.settings == FineTuning(steps=preset.fine_tune_steps, alpha=preset.alpha, seed=5)
    assert torch.equal(tuned.frames, asked.frames) and tuned.token == "sks" and asked.lora is not None


def test_options_change_the_preset(folder, pipeline):
    options = "--noise 0.5 --factor 3 --stride 1 --steps 9 --guidance 4 --second-pass 0.2 --scale 2".split()
    options += "--fine-tune-steps 8 --alpha 0.25 --learning-rate 0.01 --rank 3 --mask bypass --token zwx".split()
    assert dreamix(folder, *options, "--negative", "blurred", "--size", "128x64", "--frames", "5") == 0
    assert pipeline.asked[0].settings == DreamixSettings(
        0.5, 3.0, 1, steps=9, guidance=4.0, negative="blurred", token="zwx", second_pass=0.2, scale=2.0
    )
    assert pipeline.asked[0].frames.shape == (5, 3, 64, 128)
    assert pipeline.tuned[0].settings == FineTuning(8, 0.25, 0.01, 3, mask="bypass")
    assert pipeline.tuned[0].token == "zwx"
    degraded = ["--coarse-size", "40x24", "--stride", "2", "--temporal", "linear", "--force"]
    assert dreamix(folder, *degraded) == 0
    asked = pipeline.asked.pop().settings
    assert (asked.size, asked.stride, asked.temporal) == ((24, 40), 2, "linear"), "height, width"
    pipeline.tuned.pop()
    assert dreamix(folder, "--noise", "0", "--fine-tune-steps", "0", "--second-pass", "0", "--force") == 0
    assert (pipeline.asked[1].settings.s, pipeline.asked[1].settings.second_pass, len(pipeline.tuned)) == (0, 0, 1)


@pytest.mark.parametrize("name", ["zoom-out", "zoom out"])
def test_a_picture_is_moved_and_learnt_from_its_frames_alone(folder, pipeline, name):
    assert dreamix(folder, "--animate", name, files=["a.png"]) == 0
    expected = coarse_video(read_image(folder / "a.png"), 8, move("zoom out"))
    assert torch.equal(pipeline.asked[0].frames, expected) and torch.equal(pipeline.tuned[0].frames, expected)
    assert pipeline.tuned[0].settings.alpha == 0 and pipeline.asked[0].settings.s == PRESETS["animate"].s
    assert read_video(folder / "out.mp4").fps == 7
    assert not torch.equal(expected[0], expected[-1])
    moved = ["--amount", "2", "--fill", "edge", "--easing", "linear", "--force"]
    assert dreamix(folder, "--animate", name, *moved, files=["a.png"]) == 0
    expected = coarse_video(read_image(folder / "a.png"), 8, move("zoom out", 2), fill="edge", easing="linear")
    assert torch.equal(pipeline.asked[1].frames, expected)


def test_a_subject_is_learnt_from_its_pictures_and_filmed_from_noise(folder, pipeline, capsys):
    options = ["--subject", "--frames", "6", "--fps", "5"]
    assert dreamix(folder, *options, files=["a.png", "b.png"]) == 0
    assert pipeline.tuned[0].frames.shape == (2, 3, 96, 96) and pipeline.tuned[0].settings.alpha == 0
    assert pipeline.asked[0].settings.s == 1 and not pipeline.asked[0].frames.any()
    written = read_video(folder / "out.mp4")
    assert (len(written.frames), written.fps) == (6, 5)
    assert "the b.png is resized from 128x64 to 96x96, 50% is cropped" in capsys.readouterr().out


def test_nothing_is_overwritten_without_force(folder, pipeline, capsys):
    (folder / "out.mp4").write_bytes(b"precious")
    assert dreamix(folder) == 2
    assert (folder / "out.mp4").read_bytes() == b"precious"
    assert not pipeline.tuned and "--force" in capsys.readouterr().err
    assert dreamix(folder, "--force") == 0
    assert len(read_video(folder / "out.mp4").frames) == 8


# --- bad input --------------------------------------------------------------------------------------------------------


def lora_file(name, keys=("unet.conv.lora_A.weight", "unet.conv.lora_B.weight")):
    return lambda folder: save_file({key: torch.zeros(2, 2) for key in keys}, folder / name)


def one_frame(folder):
    write_video(folder / "clip.mp4", torch.zeros(1, 3, 96, 96), 12)


BAD = [
    # clips and pictures
    (lambda f: (f / "clip.mp4").unlink(), [], "no file"),
    (lambda f: (f / "clip.mp4").write_text("x"), [], "does not decode"),
    (one_frame, [], "has one frame; a clip has at least 2"),
    (["clip.mp4", "clip.mp4"], [], "got 2 files; a clip is one"),
    (["a.png"], [], "is a picture: --animate MOVE"),
    (["a.png", "b.png"], ["--animate", "tilt"], "--animate takes one picture"),
    (["clip.mp4"], ["--animate", "tilt"], "--animate takes one picture"),
    (["a.png", "clip.mp4"], ["--subject"], "--subject takes pictures"),
    (lambda f: (f / "a.png").write_text("x"), ["--subject"], "does not open as a picture"),
    # what is written
    (None, ["-o", "out.gif"], "must end in .mp4"),
    (None, ["-o", "absent/out.mp4"], "no folder"),
    (None, ["-o", "clip.mp4", "--force"], "one of the inputs"),
    (None, ["--save-lora", "lora.pt"], "must end in .safetensors"),
    (None, ["--save-lora", "absent/lora.safetensors"], "no folder"),
    (lora_file("old.safetensors"), ["--save-lora", "old.safetensors"], "--force overwrites it"),
    (None, ["--checkpoints", "a.png"], "a.png is a file"),
    (None, ["--checkpoints", "a.png/deeper"], "a.png is a file"),
    # the task
    (["a.png"], ["--animate", "spin"], "invalid choice: 'spin'"),
    (None, ["--kind", "sound"], "invalid choice: 'sound'"),
    (None, ["--kind", "style", "--subject"], "not allowed with"),
    (["a.png"], ["--animate", "tilt", "--alpha", "0.5"], "--animate learns from pictures alone"),
    (["a.png"], ["--subject", "--alpha", "1"], "--subject learns from pictures alone"),
    (["a.png"], ["--subject", "--noise", "0.9"], "begins from pure noise"),
    (["a.png"], ["--subject", "--stride", "2"], "--stride would degrade a clip, and --subject has none"),
    (["a.png"], ["--subject", "--coarse-size", "8x8"], "--coarse-size would degrade a clip"),
    (None, ["--amount", "0", "--fill", "edge"], "--amount, --fill is of --animate"),
    (["a.png"], ["--animate", "tilt", "--amount", "4"], "show the picture's edge or back"),
    (["a.png"], ["--animate", "pan-up", "--amount", "nan"], "the amount of the move is nan; it must be -4 to 4"),
    (["a.png"], ["--animate", "replicate", "--fill", "edge"], "--animate replicate does not move the picture"),
    # the prompt and the token
    (None, ["--prompt", "  "], "the prompt is empty"),
    (None, ["--token", "two words"], "one word without spaces"),
    (None, ["--token", ""], "the token is empty"),
    # numbers
    (None, ["--noise", "1.5"], "the noise is 1.5"),
    (None, ["--second-pass", "-0.1"], "the noise is -0.1"),
    (None, ["--factor", "0.5"], "downsampled by 0.5"),
    (None, ["--factor", "2", "--coarse-size", "8x8"], "--factor and --coarse-size both tell"),
    (None, ["--coarse-size", "200x8"], "cannot downsample 96x96 to 8x200"),
    (None, ["--stride", "0"], "stride in time is 0"),
    (None, ["--kind", "style", "--temporal", "hold"], "every frame is kept: give --stride too"),
    (None, ["--temporal", "cut"], "invalid choice: 'cut'"),
    (None, ["--steps", "0"], "steps"),
    (None, ["--guidance", "-1"], "got --guidance -1"),
    (None, ["--guidance", "nan"], "got --guidance nan"),
    (None, ["--scale", "9"], "scale of the second pass is 9"),
    (None, ["--scale", "2", "--second-pass", "0"], "--scale enlarges in the second pass"),
    (None, ["--frames", "1"], "at least 2"),
    (None, ["--fps", "0"], "got --fps 0"),
    (None, ["--size", "100x96"], "the nearest is 96x96"),
    (None, ["--fine-tune-steps", "-1"], "steps is -1"),
    (None, ["--alpha", "1.5"], "alpha is 1.5"),
    (None, ["--rank", "0"], "rank is 0"),
    (None, ["--learning-rate", "0"], "learning rate is 0"),
    (None, ["--mask", "full"], "invalid choice: 'full'"),
    # what would do nothing
    (None, ["--kind", "style", "--alpha", "0.5"], "without fine-tuning --alpha would do nothing"),
    (None, ["--fine-tune-steps", "0", "--checkpoints", "kept"], "--checkpoints would do nothing"),
    (None, ["--lora", "x.safetensors", "--rank", "4", "--fine-tune-steps", "3"], "leave out --fine-tune-steps, --rank"),
    # adapters and models
    (None, ["--lora", "absent.safetensors"], "no file absent.safetensors"),
    (lambda f: (f / "x.safetensors").write_text("x"), ["--lora", "x.safetensors"], "not a whole LoRA file"),
    (lora_file("x.safetensors", ["unet.conv.lora_A.weight"]), ["--lora", "x.safetensors"], "not a whole LoRA file"),
    (lora_file("x.safetensors", ["diffusion_model.a"]), ["--lora", "x.safetensors"], "in diffusers' names"),
    (
        lora_file("x.safetensors", ["transformer.a.lora_A.weight", "transformer.a.lora_B.weight"]),
        ["--lora", "x.safetensors"],
        "a LoRA of another kind of model",
    ),
    (None, ["--model", "./absent/model"], "not a model"),
]


@pytest.mark.parametrize(("spoil", "options", "words"), BAD, ids=[" ".join([*o, "->", w]) for _, o, w in BAD])
@pytest.mark.usefixtures("no_model")
def test_bad_input_is_one_line_before_any_model_is_loaded(folder, capsys, monkeypatch, spoil, options, words):
    monkeypatch.chdir(folder)
    files = spoil if isinstance(spoil, list) else ["a.png"] if "--subject" in options else ["clip.mp4"]
    if callable(spoil):
        spoil(folder)
    before = sorted(path.name for path in folder.iterdir())
    try:
        code = dreamix(folder, *options, files=files)
    except SystemExit as stop:  # argparse's own
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2
    assert words in error and error.startswith("rewind") and error.count("\n") == 1
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.usefixtures("no_model")
def test_a_checkpoint_folder_that_cannot_be_written_is_refused(folder, capsys, monkeypatch):
    def full(dir):
        if dir == folder / "kept":
            raise OSError(28, "No space left on device")
        return open(folder / "any", "w")

    (folder / "kept").mkdir()
    monkeypatch.setattr("rewind.commands.files.tempfile.TemporaryFile", full)
    assert dreamix(folder, "--checkpoints", str(folder / "kept" / "new")) == 2
    assert "No space left" in capsys.readouterr().err


# --- real runs on tiny models -----------------------------------------------------------------------------------------


def test_the_embedded_model_edits_without_a_model_named(folder, monkeypatch, capsys):
    """Its own classes, tokenizer and file, with random weights in place of the trained ones."""
    pack = SimpleNamespace(module=lambda name: importlib.import_module(f"rewind.{name}"))
    weights = tiny_models.save_weights(tiny_models.text_checkpoint(pack), folder / "weights.safetensors")
    monkeypatch.setattr(text, "load_text_components", partial(text.load_text_components, weights))
    assert dreamix(folder, "--steps", "2", "--fine-tune-steps", "1", "--save-lora", str(folder / "l.safetensors")) == 0
    assert read_video(folder / "out.mp4").frames.shape == (8, 3, 144, 144), "the second pass is larger"
    adapters = load_file(folder / "l.safetensors")
    assert any(tensor.any() for name, tensor in adapters.items() if "lora_B" in name)
    said = capsys.readouterr()
    assert "1 steps of fine-tuning" in said.out and "only a demonstration" in said.out
    # A bar of the fine-tuning, and one of each pass: s 0.9 of two steps, and the second pass.
    bars = [line.split("\r")[-1] for line in said.err.rstrip("\n").split("\n")]
    assert [bar.split("|")[0].strip() for bar in bars] == ["fine-tuning: 100%", "sampling: 100%", "sampling: 100%"]


@pytest.mark.parametrize("name", ["ModelScope", "Wan"])
def test_a_model_folder_tells_its_frames_and_size_before_its_weights(tmp_path, name):
    network, part = tiny.family(name).network, {"ModelScope": "unet", "Wan": "transformer"}[name]
    network.save_config(tmp_path / part)
    kind = {"ModelScope": "TextToVideoSDPipeline", "Wan": "WanPipeline"}[name]
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind, "_diffusers_version": "0.33.0"}))
    if name == "Wan":
        tiny.family(name).vae.save_config(tmp_path / "vae")
    expected = {
        "ModelScope": command.ModelFacts("unet", 16, 256**2, 16, 1, 8),
        "Wan": command.ModelFacts("transformer", 33, 832 * 480, 16, 4, 16),
    }
    assert not list(tmp_path.rglob("*.safetensors")) and command.model_facts(str(tmp_path)) == expected[name]


@pytest.mark.usefixtures("no_model")
def test_models_that_cannot_be_tuned_and_frames_that_do_not_fit_are_refused(folder, capsys):
    model, wan = folder / "model", tiny.family("Wan")
    wan.network.save_config(model / "transformer")
    wan.vae.save_config(model / "vae")
    index = {"_class_name": "StableVideoDiffusionPipeline", "_diffusers_version": "0.33.0"}
    (model / "model_index.json").write_text(json.dumps(index))
    assert dreamix(folder, "--model", str(model)) == 2
    assert "holds a StableVideoDiffusionPipeline" in capsys.readouterr().err
    index |= {"_class_name": "WanPipeline", "transformer_2": ["diffusers", "WanTransformer3DModel"]}
    (model / "model_index.json").write_text(json.dumps(index))
    assert dreamix(folder, "--model", str(model)) == 2
    assert "two transformers" in capsys.readouterr().err
    (model / "model_index.json").write_text(json.dumps(index | {"transformer_2": [None, None]}))
    assert dreamix(folder, "--model", str(model), "--frames", "8") == 2
    assert "this model takes 4 n + 1: 5 or 9 for example" in capsys.readouterr().err


def test_a_model_of_ones_own_edits(folder, capsys):
    import diffusers

    family, scheduler = tiny.family("ModelScope"), diffusers.DDIMScheduler(prediction_type="v_prediction")
    encoder = text.build_text_encoder(text.TextConfig(hidden=tiny.TEXT))
    parts = (family.vae, encoder, text.load_tokenizer(), family.network, scheduler)
    diffusers.TextToVideoSDPipeline(*parts).save_pretrained(folder / "model")
    assert dreamix(folder, *BRIEF, "--model", str(folder / "model"), "--second-pass", "0") == 0
    assert read_video(folder / "out.mp4").frames.shape == (4, 3, 32, 32)
    said = capsys.readouterr().out
    assert "only a demonstration" not in said and "3 steps of fine-tuning" in said


def test_a_kept_fine_tuning_gives_the_same_clip(folder, tiny_pipeline, capsys):
    kept, word = str(folder / "kept.safetensors"), ["--token", "zwx"]
    assert dreamix(folder, *BRIEF, *word, "--learning-rate", "0.01", "--save-lora", kept) == 0
    with safe_open(kept, "pt") as file:
        assert file.metadata()[command.TOKEN] == "zwx"
        assert all(key.startswith("unet.") for key in file.keys())
    # Its word need not be told again; neither the alpha nor the steps matter any more.
    assert dreamix(folder, *SAMPLING, "--lora", kept, out="again.mp4") == 0
    assert dreamix(folder, *SAMPLING, "--fine-tune-steps", "0", out="plain.mp4") == 0
    first, again, plain = (read_video(folder / f"{name}.mp4").frames for name in ("out", "again", "plain"))
    assert torch.equal(first, again) and not torch.equal(first, plain)
    capsys.readouterr()
    assert dreamix(folder, *SAMPLING, "--lora", kept, "--token", "sks", "--force") == 0
    assert "was learnt under the word zwx, not sks" in capsys.readouterr().out


def test_an_interrupted_run_tells_how_to_go_on_and_goes_on_exactly(folder, tiny_pipeline, monkeypatch, capsys):
    whole, parts, kept = (str(folder / name) for name in ("whole.safetensors", "parts.safetensors", "kept"))
    assert dreamix(folder, *BRIEF, "--save-lora", whole, out="whole.mp4") == 0
    capsys.readouterr()
    command_again = [*BRIEF, "--checkpoints", kept, "--save-lora", parts]
    before = signal.getsignal(signal.SIGINT)
    interrupt_at(tiny_pipeline, monkeypatch, 3)  # the clip's call of the second step of three
    assert dreamix(folder, *command_again) == 130
    error = capsys.readouterr().err.splitlines()[-1]
    assert "stopped after 2 of 3 steps" in error and f"goes on from what {kept} holds" in error
    assert not (folder / "out.mp4").exists() and len(list((folder / "kept").glob("dreamix-*.safetensors"))) == 1
    interrupt_at(tiny_pipeline, monkeypatch, None)
    assert dreamix(folder, *command_again) == 0
    assert "67%" in capsys.readouterr().err  # the bar goes on where the first run stopped
    ours, theirs = load_file(parts), load_file(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert torch.equal(read_video(folder / "out.mp4").frames, read_video(folder / "whole.mp4").frames)
    assert not list((folder / "kept").iterdir()) and signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("call", "options", "words"),
    [
        (
            1,
            TUNING,
            "stopped after 1 of 3 steps of fine-tuning; nothing is kept, with --checkpoints FOLDER it would be",
        ),
        # Two calls a step, then the sampling's.
        (
            7,
            TUNING,
            "stopped while sampling; no clip is written and the fine-tuning is lost, --save-lora FILE keeps it",
        ),
        (
            7,
            [*TUNING, "--save-lora", "kept.safetensors"],
            "stopped while sampling; no clip is written, but the fine-tuning is: --lora with its file takes its place",
        ),
        (1, ["--fine-tune-steps", "0"], "stopped while sampling; no clip is written"),
    ],
)
def test_what_is_lost_is_told(folder, tiny_pipeline, monkeypatch, capsys, call, options, words):
    monkeypatch.chdir(folder)
    interrupt_at(tiny_pipeline, monkeypatch, call)
    assert dreamix(folder, *SAMPLING, *options) == 130
    assert capsys.readouterr().err.splitlines()[-1] == f"rewind: {words}"
    assert not (folder / "out.mp4").exists()
    assert (folder / "kept.safetensors").exists() == ("--save-lora" in options)


def test_ctrl_c_pressed_again_ends_at_once():
    steps = []
    with pytest.raises(KeyboardInterrupt), command.whole_steps(steps.append):
        signal.raise_signal(signal.SIGINT)
        steps.append("went on")
        signal.raise_signal(signal.SIGINT)
        steps.append("never")
    assert steps == ["went on"]


def test_a_lora_of_another_network_is_refused_before_sampling(folder, tiny_pipeline, monkeypatch, capsys):
    interrupt_at(tiny_pipeline, monkeypatch, 1)
    lora_file("x.safetensors")(folder)
    assert dreamix(folder, *SAMPLING[:2], "--lora", str(folder / "x.safetensors")) == 2
    assert "not of a UNetSpatioTemporalConditionModel" in capsys.readouterr().err
