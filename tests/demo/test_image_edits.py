"""Edits for a text-to-image model: the right answer scores as one, and what is told of consistency is true."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from rewind.demo import captions, clip, image_edits, text_edits
from rewind.demo import world as W

SEED = image_edits.SEEDS["validation"]


@pytest.mark.parametrize("name", image_edits.EDITS)
def test_the_right_answer_succeeds_and_the_source_only_keeps(name):
    for seed in range(SEED, SEED + 4):
        edit = image_edits.image_edit(seed, name)
        answer, unedited = (image_edits.score(edit, f) for f in (edit.example.target, edit.example.source))
        assert answer.success and answer.path_error < 0.3 and answer.colour_error < 0.01 and answer.psnr_kept > 50
        assert unedited.kept and not unedited.edited and not unedited.success


def test_prompts_are_full_captions_with_one_word_changed():
    for seed in range(SEED, SEED + 8):
        for name in image_edits.EDITS:
            edit = image_edits.image_edit(seed, name)
            pairs = list(zip(edit.caption.split(), edit.prompt.split(), strict=True))
            (changed,) = [pair for pair in pairs if pair[0] != pair[1]]
            options = {"colour": W.COLOURS, "shape": W.SHAPES, "background": captions.HUES}[name]
            assert {*changed} <= {*options} and "background" in edit.prompt and "moves" in edit.prompt


def test_all_edits_share_the_source_and_seeds_differ():
    sources = [image_edits.image_edit(SEED, name).example.source for name in image_edits.EDITS]
    assert all(torch.equal(source, sources[0]) for source in sources)
    assert not torch.equal(sources[0], image_edits.image_edit(SEED + 1, "colour").example.source)


def drawn(edit, **changes):
    """The right answer with some of its parameters changed."""
    return W.render(replace(edit.example.target_scene, **changes))[0][0]


def test_an_object_off_its_path_is_not_kept_though_its_motion_is_right():
    edit = image_edits.image_edit(SEED, "colour")
    path = edit.example.target_scene.position
    for away, kept in ((3.0, True), (6.0, False)):
        got = image_edits.score(edit, drawn(edit, position=path + torch.tensor([away, 0.0])))
        assert got.right["motion"] and got.edited and got.kept == kept
        assert got.path_error == pytest.approx(away, abs=0.3)


def test_what_else_changes_is_not_kept():
    edit = image_edits.image_edit(SEED, "shape")
    scene = edit.example.target_scene
    for wrong in ({"background": scene.background + 0.1}, {"position": scene.position.flip(1)}):
        got = image_edits.score(edit, drawn(edit, **wrong))
        assert got.edited and not got.kept
    other = image_edits.score(edit, drawn(edit, shape=edit.example.source_scene.shape))
    assert other.kept and not other.edited


def test_without_an_object_nothing_is_kept():
    edit = image_edits.image_edit(SEED, "colour")
    got = image_edits.score(edit, drawn(edit, present=torch.tensor([False])))
    assert not got.kept and not got.edited and math.isnan(got.path_error) and math.isnan(got.colour_error)


def test_the_unedited_region_is_where_the_edit_may_not_show():
    edit = image_edits.image_edit(SEED, "colour")
    on_object = (edit.target_mask > 0.5)[:, None]
    painted = torch.where(on_object, torch.tensor(0.5), edit.example.source)
    assert image_edits.score(edit, painted).psnr_kept == 100
    dimmed = torch.where(on_object, edit.example.source, 0.9 * edit.example.source)
    assert image_edits.score(edit, dimmed).psnr_kept < 40


# --- consistency ------------------------------------------------------------------------------------------------------


def test_the_flow_goes_back_to_where_the_object_was():
    scene = image_edits.image_edit(SEED, "colour").example.target_scene
    flow, mask = image_edits.flow_back(scene), W.render(scene)[1][0]
    step = scene.position[0].diff(dim=0)
    for t in range(len(flow)):
        inside = mask[t + 1] > 0.5
        assert torch.allclose(flow[t][:, inside], -step[t][:, None].expand(-1, int(inside.sum())), atol=1e-4)
        assert not flow[t][:, ~inside].any()


def test_a_turning_object_is_followed_too():
    scene = W.sample(1, torch.Generator().manual_seed(3), W.World(), "unpredictable", editable=True)
    (frames,), (mask,) = W.render(scene)
    flow = image_edits.flow_back(scene)
    assert scene.heading.diff(dim=1).abs().max() > 0.1
    on_object, on_background = image_edits.comparable(mask, flow)
    error = (frames[1:] - image_edits.warped(frames, flow)).abs().mean(1)
    assert error[on_object].mean() < 0.01 and error[on_background].mean() < 1e-5
    unmoved = (frames[1:] - frames[:-1]).abs().mean(1)
    assert unmoved[on_object].mean() > 5 * error[on_object].mean()


def test_what_was_hidden_and_what_comes_from_outside_is_not_compared():
    scene = image_edits.image_edit(SEED, "colour").example.target_scene
    leaving = replace(scene, position=torch.stack([torch.linspace(90, 60, 8), torch.full((8,), 50.0)], 1)[None])
    mask, flow = W.render(leaving)[1][0], image_edits.flow_back(leaving)
    on_object, on_background = image_edits.comparable(mask, flow)
    assert not (on_background & ((mask[1:] > 0) | (mask[:-1] > 0))).any()
    assert (mask[1:][on_object] == 1).all() and on_object.any(dim=(1, 2)).all()
    x = torch.arange(96.0) + flow[:, 0]
    assert (x > 95).any() and (x[on_object] <= 95).all()


def test_the_warp_error_of_the_truth_is_small_and_that_of_a_flicker_its_size():
    for name in image_edits.EDITS:
        edit = image_edits.image_edit(SEED + 1, name)
        truth = edit.example.target
        least, least_object = image_edits.warp_error(edit, truth)
        assert least < 2e-4 and least_object < 6e-3
        sign = torch.tensor([1.0, -1.0] * 4)[:, None, None, None]
        whole, on_object = image_edits.warp_error(edit, truth * 0.8 + 0.1 + 0.01 * sign)
        assert whole == pytest.approx(0.02, abs=1e-3) and on_object == pytest.approx(0.02, abs=5e-3)
        masked = 0.8 * truth + 0.05 * sign * edit.target_mask[:, None]
        whole, on_object = image_edits.warp_error(edit, masked)
        assert on_object > 0.09 and whole < 0.2 * on_object


def test_an_object_that_does_not_move_as_it_should_has_a_warp_error():
    edit = image_edits.image_edit(SEED + 1, "colour")
    held = edit.example.target[:1].expand_as(edit.example.target)
    assert image_edits.warp_error(edit, held)[1] > 5 * image_edits.warp_error(edit, edit.example.target)[1]


def test_the_sets_of_seeds_do_not_meet():
    training = (7_000_000, 8_000_000)
    starts = [*clip.SEEDS.values(), *text_edits.SEEDS.values(), *training, clip.SHIPPED_SEED]
    starts = sorted([*starts, *image_edits.SEEDS.values()])
    assert all(later - earlier >= 5_000 for earlier, later in zip(starts, starts[1:], strict=False))


def test_another_edit_is_refused():
    with pytest.raises(ValueError, match="colour, shape, background"):
        image_edits.image_edit(SEED, "motion")
