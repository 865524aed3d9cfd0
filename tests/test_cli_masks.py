"""The masks of `rewind edit`: what is made of them, and what is refused before any model is loaded."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rewind import cli
from rewind.commands import edit as command
from rewind.demo.clip import SEEDS, example
from rewind.pipelines.motion import lucas_kanade
from rewind.pipelines.video import write_image, write_video
from rewind.pipelines.videoshop.masks import DEFAULT_MASK, MaskSettings, edit_mask
from rewind.pipelines.videoshop.pipeline import VideoshopResult

FRAMES = 4
CHOSEN = example(SEEDS["validation"])
CLIP, EDITED, OBJECT = CHOSEN.source[:FRAMES], CHOSEN.edited_frame, (CHOSEN.source_mask[:FRAMES] > 0.5).float()


@pytest.fixture
def asked(monkeypatch):
    """What the pipeline was asked; its inversion is what it was asked to invert with."""
    calls = []

    class Pipeline:
        def invert(self, video, settings, generator, **options):
            return SimpleNamespace(video=video, **options)

        def __call__(self, video, edited_frame, settings, generator, **options):
            calls.append(SimpleNamespace(video=video, edited=edited_frame, **options))
            return VideoshopResult(video, None, None, {"inversion": 1, "denoising": 1})

    monkeypatch.setattr(command, "load_pipeline", lambda name: Pipeline())
    return calls


@pytest.fixture
def folder(tmp_path):
    """A clip, its edited first frame, and masks of its object: in the first frame, and in all of them."""
    write_video(tmp_path / "clip.mp4", CLIP, 7, chroma="444", crf=0)
    write_image(tmp_path / "edited.png", EDITED)
    write_image(tmp_path / "mask.png", OBJECT[:1].expand(3, -1, -1))
    write_video(tmp_path / "mask.mp4", OBJECT[:, None].expand(-1, 3, -1, -1), 7)
    return tmp_path


def edit(folder, *options):
    words = [folder / "clip.mp4", folder / "edited.png", "-o", folder / "out.mp4", *options]
    return cli.main(["edit", *map(str, words)])


def test_without_the_option_there_is_no_mask(folder, asked, capsys):
    assert edit(folder) == 0
    assert asked[0].mask is None and asked[0].keep_pixels is False and asked[0].inversion is None
    said = capsys.readouterr().out
    assert "may show" not in said and "main memory" not in said


def test_the_automatic_mask_is_that_of_the_edit(folder, asked, capsys):
    assert edit(folder, "--mask", "auto") == 0
    options = ["--mask-threshold", "0.2", "--mask-grow", "1", "--mask-feather", "6", "--keep-pixels", "--force"]
    assert edit(folder, "--mask", "auto", *options) == 0
    plain, changed = asked
    assert torch.equal(plain.mask, edit_mask(plain.video, plain.edited, DEFAULT_MASK))
    assert torch.equal(changed.mask, edit_mask(plain.video, plain.edited, MaskSettings(0.2, 1, 6)))
    assert (plain.keep_pixels, changed.keep_pixels) == (False, True)
    said = capsys.readouterr().out
    first, last = (f"{float((plain.mask[i] > 0).float().mean()):.0%}" for i in (0, -1))
    assert f"may show in {first} of the first frame and {last} of the last" in said


@pytest.mark.parametrize("precision", [None, "float16", "bfloat16"])
def test_the_states_that_are_put_back_are_kept_in_the_precision_asked_for(folder, asked, precision):
    assert edit(folder, "--mask", "auto", *(["--trajectory", precision] if precision else [])) == 0
    made = asked[0].inversion
    assert made.keep_trajectory and made.trajectory_dtype is getattr(torch, precision or "float32")
    assert torch.equal(made.video, asked[0].video) and torch.equal(made.mask, asked[0].mask)


def test_a_picture_is_the_first_frames_mask_and_follows_the_motion(folder, asked):
    assert edit(folder, "--mask", folder / "mask.png", "--mask-grow", "2") == 0
    wanted = edit_mask(asked[0].video, asked[0].edited, MaskSettings(grow=2), first=OBJECT[0])
    assert torch.equal(asked[0].mask, wanted) and not torch.equal(wanted[-1], wanted[0])


def test_a_video_has_a_mask_for_each_frame(folder, asked):
    assert edit(folder, "--mask", folder / "mask.mp4", "--mask-grow", "0") == 0
    assert float((asked[0].mask != OBJECT).float().mean()) < 0.002  # what H.264 does to the edge
    assert set(asked[0].mask.unique().tolist()) == {0.0, 1.0}


def test_frames_with_an_empty_mask_are_told(folder, asked, capsys):
    masks = OBJECT.clone()
    masks[2] = 0
    write_video(folder / "mask.mp4", masks[:, None].expand(-1, 3, -1, -1), 7)
    assert edit(folder, "--mask", folder / "mask.mp4") == 0
    assert "empty in frame 3" in capsys.readouterr().out


def test_a_mask_is_brought_to_the_models_size_like_the_clip(folder, asked):
    assert edit(folder, "--mask", folder / "mask.png", "--size", "64x48", "--mask-grow", "0") == 0
    assert asked[0].mask.shape == (FRAMES, 48, 64)
    # 64 x 64, of which 8 rows above and below are cropped
    small = torch.nn.functional.interpolate(OBJECT[None, :1], (64, 64), mode="area")[0, 0, 8:56]
    assert float(((asked[0].mask[0] > 0.5) != (small > 0.5)).float().mean()) < 0.02


def test_the_weights_of_a_learned_flow_are_used(folder, asked, monkeypatch):
    from rewind.commands import masks

    used = []

    def flow(frame, other):
        used.append(1)
        return lucas_kanade(frame, other)

    (folder / "raft.pth").touch()
    monkeypatch.setattr(masks, "load_raft", lambda path: flow if path.name == "raft.pth" else None)
    assert edit(folder, "--mask", "auto", "--flow-weights", folder / "raft.pth") == 0
    assert len(used) == FRAMES - 1


def blacken(folder):
    write_image(folder / "mask.png", torch.zeros(3, 96, 96))


def shorten(folder):
    write_video(folder / "mask.mp4", OBJECT[:3, None].expand(-1, 3, -1, -1), 7)


def unedit(folder):
    write_image(folder / "edited.png", CLIP[0])


def widen(folder):
    write_image(folder / "mask.png", torch.ones(3, 96, 128))


@pytest.mark.parametrize(
    ("spoil", "options", "words"),
    [
        (None, ["--mask", "absent.png"], "no file absent.png; --mask takes none, auto, or"),
        (None, ["--keep-pixels"], "--keep-pixels without a mask: give --mask auto"),
        (None, ["--mask-grow", "3", "--mask-feather", "2"], "--mask-grow, --mask-feather without a mask"),
        (None, ["--mask", "auto", "--mask-threshold", "1.5"], "threshold is 1.5"),
        (None, ["--mask", "auto", "--mask-grow", "-1"], "grow is -1"),
        (None, ["--mask", "auto", "--mask-feather", "-1"], "feather is -1"),
        (None, ["--mask", "{}/mask.png", "--mask-threshold", "0.2"], "does not ask the edit"),
        (None, ["--mask", "{}/mask.mp4", "--flow-weights", "{}/clip.mp4"], "has a mask for each frame"),
        (None, ["--mask", "auto", "--flow-weights", "absent.pth"], "no file absent.pth"),
        (None, ["--mask", "auto", "--flow-weights", "{}/clip.mp4"], "does not open as a file of weights"),
        (unedit, ["--mask", "auto"], "differs from the clip's first frame by at most"),
        (blacken, ["--mask", "{}/mask.png"], "nothing white in its first frame"),
        (shorten, ["--mask", "{}/mask.mp4"], "has 3 frames, the clip 4"),
        (widen, ["--mask", "{}/mask.png"], "128x96 and the clip 96x96: their proportions differ"),
    ],
)
def test_bad_masks_are_one_line_before_any_model_is_loaded(folder, capsys, monkeypatch, spoil, options, words):
    monkeypatch.setattr(command, "load_pipeline", lambda name: pytest.fail("a model was loaded"))
    if spoil:
        spoil(folder)
    assert edit(folder, *(option.replace("{}", str(folder)) for option in options)) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
