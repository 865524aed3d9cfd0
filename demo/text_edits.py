"""Text edits with known answers: a clip of the captioned world, what is asked of it in words, and if that was done.

What must stay comes from the source clip alone: the prompt names only the motion and what is changed. "A sks shape
moves up quickly" leaves colour, shape and background to the clip; a model that has not learned them cannot know them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from . import captions
from . import world as W
from .captions import WORLD, Words
from .recognition import Seen, recognise

KINDS = ("motion", "style", "object", "background")
TOKEN = "sks"  # the made-up word that stands for the source
# The first seeds of the sets, apart from all others of the demo (demo/clip.py, demo/train.py, demo/train_text.py).
SEEDS = {"validation": 40_000, "test": 4_000_000}

PROPERTIES = ("colour", "shape", "background", "style", "motion")
# When a property is right, besides being the nearest of the words. A clip that goes through the embedded VAE keeps its
# object's colour to 0.03 and its background to 0.04.
COLOUR_ERROR = 0.25  # RGB distance of the object's colour; two colours of the palette are 0.42 apart or more
BACKGROUND_ERROR = 0.10  # RGB distance of the background's mean colour
HEADING_ERROR = 45.0  # degrees; speed is right in its class, slowly or quickly


@dataclass(frozen=True)
class Task:
    """What an edit must change and what must stay, each some of PROPERTIES; together they are all of them."""

    change: tuple[str, ...]
    keep: tuple[str, ...]


@dataclass(frozen=True)
class TextExample:
    """A clip, an edit of it in words, and one right answer. T frames of H x W pixels."""

    kind: str  # one of KINDS
    source: Tensor  # [T, 3, H, W] in 0..1
    target: Tensor  # [T, 3, H, W], one right answer: a moved object may also start elsewhere
    source_words: Words  # of the one clip
    target_words: Words
    task: Task
    source_scene: W.Scene
    target_scene: W.Scene

    @property
    def caption(self) -> str:
        """All that the source shows, in words."""
        return captions.caption(self.source_words, 0)

    def prompt(self, token: str = TOKEN) -> str:
        """What is asked: the motion, and what is changed, of the object that the token stands for."""
        old, new = self.source_words, self.target_words
        named = {name: bool(getattr(old, name) != getattr(new, name)) for name in ("colour", "shape", "hue")}
        return captions.caption(new, 0, token=token, **named)


@dataclass(frozen=True)
class Score:
    """How far a result is from what was asked. Errors are NaN where no object is seen."""

    colour_error: float  # RGB distance
    background_error: float  # RGB distance
    heading_error: float  # degrees
    speed: float  # pixels a frame
    right: dict[str, bool]  # of each of PROPERTIES
    appearance: bool  # all that must stay is as in the source
    accuracy: bool  # all that was asked for shows

    @property
    def success(self) -> bool:
        return self.appearance and self.accuracy


# --- examples ---------------------------------------------------------------------------------------------------------


# How many edits of a kind a clip has; those of "motion" are another speed, then the three other directions.
VARIANTS = {"motion": len(captions.DIRECTIONS), "style": len(captions.STYLES) - 1, "object": 2, "background": 1}


def text_example(seed: int, kind: str = "motion", variant: int | None = None, world: W.World = WORLD) -> TextExample:
    """Render one example. The source depends on the seed and the world alone, not on the edit.

    kind: "motion" (another speed or one of the three other directions), "style" (at night or striped), "object"
    (another colour or another shape), "background" (another hue). variant: which of them, below VARIANTS[kind]; by
    default the seeds take them in turn. Raises ValueError for another kind.
    """
    if kind not in KINDS:
        raise ValueError(f'the kind of edit is "{kind}"; it must be one of {", ".join(KINDS)}')
    generator = torch.Generator().manual_seed(seed)
    words = captions.draw_words(1, generator, styled=0.0)
    state = generator.get_state()
    before = captions.scenes(words, generator, world)
    edited, changed = _edit(words, kind, seed if variant is None else variant, generator)
    # The same draws under other words: what no word tells stays as it is.
    after = captions.scenes(edited, generator.set_state(state), world)
    if kind == "motion":
        after = replace(after, position=_moved(before, after))
    keep = tuple(name for name in PROPERTIES if name not in changed)
    (source, _), (target, _) = W.render(before), W.render(after)
    return TextExample(kind, source[0], target[0], words, edited, Task(changed, keep), before, after)


def _edit(words: Words, kind: str, variant: int, generator: torch.Generator) -> tuple[Words, tuple[str, ...]]:
    """The words of the edited clip, and the properties that change."""

    def another(index: Tensor, options: tuple[str, ...]) -> Tensor:
        return (index + 1 + torch.randint(len(options) - 1, (1,), generator=generator)) % len(options)

    if kind == "motion":
        turn = variant % VARIANTS[kind]
        if turn == 0:
            return replace(words, speed=1 - words.speed), ("motion",)
        return replace(words, direction=(words.direction + turn) % len(captions.DIRECTIONS)), ("motion",)
    if kind == "style":
        style = torch.tensor([1 + variant % VARIANTS[kind]])
        return replace(words, style=style), ("style",)
    if kind == "background":
        return replace(words, hue=another(words.hue, captions.HUES)), ("background",)
    if variant % VARIANTS[kind]:
        return replace(words, shape=another(words.shape, W.SHAPES)), ("shape",)
    return replace(words, colour=another(words.colour, W.COLOURS)), ("colour",)


def _moved(before: W.Scene, after: W.Scene) -> Tensor:
    """The path of the new motion, [1, T, 2], begun as near to the source's beginning as the world's margin allows."""
    unit = before.world.size / 96
    path = after.position - after.position[:, :1]
    low = before.world.margin * unit - path.amin(1)
    high = (96 - before.world.margin) * unit - path.amax(1)
    return path + before.position[:, 0].clamp(low, high)[:, None]


# --- scores -----------------------------------------------------------------------------------------------------------


def score(chosen: TextExample, frames: Tensor) -> Score:
    """Compare a result [T, 3, H, W] in 0..1 with what was asked; a right answer need not be the target's pixels."""
    return judge(chosen, recognise(frames))


def judge(chosen: TextExample, seen: Seen) -> Score:
    """The same of a clip that was read already. Without an object in every frame all but the background is wrong."""
    words, scene = chosen.target_words, chosen.target_scene
    wanted = {field.name: int(getattr(words, field.name)) for field in fields(words)}
    night, striped = (captions.STYLES.index(style) == wanted["style"] for style in (", at night", ", striped"))
    colour = float((seen.rgb - scene.colour[0]).norm())
    background = float((seen.background - scene.background[0].mean(0)).norm())
    # How bright a new background is the prompt does not tell, and darkness is a matter of style.
    open_brightness = "background" in chosen.task.change or seen.night != night
    heading = math.nan
    if not math.isnan(seen.heading):
        away = seen.heading - wanted["direction"] * math.pi / 2
        heading = abs(math.degrees(math.remainder(away, 2 * math.pi)))
    right = {
        "colour": seen.colour == wanted["colour"] and colour < COLOUR_ERROR,
        "shape": seen.shape == wanted["shape"],
        "background": seen.hue == wanted["hue"] and (background < BACKGROUND_ERROR or open_brightness),
        "style": seen.night == night and seen.striped == striped,
        "motion": heading < HEADING_ERROR and seen.quick == wanted["speed"],
    }
    right = {name: met and (seen.present or name == "background") for name, met in right.items()}
    return Score(
        colour_error=colour,
        background_error=background,
        heading_error=heading,
        speed=seen.speed,
        right=right,
        appearance=all(right[name] for name in chosen.task.keep),
        accuracy=all(right[name] for name in chosen.task.change),
    )
