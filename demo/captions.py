"""Captions of the synthetic world: what the text models are trained on, and what tells whether they obeyed.

A caption names what a clip shows, in one order of words:

    a [token] [colour] shape moves direction [speed] [on a hue background][, style]

    "a red circle moves right quickly on a blue background"
    "a sks shape moves up, at night"

Words in brackets are left out now and then, so that a model learns what it may choose itself. `token` is a made-up word
without meaning, of which a caption in five has one: a model that knows such words as harmless can learn one later, by
fine-tuning.

The clips differ from the world of the image-to-video model in what words must be able to tell: straight motion along
one of four directions, backgrounds of a hue that can be seen, and shapes half as large again, five places of the
latents wide: at three and a half the model knew the words but drew circles and squares alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import world as W

DIRECTIONS = ("right", "down", "left", "up")  # headings of 0, 90, 180 and 270 degrees: y points down in a picture
SPEEDS = ("slowly", "quickly")
HUES = ("red", "green", "blue", "grey")
STYLES = ("", ", at night", ", striped")  # as drawn by day, on a background near black, with a dark band on the object
NIGHT = 0.35  # brightness of the background at night, of what it is by day
SLOW, QUICK = (2.0, 3.2), (4.4, 5.8)  # pixels a frame at 96 pixels
WOBBLE = math.radians(12)  # headings lie within this of their direction
HUE_WOBBLE = 0.04

OPTIONS = {  # the words of each of a caption's properties
    "colour": W.COLOURS,
    "shape": W.SHAPES,
    "direction": DIRECTIONS,
    "speed": SPEEDS,
    "hue": HUES,
    "style": STYLES,
}

WORLD = W.World(
    radius=(17.0, 26.0),
    margin=25.0,
    background=(0.15, 0.32),
    saturation=(0.30, 0.42),
    band=0.0,
    empty=0.0,
    predictable=1.0,
)


@dataclass(frozen=True)
class Words:
    """What captions say of n clips, as indices into the lists above."""

    colour: Tensor  # [n] index into world.COLOURS
    shape: Tensor  # [n] index into world.SHAPES
    direction: Tensor  # [n] index into DIRECTIONS
    speed: Tensor  # [n] index into SPEEDS
    hue: Tensor  # [n] index into HUES
    style: Tensor  # [n] index into STYLES

    def __len__(self) -> int:
        return len(self.colour)


def draw_words(n: int, generator: torch.Generator, styled: float = 0.3) -> Words:
    """Draw what n clips show; a share `styled` of them in a style."""

    def pick(options: int) -> Tensor:
        return torch.randint(options, (n,), generator=generator)

    plain = torch.rand(n, generator=generator) >= styled
    return Words(
        colour=pick(len(W.COLOURS)),
        shape=pick(len(W.SHAPES)),
        direction=pick(len(DIRECTIONS)),
        speed=pick(len(SPEEDS)),
        hue=pick(len(HUES)),
        style=torch.where(plain, 0, 1 + pick(len(STYLES) - 1)),
    )


def scenes(words: Words, generator: torch.Generator, world: W.World = WORLD) -> W.Scene:
    """Draw scenes that show what the words say; everything else about them is left to the generator."""
    n, unit = len(words), world.size / 96
    scene = W.sample(n, generator, world, "predictable", editable=True)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    hue = words.hue[:, None] / (len(HUES) - 1) + HUE_WOBBLE * (2 * rand(n, 1) - 1)
    grey = (words.hue == HUES.index("grey"))[:, None, None]
    ends = W.background(hue.expand(n, 2) % 1, world, rand(n, 2), rand(n, 2))
    ends = torch.where(grey, ends.mean(-1, keepdim=True).expand_as(ends), ends)
    ends = torch.where((words.style == 1)[:, None, None], NIGHT * ends, ends)
    low, high = torch.tensor([SLOW, QUICK])[words.speed].unbind(1)
    speed = low + (high - low) * rand(n)
    heading = words.direction * math.pi / 2 + WOBBLE * (2 * rand(n) - 1)
    return replace(
        scene,
        colour=W.palette(world)[words.colour],
        shape=words.shape,
        background=ends,
        band=words.style == 2,
        heading=heading[:, None].expand(n, world.frames),
        position=straight(heading, speed, world, rand(n, 2)) * unit,
        motion_bucket=W.BUCKET_PER_SPEED * speed,
    )


def straight(heading: Tensor, speed: Tensor, world: W.World, where: Tensor) -> Tensor:
    """Straight paths [n, T, 2] inside the world's margin, in pixels of a 96-pixel frame.

    heading: [n] radians; speed: [n] pixels a frame; where: [n, 2] in 0..1, the place in the room that the path leaves.
    """
    step = torch.stack([heading.cos(), heading.sin()], -1) * speed[:, None]
    return W.placed(step[:, None] * torch.arange(world.frames)[None, :, None], world, where)


def caption(
    words: Words,
    index: int,
    colour: bool = True,
    shape: bool = True,
    speed: bool = True,
    hue: bool = True,
    token: str = "",
) -> str:
    """The caption of one clip. The switches leave words out; without `shape` the object is "a shape"."""
    parts = [
        "a",
        token,
        W.COLOURS[words.colour[index]] if colour else "",
        W.SHAPES[words.shape[index]] if shape else "shape",
        "moves",
        DIRECTIONS[words.direction[index]],
        SPEEDS[words.speed[index]] if speed else "",
        f"on a {HUES[words.hue[index]]} background" if hue else "",
    ]
    return " ".join(part for part in parts if part) + STYLES[words.style[index]]


def made_up_word(generator: torch.Generator) -> str:
    """A word of two to four random letters."""
    letters = torch.randint(26, (2 + int(torch.randint(3, (), generator=generator)),), generator=generator)
    return "".join(chr(ord("a") + int(letter)) for letter in letters)


def draw_caption(words: Words, index: int, generator: torch.Generator) -> str:
    """A caption of one clip for training: words left out at random, a made-up word in one of five."""
    says = (torch.rand(4, generator=generator) >= torch.tensor([0.15, 0.2, 0.25, 0.25])).tolist()
    token = made_up_word(generator) if torch.rand((), generator=generator) < 0.2 else ""
    return caption(words, index, *says, token=token)
