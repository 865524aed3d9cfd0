"""A synthetic world with known answers: short clips of one moving shape, in which an edit is a change of parameters.

A `Scene` holds the parameters of a batch of clips. `sample` draws scenes, `edit` changes one property, `render` turns a
scene into pixels and masks, `optical_flow` gives the exact motion of every pixel. Because the edited clip is rendered
from the edited parameters, the TRUE answer to an edit, its masks and its flow are known exactly.

Two kinds of motion:
    predictable     straight on along the heading (a white nose shows it) at a speed that the motion bucket tells
    unpredictable   turns and changes of speed that nobody can guess from frame 0; the motion bucket says "unspecified"

An object is lighter than its background, whatever its colour. That is a choice, and it matters: what inverted noise
keeps of an object's motion is its contrast with the background, so a recolouring that turns the contrast round
contradicts the noise, and the motion is lost (numbers in demo/README.md; such a world is
`World(background=(0.25, 0.75), tint=0.0)`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle")
PALETTE = torch.tensor(
    [
        [0.90, 0.10, 0.10],
        [0.10, 0.75, 0.15],
        [0.15, 0.25, 0.95],
        [0.95, 0.85, 0.10],
        [0.85, 0.15, 0.85],
        [0.10, 0.80, 0.85],
    ]
)
COLOURS = ("red", "green", "blue", "yellow", "magenta", "cyan")
EDITS = ("recolour", "reshape", "resize", "add", "remove", "background")
NOSE_COLOUR, BAND_COLOUR = 0.97, 0.08
UNSPECIFIED_MOTION = 127  # the host's default motion bucket: nothing is known about the motion
BUCKET_PER_SPEED = 20.0  # motion bucket of a predictable clip = 20 x its speed in pixels a frame (at 96 pixels)
SMALLEST = 12.0  # radius at which the narrowest shape, the square, is still 20 pixels wide (at 96 pixels)
EDGE = 1.2  # width of the antialiased edge, in pixels


@dataclass(frozen=True)
class World:
    """The complexity of the world. Lengths are in pixels of a 96-pixel frame and scale with `size`."""

    size: int = 96
    frames: int = 8
    shapes: int = 3  # how many of SHAPES
    colours: int = 6  # how many of PALETTE
    radius: tuple[float, float] = (11.0, 19.0)  # of the shapes that a model trains on
    speed: tuple[float, float] = (2.0, 6.0)  # pixels a frame
    turn: float = 0.55  # largest turn, radians a frame, of unpredictable motion
    margin: float = 16.0  # centres keep this distance from the border
    predictable: float = 0.35  # share of predictable clips where `sample` is not told
    empty: float = 0.06  # share of clips without an object
    band: float = 0.3  # share of objects that wear a dark band
    background: tuple[float, float] = (0.06, 0.30)  # brightness of the gradient's two ends, 0..1
    saturation: tuple[float, float] = (0.10, 0.35)  # of the gradient's two ends, 0..1
    tint: float = 0.35  # white in the palette's colours, 0..1: it makes every one of them lighter than the background
    noise_floor: float = 0.0  # standard deviation of static background texture; 0 keeps the plain gradient


@dataclass(frozen=True)
class Scene:
    """The parameters of n clips of T frames."""

    world: World
    shape: Tensor  # [n] index into SHAPES
    radius: Tensor  # [n] pixels
    colour: Tensor  # [n, 3] in 0..1
    present: Tensor  # [n] bool: is there an object
    band: Tensor  # [n] bool: does it wear a dark band
    background: Tensor  # [n, 2, 3] the two ends of the gradient, 0..1
    angle: Tensor  # [n] direction of the gradient, radians
    texture: Tensor  # [n] seed of the static texture
    position: Tensor  # [n, T, 2] centre (x, y), pixels
    heading: Tensor  # [n, T] radians
    predictable: Tensor  # [n] bool
    motion_bucket: Tensor  # [n]

    def __len__(self) -> int:
        return len(self.shape)

    def __getitem__(self, index) -> Scene:
        """The scene of some of the clips; `index` is anything that indexes a tensor and keeps its first axis."""
        picked = {f.name: getattr(self, f.name)[index] for f in fields(self) if f.name != "world"}
        return Scene(self.world, **picked)


def hsv(h: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """Colours [..., 3] in 0..1 of hue, saturation and value, each in 0..1."""
    k = (torch.tensor([5.0, 3.0, 1.0]) + h[..., None] * 6) % 6
    return v[..., None] * (1 - s[..., None] * torch.minimum(k, 4 - k).clamp(0, 1))


def palette(world: World) -> Tensor:
    """The world's colours, [colours, 3] in 0..1."""
    return PALETTE[: world.colours] * (1 - world.tint) + world.tint


def _background(n: int, world: World, rand) -> Tensor:
    hue = rand(n, 1).expand(n, 2)
    return background(hue, world, rand(n, 2), rand(n, 2))


def background(hue: Tensor, world: World, saturation: Tensor, brightness: Tensor) -> Tensor:
    """The two ends of gradients, [n, 2, 3]. hue, saturation, brightness: [n, 2] in 0..1, the last two of the world's
    ranges."""
    (pale, strong), (dark, light) = world.saturation, world.background
    return hsv(hue, pale + (strong - pale) * saturation, dark + (light - dark) * brightness)


def placed(path: Tensor, world: World, where: Tensor) -> Tensor:
    """Paths [n, T, 2], in pixels of a 96-pixel frame, moved inside the world's margin.

    where: [n, 2] in 0..1, the place in the room that the path leaves.
    """
    least, most = path.amin(1), path.amax(1)
    start = world.margin - least + where * (96 - 2 * world.margin - (most - least)).clamp(min=0)
    return path + start[:, None]


def sample(
    n: int, generator: torch.Generator, world: World = World(), motion: str = "mixed", editable: bool = False
) -> Scene:
    """Draw n scenes.

    motion: "predictable", "unpredictable" or "mixed". editable: always an object, without a band, of medium size, so
    that every kind of edit applies and its result is still inside the training distribution. Raises ValueError for
    another motion.
    """
    if motion not in ("predictable", "unpredictable", "mixed"):
        raise ValueError(f'motion is "{motion}"; it must be "predictable", "unpredictable" or "mixed"')

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    unit, steps = world.size / 96, world.frames
    share = {"predictable": 1.0, "unpredictable": 0.0, "mixed": world.predictable}[motion]
    predictable = rand(n) < share
    shape, colour = (rand(n) * world.shapes).long(), palette(world)[(rand(n) * world.colours).long()]
    low, high = world.radius
    radius = low + (high - low) * (0.25 + 0.4 * rand(n) if editable else rand(n))
    present = (rand(n) >= world.empty) | editable
    band = (rand(n) < world.band) & (not editable)
    ends, angle, texture = _background(n, world, rand), rand(n) * 2 * math.pi, (rand(n) * 2**31).long()

    # Motion: a piecewise constant speed and turn rate, changed once at a random frame; predictable clips keep the
    # first.
    slow, fast = world.speed
    speed_a, speed_b = (slow + (fast - slow) * rand(n) for _ in range(2))
    turn_a, turn_b = (world.turn * (2 * rand(n) - 1) for _ in range(2))
    change = 1 + (rand(n) * (steps - 1)).long()
    late = torch.arange(steps)[None] >= change[:, None]
    free = ~predictable[:, None]
    speed = torch.where(late & free, speed_b[:, None], speed_a[:, None])  # [n, T]
    turn = torch.where(late, turn_b[:, None], turn_a[:, None]) * free
    heading = rand(n)[:, None] * 2 * math.pi + turn.cumsum(1) - turn[:, :1]
    step = torch.stack([heading.cos(), heading.sin()], -1) * speed[..., None]
    path = step.cumsum(1) - step  # the first frame at the origin
    path = placed(path, world, rand(n, 2))
    return Scene(
        world=world,
        shape=shape,
        radius=radius * unit,
        colour=colour,
        present=present,
        band=band,
        background=ends,
        angle=angle,
        texture=texture,
        position=path * unit,
        heading=heading,
        predictable=predictable,
        motion_bucket=torch.where(predictable, BUCKET_PER_SPEED * speed_a, torch.tensor(float(UNSPECIFIED_MOTION))),
    )


def edit(scene: Scene, kind: str, generator: torch.Generator) -> Scene:
    """The same clips with one property changed, everything else (the motion above all) kept.

    kind: "recolour" (any other colour of the palette), "reshape", "resize" (a quarter larger or, where it
    stays at least 20 pixels wide, a fifth smaller), "add" (a dark band on the object, which rides with it: the motion
    of a free newcomer could not be known from the source), "remove" (the object), "background". Raises ValueError for
    another kind.
    """
    n, world = len(scene), scene.world

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    if kind == "recolour":
        colours = palette(world)
        now = (colours[None] - scene.colour[:, None]).norm(dim=-1).argmin(1)
        shift = 1 + (rand(n) * (world.colours - 1)).long()
        return replace(scene, colour=colours[(now + shift) % world.colours])
    if kind == "reshape":
        shift = 1 + (rand(n) * (world.shapes - 1)).long()
        return replace(scene, shape=(scene.shape + shift) % world.shapes)
    if kind == "resize":
        least = SMALLEST * world.size / 96
        grow = (rand(n) < 0.5) | (0.8 * scene.radius < least)
        return replace(scene, radius=scene.radius * torch.where(grow, 1.25, 0.8))
    if kind == "add":
        return replace(scene, band=torch.ones_like(scene.band))
    if kind == "remove":
        return replace(scene, present=torch.zeros_like(scene.present))
    if kind == "background":
        return replace(scene, background=_background(n, world, rand), angle=rand(n) * 2 * math.pi)
    raise ValueError(f'edit is "{kind}"; it must be one of {", ".join(EDITS)}')


def distance(shape: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance (negative inside) of a unit shape that heads for +x; shape, x and y broadcast."""
    circle = torch.sqrt(x * x + y * y + 1e-8) - 1
    square = torch.maximum(x.abs(), y.abs()) - 0.85
    triangle = torch.maximum(torch.maximum(-x, 0.5 * x + 0.866 * y), 0.5 * x - 0.866 * y) - 0.62
    return torch.where(shape == 0, circle, torch.where(shape == 1, square, triangle))


def coverage(distance: Tensor) -> Tensor:
    """How far each pixel is covered, 0..1, by its signed distance in pixels: the antialiased edge."""
    return (0.5 - distance / EDGE).clamp(0, 1)


def _grid(size: int) -> tuple[Tensor, Tensor]:
    axis = torch.arange(size) + 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return x, y


def _backdrop(scene: Scene) -> Tensor:
    """The background, [n, 3, H, W]."""
    size = scene.world.size
    x, y = _grid(size)
    cos, sin = scene.angle.cos()[:, None, None], scene.angle.sin()[:, None, None]
    u = ((x - size / 2) * cos + (y - size / 2) * sin) / (1.42 * size) + 0.5  # 0..1 across the diagonal
    first, last = scene.background[:, 0, :, None, None], scene.background[:, 1, :, None, None]
    plain = first + (last - first) * u[:, None]
    if scene.world.noise_floor == 0:
        return plain
    texture = torch.stack(
        [torch.randn(1, size, size, generator=torch.Generator().manual_seed(int(seed))) for seed in scene.texture]
    )
    return (plain + scene.world.noise_floor * texture).clamp(0, 1)


def render(scene: Scene) -> tuple[Tensor, Tensor]:
    """Draw the clips: frames [n, T, 3, H, W] in 0..1 and the object's mask [n, T, H, W] in 0..1."""
    x, y = _grid(scene.world.size)
    dx, dy = x - scene.position[..., 0, None, None], y - scene.position[..., 1, None, None]  # [n, T, H, W]
    cos, sin = scene.heading.cos()[..., None, None], scene.heading.sin()[..., None, None]
    radius = scene.radius[:, None, None, None]
    u, v = (cos * dx + sin * dy) / radius, (cos * dy - sin * dx) / radius  # the object's own coordinates
    body = distance(scene.shape[:, None, None, None], u, v) * radius
    band = torch.maximum(body, ((u + 0.3).abs() - 0.22) * radius)
    nose = (torch.sqrt((u - 0.5) ** 2 + v**2 + 1e-8) - 0.26) * radius
    present = scene.present[:, None, None, None]
    mask = torch.maximum(coverage(body), coverage(nose)) * present

    frames = _backdrop(scene)[:, None].expand(-1, scene.world.frames, -1, -1, -1)
    for cover, colour in (
        (coverage(body), scene.colour[:, None, :, None, None]),
        (coverage(band) * scene.band[:, None, None, None], BAND_COLOUR),
        (coverage(nose), NOSE_COLOUR),
    ):
        cover = (cover * present)[:, :, None]
        frames = frames * (1 - cover) + cover * colour
    return frames, mask


def optical_flow(scene: Scene) -> Tensor:
    """The exact flow [n, T - 1, 2, H, W] (dx, dy in pixels) of each frame to the next; 0 on the background."""
    x, y = _grid(scene.world.size)
    now, then = scene.position[:, :-1, :, None, None], scene.position[:, 1:, :, None, None]  # [n, T-1, 2, 1, 1]
    turn = scene.heading.diff(dim=1)[..., None, None]
    dx, dy = x - now[:, :, 0], y - now[:, :, 1]
    moved = torch.stack([turn.cos() * dx - turn.sin() * dy, turn.sin() * dx + turn.cos() * dy], 2) + then
    flow = moved - torch.stack([x, y])
    return flow * (render(scene)[1][:, :-1, None] > 0.5)


def edited_region(source_mask: Tensor, edited_mask: Tensor, kind: str, dilation: int = 3) -> Tensor:
    """Where an edit may show, [n, T, H, W] of 0 and 1: the dilated union of the source's and the edit's masks.

    The masks are the object's, as `render` gives them; for "background" the masks of what is NOT the object are united.
    """
    masks = (1 - source_mask, 1 - edited_mask) if kind == "background" else (source_mask, edited_mask)
    union = (torch.maximum(*masks) > 0.5).float()
    return torch.nn.functional.max_pool2d(union, 2 * dilation + 1, stride=1, padding=dilation)
