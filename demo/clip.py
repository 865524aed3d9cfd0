"""Examples with known answers, for measuring, and the one that is shipped.

An example is a clip of the synthetic world, one edit of it, and all that is true about both. `demo/clip.mp4` and
`demo/edited.png`, made by `python -m rewind.demo.clip`, are the source and the edited first frame of one example, as a
user's own files would be.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..pipelines.video import write_image, write_video
from . import world as W

# The first seeds of the sets: defaults are chosen on validation seeds, figures are told on test seeds.
SEEDS = {"validation": 1_000, "test": 2_000_000}
FPS = 7  # of the demo world: what its model was trained to be told

CLIP = Path(__file__).with_name("clip.mp4")
EDITED = Path(__file__).with_name("edited.png")
# The inversion of the node's own clip in ComfyUI, for the workflow videoshop_load_inversion.
INVERSION = Path(__file__).parent / "inversions" / "rewind_demo_inversion.safetensors"
ROOM = 62.0  # pixels that the longest path may span, of a 96-pixel frame with its margins
SHIPPED_SEED, SHIPPED_EDIT = 2_900_007, "recolour"  # a clear turn; apart from the test seeds of the figures


@dataclass(frozen=True)
class Example:
    """A clip, an edit of it, and the truth about both. T frames of H x W pixels."""

    kind: str  # of edit, one of world.EDITS
    source: Tensor  # [T, 3, H, W] in 0..1
    target: Tensor  # [T, 3, H, W], the TRUE edit; its first frame is the edited frame
    source_mask: Tensor  # [T, H, W] in 0..1, the object
    target_mask: Tensor  # [T, H, W]
    region: Tensor  # [T, H, W] of 0 and 1, where the edit may show
    flow: Tensor  # [T - 1, 2, H, W] of the TRUE edit, pixels
    motion_bucket: float  # what the motion bucket says of this clip

    @property
    def edited_frame(self) -> Tensor:
        """The first frame of the true edit, [3, H, W]: what a user would make in an editor."""
        return self.target[0]


def world_of(frames: int) -> W.World:
    """The world of clips of so many frames: in long ones objects are slow enough for their path to stay in the picture.

    Raises ValueError for fewer than 2 frames.
    """
    if frames < 2:
        raise ValueError(f"got {frames} frames; a clip has at least 2")
    slow, fast = W.World().speed
    fast = min(fast, ROOM / (frames - 1))
    return W.World(frames=frames, speed=(min(slow, fast / 2), fast))


def example(seed: int, kind: str = "recolour", motion: str = "unpredictable", world: W.World = W.World()) -> Example:
    """Render one example. The source depends on the seed, the motion and the world alone, not on the kind of edit.

    kind: one of world.EDITS. motion: "predictable" or "unpredictable". Raises ValueError for another.
    """
    if kind not in W.EDITS:
        raise ValueError(f'the kind of edit is "{kind}"; it must be one of {", ".join(W.EDITS)}')
    generator = torch.Generator().manual_seed(seed)
    before = W.sample(1, generator, world, motion, editable=True)
    after = W.edit(before, kind, generator)
    (source, source_mask), (target, target_mask) = W.render(before), W.render(after)
    return Example(
        kind=kind,
        source=source[0],
        target=target[0],
        source_mask=source_mask[0],
        target_mask=target_mask[0],
        region=W.edited_region(source_mask, target_mask, kind)[0],
        flow=W.optical_flow(after)[0],
        motion_bucket=float(before.motion_bucket[0]),
    )


def shipped() -> Example:
    """The example that `demo/clip.mp4` and `demo/edited.png` are taken from."""
    return example(SHIPPED_SEED, SHIPPED_EDIT)


def write(clip: Path = CLIP, edited: Path = EDITED) -> None:
    """Write the shipped files: H.264 with full chroma, so that the colour of a small object survives, and a PNG."""
    chosen = shipped()
    write_video(clip, chosen.source, FPS, chroma="444", crf=4)
    write_image(edited, chosen.edited_frame)


if __name__ == "__main__":
    write()
