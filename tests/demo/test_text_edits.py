"""Text edits with known answers: the right answer scores as one, and nothing else does."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from rewind.demo import captions, clip, text_edits
from rewind.demo import world as W

SEED = text_edits.SEEDS["validation"]


def scored(chosen, **changes):
    """The score of the example's right answer with some of its parameters changed."""
    scene = replace(chosen.target_scene, **changes)
    return text_edits.score(chosen, W.render(scene)[0][0])


@pytest.mark.parametrize("kind", text_edits.KINDS)
def test_the_right_answer_succeeds_and_the_source_does_not(kind):
    for seed in range(SEED, SEED + 8):
        chosen = text_edits.text_example(seed, kind)
        answer, unedited = (text_edits.score(chosen, frames) for frames in (chosen.target, chosen.source))
        assert answer.success and all(answer.right.values())
        assert unedited.appearance and not unedited.accuracy and not unedited.success


def test_a_wrong_look_with_the_right_motion_fails_in_appearance_alone():
    chosen = text_edits.text_example(SEED + 3, "motion")
    colours = W.palette(captions.WORLD)
    other = colours[(chosen.source_words.colour + 1) % len(colours)]
    faded = (chosen.target_scene.colour + 0.2 * torch.tensor([-1.0, 1.0, 1.0])).clamp(0, 1)
    for wrong in (
        {"colour": other},
        {"colour": faded},
        {"shape": (chosen.source_words.shape + 1) % 3},
        {"background": chosen.target_scene.background.flip(-1)},
        {"background": chosen.target_scene.background + 0.08},
        {"background": chosen.target_scene.background * captions.NIGHT},
        {"band": torch.tensor([True])},
    ):
        got = scored(chosen, **wrong)
        assert got.accuracy and not got.appearance and not got.success, wrong


def test_the_right_look_with_a_wrong_motion_fails_in_accuracy_alone():
    chosen = text_edits.text_example(SEED + 2, "motion")
    path = chosen.target_scene.position
    slower = path[:, :1] + (path - path[:, :1]) * (0.5 if chosen.target_words.speed == 1 else 2.0)
    for wrong in (path.flip(1), path[:, :1].expand_as(path), slower):
        got = scored(chosen, position=wrong)
        assert got.appearance and not got.accuracy and not got.success


@pytest.mark.parametrize("kind", ["style", "object", "background"])
def test_other_edits_must_keep_the_motion(kind):
    chosen = text_edits.text_example(SEED + 3, kind)
    got = scored(chosen, position=chosen.target_scene.position.flip(1))
    assert got.accuracy and not got.appearance


def test_a_new_background_may_be_as_bright_as_it_likes_but_a_kept_one_may_not():
    for seed in range(SEED, SEED + 20):
        chosen = text_edits.text_example(seed, "background")
        if 0.18 < float(chosen.target_scene.background.amax()) < 0.24:
            break
    assert scored(chosen, background=chosen.target_scene.background * 1.5).success
    kept = text_edits.text_example(seed, "object")
    assert not scored(kept, background=kept.target_scene.background * 1.5).appearance


def test_without_an_object_nothing_but_the_background_is_right():
    chosen = text_edits.text_example(SEED, "motion")
    got = scored(chosen, present=torch.tensor([False]))
    assert got.right == dict.fromkeys(text_edits.PROPERTIES, False) | {"background": True}
    assert math.isnan(got.colour_error) and math.isnan(got.heading_error)
    assert got.background_error < 0.01


def test_the_errors_are_those_of_the_parameters():
    chosen = text_edits.text_example(SEED + 1, "motion")
    shifted = scored(chosen, colour=chosen.target_scene.colour * 0.9)
    assert shifted.colour_error == pytest.approx(0.1 * float(chosen.target_scene.colour.norm()), abs=0.01)
    back = scored(chosen, position=chosen.target_scene.position.flip(1))
    assert back.heading_error == pytest.approx(180, abs=math.degrees(captions.WOBBLE) + 1)
    step = chosen.target_scene.position[0].diff(dim=0)[0].norm()
    assert scored(chosen).speed == pytest.approx(float(step), rel=0.05)


def test_motion_prompts_name_no_look_and_the_others_what_is_changed():
    looks = {*W.COLOURS, *W.SHAPES, *captions.HUES, "background", "night", "striped"}
    for seed in range(SEED, SEED + 8):
        prompts = {kind: text_edits.text_example(seed, kind).prompt("sks") for kind in text_edits.KINDS}
        assert all(prompt.startswith("a sks ") for prompt in prompts.values())
        named = {kind: looks & set(prompt.replace(",", "").split()) for kind, prompt in prompts.items()}
        assert named["motion"] == set()
        assert named["style"] in ({"night"}, {"striped"})
        assert len(named["object"]) == 1 and named["object"] <= {*W.COLOURS, *W.SHAPES}
        assert len(named["background"]) == 2 and named["background"] & {*captions.HUES}
    chosen = text_edits.text_example(SEED, "motion")
    assert chosen.prompt("zq") == chosen.prompt("").replace("a shape", "a zq shape")
    assert "sks" not in chosen.caption


def test_motion_edits_are_another_speed_and_every_other_direction():
    turns = []
    for variant in range(text_edits.VARIANTS["motion"]):
        chosen = text_edits.text_example(SEED + 1, "motion", variant)
        old, new = chosen.source_words, chosen.target_words
        turns.append(int(new.direction - old.direction) % 4)
        assert (new.speed != old.speed) == (turns[-1] == 0)
    assert turns == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", text_edits.KINDS)
def test_a_clip_has_so_many_edits_and_the_seeds_take_them_in_turn(kind):
    count = text_edits.VARIANTS[kind]
    of_clip = [text_edits.text_example(SEED, kind, variant).prompt("") for variant in range(count)]
    assert len(set(of_clip)) == count
    for seed in range(SEED, SEED + count):
        chosen, wanted = (text_edits.text_example(seed, kind, v) for v in (None, seed % count))
        assert chosen.prompt("") == wanted.prompt("") and torch.equal(chosen.target, wanted.target)


def test_the_right_answers_stay_in_the_world_and_change_nothing_else():
    for seed in range(SEED, SEED + 12):
        for kind in text_edits.KINDS:
            chosen = text_edits.text_example(seed, kind)
            before, after = chosen.source_scene, chosen.target_scene
            assert after.position.min() >= 15.9 and after.position.max() <= 80.1
            assert torch.equal(before.radius, after.radius)
            same = {"colour": before.colour, "shape": before.shape, "band": before.band}
            changed = {name for name, value in same.items() if not torch.equal(value, getattr(after, name))}
            assert changed <= {"motion": set(), "style": {"band"}, "object": {"colour", "shape"}}.get(kind, set())
            assert torch.equal(before.position, after.position) == (kind != "motion")


def test_all_kinds_share_the_source_and_seeds_differ():
    sources = [text_edits.text_example(SEED, kind).source for kind in text_edits.KINDS]
    assert all(torch.equal(source, sources[0]) for source in sources)
    assert not torch.equal(sources[0], text_edits.text_example(SEED + 1).source)


def test_the_sets_of_seeds_do_not_meet():
    training = (7_000_000, 8_000_000)
    starts = sorted([*clip.SEEDS.values(), *text_edits.SEEDS.values(), *training, clip.SHIPPED_SEED])
    assert all(later - earlier > 10_000 for earlier, later in zip(starts, starts[1:], strict=False))


def test_another_kind_is_refused():
    with pytest.raises(ValueError, match="motion, style"):
        text_edits.text_example(0, "paint")
