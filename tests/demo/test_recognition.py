"""What a clip shows is read right from its pixels, blurred or not."""

import math

import pytest
import torch

from rewind.demo import captions
from rewind.demo import world as W
from rewind.demo.recognition import recognise


def draw(n, seed=11, world=captions.WORLD):
    generator = torch.Generator().manual_seed(seed)
    words = captions.draw_words(n, generator, styled=0.4)
    scene = captions.scenes(words, generator, world)
    return words, scene, W.render(scene)[0]


def rights(words, scene, clips):
    """How often each property is read right."""
    count = dict.fromkeys(("colour", "shape", "direction", "speed", "quick", "hue", "night", "striped", "present"), 0)
    for i, clip in enumerate(clips):
        seen, speed = recognise(clip), float(scene.position[i].diff(dim=0)[0].norm())
        count["colour"] += seen.colour == words.colour[i]
        count["shape"] += seen.shape == words.shape[i]
        count["direction"] += seen.direction == words.direction[i]
        count["speed"] += abs(seen.speed / speed - 1) < 0.1
        count["quick"] += seen.quick == words.speed[i]
        count["hue"] += seen.hue == words.hue[i]
        count["night"] += seen.night == (words.style[i] == 1)
        count["striped"] += seen.striped == (words.style[i] == 2)
        count["present"] += seen.present
    return {key: int(value) / len(clips) for key, value in count.items()}


def test_every_property_of_a_drawn_clip_is_read():
    shares = rights(*draw(120))
    exact = ("colour", "direction", "speed", "quick", "night", "present")
    assert {key: shares[key] for key in exact} == dict.fromkeys(exact, 1.0)
    assert min(shares.values()) >= 0.97, shares


def test_the_numbers_are_those_of_the_scene():
    _, scene, clips = draw(20, seed=12)
    for i, clip in enumerate(clips):
        seen = recognise(clip)
        assert (seen.path - scene.position[i]).abs().max() < (1.0 if not scene.band[i] else 6.0)
        assert (seen.rgb - scene.colour[i]).norm() < 0.02
        assert (seen.background - scene.background[i].mean(0)).norm() < 0.01
        assert abs(math.remainder(seen.heading - float(scene.heading[i, 0]), 2 * math.pi)) < math.radians(3)
        assert abs(seen.radius - float(scene.radius[i])) < 1.5
        assert seen.likeness > 0.9


@pytest.mark.parametrize("count", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_a_clip_that_went_through_the_vae_is_read_as_well(count):
    from rewind.demo.models import WEIGHTS, load_components
    from rewind.demo.train import decode, encode

    if not WEIGHTS.is_file():
        pytest.skip("the embedded weights are not here")
    vae = load_components()[1]
    words, scene, clips = draw(count, seed=13)
    with torch.no_grad():
        through = [(decode(vae, encode(vae, 2 * clip[None] - 1))[0] / 2 + 0.5).clamp(0, 1) for clip in clips]
    shares = rights(words, scene, through)
    # Backgrounds are dark, and the VAE moves the hue of some to that of a neighbour.
    assert shares.pop("hue") >= 0.85, shares
    assert min(shares.values()) >= 0.95, shares


def test_a_clip_without_an_object_says_so():
    generator = torch.Generator().manual_seed(5)
    scene = captions.scenes(captions.draw_words(6, generator), generator)
    clips = W.render(W.edit(scene, "remove", generator))[0]
    for clip in clips:
        for shown in (clip, (clip + 0.02 * torch.randn(clip.shape, generator=generator)).clamp(0, 1)):
            seen = recognise(shown)
            assert not seen.present and not seen.visible.any() and not seen.striped
            assert (seen.colour, seen.shape, seen.direction) == (-1, -1, -1)
            assert seen.path.isnan().all() and math.isnan(seen.speed)


def test_an_object_that_vanishes_halfway_is_not_present_but_what_there_was_is_told():
    words, scene, clips = draw(6, seed=14)
    empty = W.render(W.edit(scene, "remove", torch.Generator()))[0]
    for i, clip in enumerate(torch.cat([clips[:, :4], empty[:, 4:]], 1)):
        seen = recognise(clip)
        assert not seen.present and seen.visible.tolist() == [True] * 4 + [False] * 4
        assert seen.path[4:].isnan().all()
        assert (seen.colour, seen.direction) == (words.colour[i], words.direction[i])


def test_of_two_objects_the_path_does_not_fall_between():
    _, scene, clips = draw(1, seed=15)
    clip = clips[0].clone()
    corner = (slice(2, 12), slice(84, 94)) if scene.position[0, 0, 0] < 48 else (slice(84, 94), slice(2, 12))
    clip[:, :, corner[0], corner[1]] = 0.8
    assert (recognise(clip).path - scene.position[0]).norm(dim=1).max() < 6


def test_what_stands_still_has_no_direction_and_other_sizes_are_told_at_96_pixels():
    words, scene, clips = draw(2, seed=16)
    still = recognise(clips[0, :1].expand(8, -1, -1, -1))
    assert still.present and still.speed < 1e-3 and still.direction == -1 and math.isnan(still.heading)
    large = torch.nn.functional.interpolate(clips[1], scale_factor=2, mode="bilinear")
    assert recognise(large).speed == pytest.approx(float(scene.position[1].diff(dim=0)[0].norm()), rel=0.05)
    assert recognise(large).shape == words.shape[1]


def test_other_formats_are_refused():
    with pytest.raises(ValueError, match=r"\[T, 3, size, size\]"):
        recognise(torch.zeros(8, 96, 96, 3))
