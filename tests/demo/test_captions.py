"""Captions and scenes agree: what a caption says is what its clip shows."""

from __future__ import annotations

import math

import pytest
import torch

from rewind.demo import captions
from rewind.demo import world as W

N = 300


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def words():
    return captions.draw_words(N, generator(), styled=0.5)


@pytest.fixture(scope="module")
def scene(words):
    return captions.scenes(words, generator(1))


def test_everything_is_drawn_and_styles_as_often_as_asked(words):
    for name, options in (
        ("colour", W.COLOURS),
        ("shape", W.SHAPES),
        ("direction", captions.DIRECTIONS),
        ("speed", captions.SPEEDS),
        ("hue", captions.HUES),
        ("style", captions.STYLES),
    ):
        assert set(getattr(words, name).tolist()) == set(range(len(options))), name
    assert 0.4 < (words.style > 0).float().mean() < 0.6
    assert (captions.draw_words(N, generator(), styled=0.0).style == 0).all()


def test_the_object_has_the_colour_and_shape(words, scene):
    assert torch.equal(scene.shape, words.shape) and scene.present.all()
    assert torch.equal(scene.colour, W.palette(captions.WORLD)[words.colour])


def test_it_moves_straight_in_the_direction_at_the_speed(words, scene):
    """In pictures y points down, so "down" is +y."""
    steps = scene.position.diff(dim=1)
    assert (steps - steps[:, :1]).abs().max() < 1e-4
    wanted = {"right": (1.0, 0.0), "down": (0.0, 1.0), "left": (-1.0, 0.0), "up": (0.0, -1.0)}
    axes = torch.tensor([wanted[captions.DIRECTIONS[i]] for i in words.direction])
    speed = steps[:, 0].norm(dim=-1)
    assert (((steps[:, 0] / speed[:, None]) * axes).sum(-1) > math.cos(captions.WOBBLE) - 1e-5).all()
    bounds = {"slowly": captions.SLOW, "quickly": captions.QUICK}
    low, high = torch.tensor([bounds[captions.SPEEDS[i]] for i in words.speed]).unbind(1)
    assert ((speed >= low - 1e-3) & (speed <= high + 1e-3)).all()
    assert captions.SLOW[1] < captions.QUICK[0], "speeds can be told apart"
    nose = torch.stack([scene.heading.cos(), scene.heading.sin()], -1)[:, 0]
    assert torch.allclose(nose, steps[:, 0] / speed[:, None], atol=1e-4)


def test_the_object_stays_inside(scene):
    margin = captions.WORLD.margin
    assert (scene.position > margin - 1e-3).all() and (scene.position < 96 - margin + 1e-3).all()


def test_the_background_has_the_hue_and_the_object_is_lighter(words, scene):
    mean = scene.background.mean(1)
    for index, hue in enumerate(captions.HUES):
        found = mean[(words.hue == index) & (words.style != 1)]
        if hue == "grey":
            assert (found.amax(1) - found.amin(1)).max() < 1e-5
        else:
            assert (found.argmax(1) == ("red", "green", "blue").index(hue)).all()
            assert (found.amax(1) - found.amin(1)).min() > 0.03
    assert (scene.background.amax((1, 2)) < scene.colour.amin(1)).all()


def test_styles_are_shown(words, scene):
    assert torch.equal(scene.band, words.style == captions.STYLES.index(", striped"))
    brightness = scene.background.amax(-1).mean(1)
    night = words.style == captions.STYLES.index(", at night")
    assert brightness[night].max() < captions.NIGHT * captions.WORLD.background[1] + 1e-5
    assert brightness[~night & (words.hue < 3)].min() > captions.WORLD.background[0] - 1e-5
    assert brightness[night].max() < brightness[~night].min(), "grey backgrounds are darker, but not as at night"


def test_the_rendered_clip_shows_it(words, scene):
    """In pixels: the mask's centre goes where the caption says."""
    _, mask = W.render(scene[:40])
    y, x = torch.meshgrid(torch.arange(96.0), torch.arange(96.0), indexing="ij")
    centre = torch.stack([(mask * axis).sum((-1, -2)) / mask.sum((-1, -2)) for axis in (x, y)], -1)
    moved = centre[:, -1] - centre[:, 0]
    angle = torch.atan2(moved[:, 1], moved[:, 0])
    assert torch.equal((angle / (math.pi / 2)).round().long() % 4, words.direction[:40])


def test_equal_seeds_give_equal_clips_and_captions():
    def make(seed):
        draw = generator(seed)
        words = captions.draw_words(20, draw)
        said = [captions.draw_caption(words, i, draw) for i in range(20)]
        return said, W.render(captions.scenes(words, draw))[0]

    (first, frames), (again, same), (other, _) = make(3), make(3), make(4)
    assert first == again and torch.equal(frames, same) and first != other


def one(**indices):
    values = {"colour": 0, "shape": 0, "direction": 0, "speed": 1, "hue": 2, "style": 0, **indices}
    return captions.Words(**{name: torch.tensor([value]) for name, value in values.items()})


def test_captions_read_as_the_docstring_says():
    assert captions.caption(one(), 0) == "a red circle moves right quickly on a blue background"
    bare = {"colour": False, "shape": False, "speed": False, "hue": False}
    assert captions.caption(one(direction=3, style=1), 0, token="sks", **bare) == "a sks shape moves up, at night"
    striped = captions.caption(one(colour=5, shape=2, direction=1, speed=0, hue=3, style=2), 0)
    assert striped == "a cyan triangle moves down slowly on a grey background, striped"


def test_drawn_captions_drop_words_and_have_made_up_ones():
    words, draw = one(style=2), generator(5)
    said = [captions.draw_caption(words, 0, draw) for _ in range(1000)]
    spoken = [caption.replace(",", " ").split() for caption in said]
    shares = {word: sum(word in words for words in spoken) / 1000 for word in ("red", "circle", "quickly", "blue")}
    for word, dropped in (("red", 0.15), ("circle", 0.2), ("quickly", 0.25), ("blue", 0.25)):
        assert shares[word] == pytest.approx(1 - dropped, abs=0.05), word
    assert all("moves right" in caption and caption.endswith(", striped") for caption in said)
    assert all(("shape" in words) != ("circle" in words) for words in spoken)
    made_up = [words[1] for words in spoken if words[1] not in ("red", "circle", "shape")]
    assert len(made_up) == pytest.approx(200, abs=45)
    assert all(2 <= len(word) <= 4 and word.isalpha() for word in made_up) and len(set(made_up)) > 150


def test_paths_leave_the_room_they_need():
    heading, speed = torch.tensor([0.0, math.pi / 2]), torch.tensor([3.0, 5.0])
    for where in (0.0, 1.0):
        path = captions.straight(heading, speed, captions.WORLD, torch.full((2, 2), where))
        edge = (captions.WORLD.margin, 96 - captions.WORLD.margin)[int(where)]
        reached = path.amin(1) if where == 0 else path.amax(1)
        assert torch.allclose(reached, torch.full((2, 2), float(edge)), atol=1e-4)
        assert torch.allclose(path[:, -1] - path[:, 0], torch.tensor([[21.0, 0.0], [0.0, 35.0]]), atol=1e-4)
