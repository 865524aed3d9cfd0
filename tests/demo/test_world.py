"""The synthetic world: its motion, its edits, its masks and its flow are what they say they are."""

import pytest
import torch
import torch.nn.functional as F

from rewind.demo import world as W


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def scene():
    return W.sample(12, generator(3), motion="unpredictable", editable=True)


def test_equal_seeds_give_equal_clips_and_other_seeds_others():
    first, again, other = (W.render(W.sample(4, generator(s)))[0] for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_frames_have_the_promised_shape_and_range(scene):
    frames, mask = W.render(scene)
    assert frames.shape == (12, 8, 3, 96, 96) and mask.shape == (12, 8, 96, 96)
    assert 0 <= frames.min() and frames.max() <= 1


def test_an_object_is_never_thinner_than_20_pixels():
    scene = W.sample(60, generator(3), motion="unpredictable", editable=True)
    smaller = W.edit(scene, "resize", generator(4))
    assert (smaller.radius < scene.radius).any() and (smaller.radius > scene.radius).any()
    for each in (scene, smaller, W.edit(scene, "reshape", generator(4))):
        assert (W.render(each)[1] > 0.5).any(2).sum(-1).min() >= 20


def test_objects_stay_inside_the_frame():
    scene = W.sample(200, generator(5))
    assert scene.position.min() >= 15.9 and scene.position.max() <= 80.1


def test_predictable_clips_go_straight_on_at_the_speed_of_the_bucket():
    scene = W.sample(50, generator(6), motion="predictable")
    step = scene.position.diff(dim=1)
    direction = torch.stack([scene.heading.cos(), scene.heading.sin()], -1)[:, :-1]
    expected = direction * (scene.motion_bucket / W.BUCKET_PER_SPEED)[:, None, None]
    assert torch.allclose(step, expected, atol=1e-4)


def test_unpredictable_clips_of_one_first_frame_differ_and_tell_no_speed():
    scene = W.sample(200, generator(7), motion="unpredictable")
    assert (scene.motion_bucket == W.UNSPECIFIED_MOTION).all()
    speed = scene.position.diff(dim=1).norm(dim=-1)
    assert (speed.amax(1) - speed.amin(1)).mean() > 0.5
    assert scene.heading.diff(dim=1).abs().mean() > 0.15


@pytest.mark.parametrize("kind", W.EDITS)
def test_an_edit_changes_its_property_and_keeps_the_motion(scene, kind):
    edited = W.edit(scene, kind, generator(1))
    assert torch.equal(edited.position, scene.position) and torch.equal(edited.heading, scene.heading)
    changed = {
        name: not torch.equal(getattr(scene, name), getattr(edited, name))
        for name in ("shape", "radius", "colour", "present", "band", "background")
    }
    expected = {"recolour": "colour", "reshape": "shape", "resize": "radius", "add": "band", "remove": "present"}
    assert [name for name, differs in changed.items() if differs] == [expected.get(kind, kind)]


@pytest.mark.parametrize("kind", W.EDITS)
def test_outside_the_edited_region_nothing_changes_and_inside_every_clip_does(scene, kind):
    edited = W.edit(scene, kind, generator(1))
    (before, mask_before), (after, mask_after) = W.render(scene), W.render(edited)
    difference = (before - after).abs().amax(2)
    region = W.edited_region(mask_before, mask_after, kind)
    assert (difference * (1 - region)).max() < 1e-6
    assert (difference * region).flatten(1).amax(1).min() > 0.02


def test_recolouring_is_clearly_another_colour(scene):
    edited = W.edit(scene, "recolour", generator(2))
    assert (edited.colour - scene.colour).norm(dim=-1).min() > 0.4


def test_every_colour_may_become_every_other():
    scene = W.sample(300, generator(5), editable=True)
    edited, palette = W.edit(scene, "recolour", generator(6)), W.palette(scene.world)
    pairs = {(tuple(a.tolist()), tuple(b.tolist())) for a, b in zip(scene.colour, edited.colour)}
    assert len(pairs) == len(palette) * (len(palette) - 1)


def test_an_object_is_lighter_than_its_background_whatever_its_colour():
    """So a recolouring never turns round the contrast, which is what inverted noise keeps of the motion."""
    scene = W.sample(100, generator(8))
    assert W.palette(scene.world).min() > scene.background.max() + 0.1
    former = W.sample(100, generator(8), W.World(background=(0.25, 0.75), tint=0.0))
    assert former.colour.min() < former.background.min() and former.background.max() > 0.6
    assert torch.equal(former.position, scene.position)


def test_the_flow_carries_each_frame_onto_the_next():
    scene = W.sample(6, generator(9), motion="unpredictable", editable=True)
    frames, mask = W.render(scene)
    flow = W.optical_flow(scene)
    assert flow.shape == (6, 7, 2, 96, 96)
    y, x = torch.meshgrid(torch.arange(96.0), torch.arange(96.0), indexing="ij")
    target = torch.stack([x, y]) + flow  # where each pixel of frame t is in frame t + 1
    grid = (2 * target + 1) / 96 - 1
    warped = F.grid_sample(frames[:, 1:].flatten(0, 1), grid.flatten(0, 1).permute(0, 2, 3, 1), align_corners=False)
    inside = (mask[:, :-1] > 0.99).flatten(0, 1)[:, None]
    error = ((warped - frames[:, :-1].flatten(0, 1)).abs() * inside).sum() / (3 * inside.sum())
    still = ((frames[:, 1:] - frames[:, :-1]).abs().flatten(0, 1) * inside).sum() / (3 * inside.sum())
    assert error < 0.015 and error < 0.2 * still


def test_bad_words_are_refused():
    with pytest.raises(ValueError, match="motion"):
        W.sample(1, generator(), motion="sideways")
    with pytest.raises(ValueError, match="recolour"):
        W.edit(W.sample(1, generator()), "explode", generator())
