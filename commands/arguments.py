"""The command lines of what is done to a user's files; what their options mean to the methods is in `pipelines/`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..demo.models import ImageToVideoConfig
from ..pipelines.chunks import CHUNK
from ..pipelines.dreamix.coarse_video import EASINGS, FILLS, MOVES
from ..pipelines.dreamix.corruption import TEMPORAL
from ..pipelines.dreamix.temporal import MASKS
from ..pipelines.ei2.ffam import ATTENTIONS
from ..pipelines.ei2.inflation import NO_TEMPORAL, PLACES, InflationSettings
from ..pipelines.ei2.pipeline import EI2_GUESSES, EI2Settings
from ..pipelines.ei2.stam import AXES, TEMPORALS
from ..pipelines.ei2.tuning import OneShot
from ..pipelines.videoshop.masks import DEFAULT_MASK
from ..pipelines.videoshop.trajectory import DTYPES
from ..pipelines.videoshop.windows import OVERLAP
from .dreamix import KINDS, run_dreamix
from .edit import PRESETS, run_edit
from .ei2 import EMBEDDED_SETTINGS, EMBEDDED_TUNING, FRAMES, run_ei2
from .masks import AUTO, NONE


def size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    return int(width), int(height)


def add_edit(commands: Any) -> None:
    edit = commands.add_parser("edit", help="carry the edit of a clip's first frame through the clip")
    edit.add_argument("clip", type=Path, metavar="CLIP.mp4")
    edit.add_argument("edited", type=Path, metavar="EDITED.png", help="the clip's first frame after your edit")
    edit.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.mp4")
    edit.add_argument(
        "--model",
        help="Stable Video Diffusion in diffusers' layout: a folder or a hub's id (default: the embedded model)",
    )
    edit.add_argument("--preset", choices=PRESETS, help="settings to start from (default: default)")
    edit.add_argument("--steps", type=int, help="of the schedule; more return the clip more exactly")
    edit.add_argument("--strength", type=float, help="0..1: higher leaves the edit more room, lower keeps the source")
    edit.add_argument("--refine", type=int, help="repetitions of each inversion step: a more exact round trip")
    edit.add_argument(
        "--guidance",
        type=float,
        nargs=2,
        metavar=("FIRST", "LAST"),
        help="of the first and the last frame; 1 1 is none",
    )
    edit.add_argument("--frames", type=int, help="use so many, from the start (default: the model's own number)")
    edit.add_argument(
        "--size", type=size, metavar="WxH", help="of the result (default: the model's area, the clip's shape)"
    )
    edit.add_argument(
        "--fps", type=int, help="resample the clip to it and tell the model (default: every frame as it is)"
    )
    edit.add_argument("--motion-bucket", type=int, help="how much motion the model is told of")
    edit.add_argument(
        "--decode-at-once",
        type=int,
        default=CHUNK,
        metavar="N",
        help="frames that the VAE takes at once: fewer take less memory, in chunks that go over into each other "
        "(default: %(default)s)",
    )
    edit.add_argument("--seed", type=int, help="(default: 0)")
    edit.add_argument("--force", action="store_true", help="overwrite what is written")
    add_edit_long(
        edit.add_argument_group("a clip longer than the model", "all of it is edited by these (default: its start)")
    )
    add_edit_mask(edit.add_argument_group("the mask", "what lies outside it comes back as it was"))
    add_edit_inversion(edit.add_argument_group("one inversion for many edits of a clip"))
    edit.set_defaults(run=run_edit)


def add_edit_long(group: Any) -> None:
    way = group.add_mutually_exclusive_group()
    way.add_argument(
        "--context-length",
        type=int,
        metavar="N",
        help="in overlapping windows of so many frames, averaged at every step: holds the edit better than parts, in "
        "more time",
    )
    way.add_argument(
        "--frames-at-once",
        type=int,
        metavar="N",
        help="in parts of at most so many frames, each of which goes on from the last edited frame of the one before",
    )
    group.add_argument(
        "--context-overlap",
        type=int,
        metavar="N",
        help=f"frames that two windows share, at most half of one (default: {OVERLAP})",
    )


def add_edit_mask(group: Any) -> None:
    own = DEFAULT_MASK
    group.add_argument(
        "--mask",
        default=NONE,
        metavar=f"{NONE} | {AUTO} | FILE",
        help=f"where the edit may show: {AUTO} is where the edited frame differs, of a FILE the white; a video masks "
        f"each frame, a picture and {AUTO} follow the motion (default: %(default)s, the whole frame)",
    )
    group.add_argument(
        "--mask-threshold", type=float, metavar="D", help=f"0..1, a difference that counts (default: {own.threshold})"
    )
    group.add_argument("--mask-grow", type=int, metavar="PIXELS", help=f"widen it by (default: {own.grow})")
    group.add_argument(
        "--mask-feather", type=int, metavar="PIXELS", help=f"soften its edge over (default: {own.feather})"
    )
    group.add_argument(
        "--flow-weights",
        type=Path,
        metavar="FILE",
        help="torchvision's weights of RAFT, to follow the motion with (default: optical flow without weights)",
    )
    group.add_argument(
        "--keep-pixels", action="store_true", help="outside keep the clip's own pixels, which the VAE never saw"
    )


def add_edit_inversion(group: Any) -> None:
    file = group.add_mutually_exclusive_group()
    file.add_argument("--save-inversion", type=Path, metavar="FILE.safetensors", help="keep the clip's inversion")
    file.add_argument("--inversion", type=Path, metavar="FILE.safetensors", help="use a kept one instead")
    group.add_argument(
        "--trajectory",
        choices=DTYPES,
        help="precision of the clip's states at all noise levels, kept by --save-inversion and for --mask, in main "
        "memory (default: float32)",
    )


def move_name(text: str) -> str:
    """The move as it is listed; on the command line a hyphen may stand for its space."""
    return text.replace("-", " ")


def add_dreamix(commands: Any) -> None:
    dreamix = commands.add_parser("dreamix", help="edit a clip, animate a picture or film a subject, by a prompt")
    dreamix.add_argument("clip", type=Path, nargs="+", metavar="CLIP.mp4", help="or pictures, see the tasks")
    dreamix.add_argument("-p", "--prompt", required=True, help="what the result shows")
    dreamix.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.mp4")
    dreamix.add_argument(
        "--model",
        help="Wan or ModelScope (text to video) in diffusers' layout: folder or hub's id (default: the embedded model)",
    )
    dreamix.add_argument("--frames", type=int, help="of the result (default: the model's own number)")
    dreamix.add_argument("--size", type=size, metavar="WxH", help="of the result (default: the model's, as the input)")
    dreamix.add_argument("--fps", type=int, help="resample the clip to it; of pictures, the result's")
    dreamix.add_argument("--seed", type=int, default=0)
    dreamix.add_argument("--force", action="store_true", help="overwrite what is written")
    add_dreamix_task(dreamix)
    add_dreamix_sampling(dreamix.add_argument_group("the edit", "defaults: as the task and --kind have them"))
    add_dreamix_tuning(dreamix.add_argument_group("the fine-tuning", "defaults: as the task and --kind have them"))
    dreamix.set_defaults(run=run_dreamix)


def add_dreamix_task(dreamix: argparse.ArgumentParser) -> None:
    group = dreamix.add_argument_group("the task", "one of these, each with its own defaults")
    task = group.add_mutually_exclusive_group()
    task.add_argument("--kind", choices=KINDS, help=f"what the prompt changes in the clip (default: {KINDS[0]})")
    moves = ", ".join(name.replace(" ", "-") for name in MOVES)
    task.add_argument(
        "--animate", type=move_name, choices=MOVES, metavar="MOVE", help=f"one picture, first moved by: {moves}"
    )
    task.add_argument("--subject", action="store_true", help="a new clip of what the pictures show")
    group.add_argument("--amount", type=float, help="of --animate's move: 0 is none, 2 twice as far (default: 1)")
    group.add_argument("--fill", choices=FILLS, help="what lies beyond the moved picture's edge (default: white)")
    group.add_argument("--easing", choices=EASINGS, help="whether it starts and stops gently (default: smooth)")


def add_dreamix_sampling(group: Any) -> None:
    group.add_argument("--noise", type=float, metavar="S", help="0..1: higher follows the prompt, lower keeps the clip")
    group.add_argument("--factor", type=float, help="how far the clip is downsampled a side, 1 is not at all")
    group.add_argument(
        "--coarse-size", type=size, metavar="WxH", help="the size it is downsampled to, in the place of --factor"
    )
    group.add_argument("--stride", type=int, help="keep the motion of every so many frames, 1 is all of them")
    group.add_argument("--temporal", choices=TEMPORAL, help="what --stride fills in: the frame kept last, or a fade")
    group.add_argument("--steps", type=int, help="of the schedule from pure noise on")
    group.add_argument("--guidance", type=float, help="by the prompt, 1 is none")
    group.add_argument("--negative", metavar="PROMPT", help="what guidance leads away from")
    group.add_argument("--second-pass", type=float, metavar="S", help="the noise of an edit of the result, 0 for none")
    group.add_argument(
        "--scale", type=float, help="how much larger the second pass makes the frames, 1 is not at all (default: 1.5)"
    )


def add_dreamix_tuning(group: Any) -> None:
    group.add_argument("--fine-tune-steps", type=int, help="0 for none")
    group.add_argument("--alpha", type=float, help="0 learns from the frames alone, 1 from the clip alone")
    group.add_argument("--learning-rate", type=float)
    group.add_argument("--rank", type=int, help="of the LoRA")
    group.add_argument("--mask", choices=MASKS, help="how the frames' part leaves out the motion")
    group.add_argument("--token", help="the rare word that stands for what is learnt (default: sks, or the LoRA's own)")
    group.add_argument("--save-lora", type=Path, metavar="FILE.safetensors", help="keep the fine-tuning")
    group.add_argument("--lora", type=Path, metavar="FILE.safetensors", help="use a kept one instead")
    group.add_argument("--checkpoints", type=Path, metavar="FOLDER", help="of a run that may be interrupted")


def typed(name: str) -> str:
    """A name as it is typed: "STAM with LayerNorm" is stam-with-layernorm."""
    return "-".join(re.findall(r"[a-z0-9]+", name.lower()))


def one_of(options: Sequence[str]) -> Callable[[str], str]:
    """Takes a name as it is listed or as it is typed; an unknown one is left for `choices` to refuse."""
    names = {typed(option): option for option in options}
    return lambda text: names.get(typed(text), text)


def add_ei2(commands: Any) -> None:
    ei2 = commands.add_parser("ei2", help="edit a clip by a prompt, with a text-to-image model tuned on it")
    ei2.add_argument("clip", type=Path, metavar="CLIP.mp4")
    ei2.add_argument("--caption", help="what the clip shows; the fine-tuning learns the clip under it")
    ei2.add_argument("-p", "--prompt", required=True, help="what the result shows: the caption with your edit")
    ei2.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.mp4")
    ei2.add_argument(
        "--model",
        help="Stable Diffusion 1.x or 2.x in diffusers' layout: folder or hub's id (default: the embedded model)",
    )
    ei2.add_argument(
        "--frames",
        type=int,
        help=f"use so many, from the start (default: {FRAMES}, embedded {ImageToVideoConfig().frames})",
    )
    ei2.add_argument("--size", type=size, metavar="WxH", help="of the result (default: the model's, as the input)")
    ei2.add_argument("--fps", type=int, help="resample the clip to it (default: every frame as it is)")
    ei2.add_argument("--seed", type=int, default=0, help="of the fine-tuning; the edit itself draws nothing")
    ei2.add_argument("--force", action="store_true", help="overwrite what is written")
    add_ei2_sampling(ei2.add_argument_group("the edit"))
    add_ei2_inflation(ei2.add_argument_group("what is put into the model"))
    add_ei2_tuning(ei2.add_argument_group("the one-shot fine-tuning"))
    ei2.set_defaults(run=run_ei2)


def add_ei2_sampling(group: Any) -> None:
    own, embedded = EI2Settings(), EMBEDDED_SETTINGS
    group.add_argument(
        "--sampling-steps",
        type=int,
        help=f"of the schedule, down to noise and back (default: {own.steps}, embedded {embedded.steps})",
    )
    group.add_argument(
        "--guidance",
        type=float,
        help=f"by the prompt, 1 is none (default: {own.guidance:g}, embedded {embedded.guidance:g})",
    )
    group.add_argument("--negative", metavar="PROMPT", help="what guidance leads away from")
    group.add_argument("--strength", type=float, help="0..1: higher leaves the edit more room, lower keeps the clip")
    group.add_argument(
        "--guess",
        type=one_of(EI2_GUESSES),
        choices=EI2_GUESSES,
        help="of each step of the inversion (default: current)",
    )
    group.add_argument("--refine", type=int, help="repetitions of each inversion step: a more exact round trip")


def add_ei2_inflation(group: Any) -> None:
    own, temporals = InflationSettings(), (*TEMPORALS, NO_TEMPORAL)
    for option, options, what in (
        ("attention", ATTENTIONS, "in place of the self-attention"),
        ("temporal", temporals, "added to each block and trained"),
        ("axes", AXES, "what STAM centres over"),
    ):
        listed = ", ".join(map(typed, options))
        told = f"{what}: {listed} (default: {typed(getattr(own, option))})"
        group.add_argument(f"--{option}", type=one_of(options), choices=options, metavar="NAME", help=told)
    group.add_argument(
        "--factor",
        type=int,
        help=f"how much coarser FFAM sees other frames, a side, 1 is as fine (default: {own.factor})",
    )
    group.add_argument("--blocks", choices=PLACES, help="where it is put for the edit (default: all)")
    group.add_argument("--patch-strength", type=float, metavar="S", help="0..1: of all of it in the edit, 0 is none")


def add_ei2_tuning(group: Any) -> None:
    own, embedded = OneShot(), EMBEDDED_TUNING
    group.add_argument(
        "--fine-tune-steps", type=int, help=f"0 for none (default: {own.steps}, embedded {embedded.steps})"
    )
    group.add_argument(
        "--learning-rate",
        type=float,
        help=f"(default: {own.learning_rate:g}, embedded {embedded.learning_rate:g})",
    )
    group.add_argument("--save-weights", type=Path, metavar="FILE.safetensors", help="keep the fine-tuning")
    group.add_argument("--weights", type=Path, metavar="FILE.safetensors", help="use a kept one instead")
    group.add_argument("--checkpoints", type=Path, metavar="FOLDER", help="of a run that may be interrupted")
