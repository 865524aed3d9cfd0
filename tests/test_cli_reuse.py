"""`rewind edit --save-inversion` and `--inversion`: one inversion, many edits; and what does not belong together."""

from __future__ import annotations

import json

import pytest
import safetensors
import safetensors.torch
import torch

from rewind import cli
from rewind.commands import edit as command
from rewind.pipelines.video import read_video, write_image, write_video
from rewind.pipelines.videoshop.inversion_file import load_inversion
from rewind.pipelines.videoshop.pipeline import VideoshopPipeline

FRAMES, SIDE = 3, 32
SHORT = ["--steps", "3", "--size", f"{SIDE}x{SIDE}"]  # of the embedded model


def clip(seed: int = 0) -> torch.Tensor:
    rows = torch.rand(FRAMES, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(rows, size=(SIDE, SIDE), mode="bilinear")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two clips, two edited frames, and the edit of the first with its inversion kept."""
    folder = tmp_path_factory.mktemp("reuse")
    for name, seed in (("clip", 0), ("other", 5)):
        write_video(folder / f"{name}.mp4", clip(seed), 7, crf=0)
    for name, seed in (("edited", 1), ("again", 2)):
        write_image(folder / f"{name}.png", clip(seed)[0])
    corner = clip()[0]
    corner[:, :8, :8] = 1 - corner[:, :8, :8]
    write_image(folder / "corner.png", corner)
    assert edit(folder, "plain.mp4", "edited.png", *SHORT, "--guidance", "1", "2") == 0
    kept = ["--save-inversion", str(folder / "clip.safetensors")]
    assert edit(folder, "saved.mp4", "edited.png", *SHORT, "--guidance", "1", "2", *kept) == 0
    return folder


def edit(folder, output, edited, *options, source="clip.mp4"):
    return cli.main(["edit", *(str(folder / name) for name in (source, edited)), "-o", str(folder / output), *options])


def use(folder, output, edited="edited.png", *options, file="clip.safetensors", source="clip.mp4"):
    """An edit with the inversion of a file."""
    size = SHORT[2:] if "--size" not in options else []
    return edit(folder, output, edited, "--inversion", str(folder / file), *size, *options, source=source)


@pytest.fixture
def no_model(monkeypatch):
    def load(name):
        raise AssertionError("a model was loaded before the input was checked")

    monkeypatch.setattr(command, "load_pipeline", load)


# --- one inversion, many edits ----------------------------------------------------------------------------------------


def test_an_edit_with_a_kept_inversion_is_the_one_without_the_file(folder, capsys):
    assert use(folder, "reused.mp4", "edited.png") == 0
    said = capsys.readouterr().out
    assert "an inversion that is there, and 2 network evaluations for the way back" in said
    assert "0 + 2 network evaluations" in said
    plain, saved, reused = ((folder / f"{name}.mp4").read_bytes() for name in ("plain", "saved", "reused"))
    assert plain == saved == reused


def test_another_edit_takes_the_same_inversion(folder, capsys):
    assert use(folder, "second.mp4", "again.png", "--guidance", "1", "1") == 0
    assert "and 1 network evaluation for the way back" in capsys.readouterr().out
    assert edit(folder, "fresh.mp4", "again.png", *SHORT, "--guidance", "1", "1") == 0
    assert (folder / "second.mp4").read_bytes() == (folder / "fresh.mp4").read_bytes()
    assert not torch.equal(read_video(folder / "second.mp4").frames, read_video(folder / "plain.mp4").frames)


def test_a_kept_inversion_in_parts_is_used_in_parts(folder, capsys):
    kept = ["--frames-at-once", "2", "--save-inversion", str(folder / "parts.safetensors")]
    assert edit(folder, "parts_saved.mp4", "edited.png", *SHORT, *kept) == 0
    assert use(folder, "parts_used.mp4", file="parts.safetensors") == 0
    assert "2 parts of at most 2 frames: an inversion that is there" in capsys.readouterr().out
    assert (folder / "parts_used.mp4").read_bytes() == (folder / "parts_saved.mp4").read_bytes()
    assert use(folder, "no.mp4", "edited.png", "--frames-at-once", "3", file="parts.safetensors") == 2
    assert "leave out --frames-at-once" in capsys.readouterr().err


def test_a_kept_inversion_in_windows_is_used_in_windows(folder, capsys):
    """The windows are the file's; the command's last line counts what was paid."""
    windows = ["--context-length", "2", "--context-overlap", "1"]
    kept = [*windows, "--save-inversion", str(folder / "windows.safetensors")]
    assert edit(folder, "windows_saved.mp4", "edited.png", *SHORT, *kept) == 0
    said = capsys.readouterr().out
    assert "2 windows of 2 frames: 2 network evaluations, and 2" in said and "2 + 2 network evaluations" in said
    assert use(folder, "windows_used.mp4", file="windows.safetensors") == 0
    said = capsys.readouterr().out
    assert "2 windows of 2 frames: an inversion that is there, and 2" in said and "0 + 2 network" in said
    assert (folder / "windows_used.mp4").read_bytes() == (folder / "windows_saved.mp4").read_bytes()
    assert use(folder, "no.mp4", "edited.png", *windows, file="windows.safetensors") == 2
    assert "leave out --context-length, --context-overlap" in capsys.readouterr().err


def test_a_kept_inversion_serves_a_mask(folder):
    masked = ["--guidance", "1", "2", "--mask", "auto", "--mask-grow", "0", "--keep-pixels"]
    assert use(folder, "masked.mp4", "corner.png", *masked) == 0
    assert edit(folder, "masked_fresh.mp4", "corner.png", *SHORT, *masked) == 0
    assert (folder / "masked.mp4").read_bytes() == (folder / "masked_fresh.mp4").read_bytes()
    frames, kept = (read_video(folder / f"{name}.mp4").frames[0] for name in ("masked", "clip"))
    changed = (frames - kept).abs()
    assert changed[:, 12:, 12:].mean() < 0.02 < changed[:, :8, :8].mean(), "the corner alone"


@pytest.mark.parametrize(("precision", "size"), [("float32", "3 KiB"), ("float16", "2 KiB")])
def test_costs_are_told_before_they_are_paid(folder, tmp_path, capsys, precision, size):
    kept = tmp_path / "kept.safetensors"
    options = [*SHORT, "--strength", "1", "--save-inversion", str(kept), "--trajectory", precision, "--force"]
    assert edit(folder, "told.mp4", "edited.png", *options) == 0
    said = capsys.readouterr().out
    assert "3 network evaluations, and 3 network evaluations for the way back" in said
    inversion = load_inversion(kept)
    assert inversion.trajectory.numel() == 768  # 4 states of 3 frames of 4 x 4 latents
    assert f"the clip at 4 noise levels in {precision} takes {size}" in said
    assert str(inversion.trajectory.dtype) == f"torch.{precision}"
    assert said.index("noise levels") < said.index("kept.safetensors") < said.index("told.mp4")


@pytest.mark.parametrize(("precision", "size"), [(None, "3 KiB"), ("float16", "2 KiB")])
def test_what_a_mask_keeps_is_told_without_a_file_too(folder, capsys, monkeypatch, precision, size):
    made, invert = [], VideoshopPipeline.invert

    def spy(*arguments, **options):
        made.append(invert(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(VideoshopPipeline, "invert", spy)
    options = ["--strength", "1", "--mask", "auto", *(["--trajectory", precision] if precision else []), "--force"]
    assert edit(folder, "told_masked.mp4", "corner.png", *SHORT, *options) == 0
    assert f"the clip at 4 noise levels in {precision or 'float32'} takes {size}" in capsys.readouterr().out
    (inversion,) = made
    assert inversion.trajectory.numel() == 768 and inversion.trajectory.dtype is getattr(torch, precision or "float32")


# --- before any work --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "3"], "was made with settings of its own: leave out --steps"),
        (["--preset", "default"], "leave out --preset"),
        (["--seed", "0", "--motion-bucket", "3"], "leave out --motion-bucket, --seed"),
        (["--trajectory", "float16"], "leave out --trajectory"),
        (["--fps", "3"], "was made for 7 frames a second, not --fps 3"),
        (["--frames", "2"], r"is for latents of shape (3, 4, 4, 4), the clip has (2, 4, 4, 4)"),
        (["--size", "32x64"], "the clip has (3, 4, 8, 4)"),
        (["--save-inversion", "x.safetensors"], "not allowed with argument"),
    ],
)
def test_what_the_inversion_has_settled_cannot_be_asked_for(folder, capsys, options, message):
    try:
        code = use(folder, "no.mp4", "edited.png", *options)
    except SystemExit as error:  # of the parser
        code = error.code
    assert code == 2 and message in capsys.readouterr().err
    assert not (folder / "no.mp4").exists()


@pytest.mark.usefixtures("no_model")
def test_results_that_cannot_be_written_are_refused(folder, capsys):
    taken = folder / "clip.safetensors"
    for options, message in (
        (["--save-inversion", str(taken)], "exists already; --force overwrites it"),
        (["--save-inversion", str(folder / "clip.mp4")], "must end in .safetensors"),
        (["--trajectory", "float16"], "give one of them too"),
    ):
        assert edit(folder, "no.mp4", "edited.png", *SHORT, *options) == 2
        assert message in capsys.readouterr().err


def rewritten(folder, name, change=lambda tensors: tensors, **settings):
    """A copy of the kept inversion with other tensors or settings."""
    with safetensors.safe_open(folder / "clip.safetensors", "pt") as opened:
        words = opened.metadata()
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}
    about = json.loads(words["about"])
    about["settings"] |= settings
    safetensors.torch.save_file(change(tensors), folder / name, metadata=words | {"about": json.dumps(about)})


BAD = {
    "more steps": ({"steps": 4, "strength": 1.0}, None, "another number of noise levels than its settings"),
    "endless steps": ({"steps": 10**12}, None, "another number of noise levels than its settings"),
    "another schedule": ({"sigma_min": 0.01}, None, "its noise levels are not those of its settings"),
    "a node's": ({"cfg": 1.0}, None, "was not made by `rewind edit` of this version"),
    "out of range": ({"strength": 2.0}, None, "strength is 2.0"),
    "words for numbers": ({"steps": "many"}, None, "was not made by"),
    "no source": ({}, "source", "lacks the source or the augmentation noise"),
    "no noise": ({}, "augmentation_noise", "lacks the source or the augmentation noise"),
}


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(("settings", "without", "message"), BAD.values(), ids=BAD)
def test_a_file_whose_settings_do_not_fit_is_refused(folder, capsys, settings, without, message):
    rewritten(folder, "bad.safetensors", lambda held: {k: t for k, t in held.items() if k != without}, **settings)
    assert use(folder, "no.mp4", file="bad.safetensors") == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("no_model")
def test_a_mask_with_a_file_without_a_trajectory_is_refused(folder, capsys):
    rewritten(folder, "ends.safetensors", lambda held: {k: t for k, t in held.items() if k != "trajectory"})
    assert use(folder, "no.mp4", "edited.png", "--mask", "auto", file="ends.safetensors") == 2
    assert "it lacks the states that are put back outside a mask" in capsys.readouterr().err


@pytest.mark.usefixtures("no_model")
def test_a_broken_file_and_none_are_refused(folder, capsys):
    (folder / "cut.safetensors").write_bytes((folder / "clip.safetensors").read_bytes()[:-9])
    assert use(folder, "no.mp4", file="cut.safetensors") == 2
    assert "is not a whole safetensors file" in capsys.readouterr().err
    assert use(folder, "no.mp4", file="nowhere.safetensors") == 2
    assert "there is no inversion at" in capsys.readouterr().err


# --- before the way back ----------------------------------------------------------------------------------------------


def test_the_inversion_of_another_clip_is_refused(folder, capsys):
    assert use(folder, "no.mp4", source="other.mp4") == 2
    assert "is the inversion of another clip, or of this one otherwise cut" in capsys.readouterr().err
    assert not (folder / "no.mp4").exists()


def test_the_inversion_of_another_model_is_refused(folder, capsys):
    rewritten(folder, "tuned.safetensors", lambda held: held | {"model.weights": 1.1 * held["model.weights"]})
    assert use(folder, "no.mp4", file="tuned.safetensors") == 2
    assert "was made with other weights of the same architecture" in capsys.readouterr().err
