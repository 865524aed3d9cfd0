"""`rewind ei2`: a clip edited by a prompt, with a text-to-image model that is tuned on the clip and its caption."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from fractions import Fraction
from statistics import fmean

import torch
from torch import Tensor, nn

from ..demo.models import ImageToVideoConfig
from ..demo.text_to_image import EI2_SETTINGS as EMBEDDED_SETTINGS
from ..demo.text_to_image import EI2_TUNING as EMBEDDED_TUNING
from ..pipelines.denoiser import truncate_sigmas
from ..pipelines.ei2.family import model_kind
from ..pipelines.ei2.inflation import NO_TEMPORAL, InflationSettings, transformer_blocks
from ..pipelines.ei2.pipeline import EI2Pipeline, EI2Settings
from ..pipelines.ei2.stam import TEMPORALS
from ..pipelines.ei2.tuning import OneShot
from ..pipelines.ei2.weights import EI2Weights, load_weights, save_weights
from .files import (
    check_folder,
    check_output,
    check_request,
    configuration_of,
    frame_count,
    free_name,
    given,
    named,
    read_clip,
    say,
    write_result,
)
from .tuning import Progress, hardware, told_sampling, told_tuning, whole_steps

# A text-to-image model has no number of frames of its own. Tune-A-Video takes 8 to 32; FFAM's cost grows with them.
FRAMES = 16
# What the command line may change of the edit, of the fine-tuning, and of what is put into the model.
EDITING = {"sampling_steps": "steps", "guidance": "guidance", "negative": "negative", "strength": "strength"}
EDITING |= {"guess": "guess", "refine": "refine", "blocks": "place", "patch_strength": "patch_strength"}
TUNING = {"fine_tune_steps": "steps", "learning_rate": "learning_rate"}
INFLATION = ("temporal", "axes", "attention", "factor")
TUNED = ("learning_rate", "temporal", "axes", "save_weights", "checkpoints")  # nothing without a fine-tuning


@dataclass(frozen=True)
class ModelFacts:
    """What must be known of a model before it is loaded."""

    network: nn.Module  # the UNet without its weights
    frames: int  # of a result, where the user asks for none
    area: int  # pixels of the pictures it was trained on
    multiple: int  # both sides must be multiples of it


@dataclass(frozen=True)
class EI2Job:
    """An edit with all its input read and checked."""

    clip: Tensor  # [T, 3, H, W]
    fps: Fraction
    settings: EI2Settings
    inflation: InflationSettings  # what is tuned, or without any tuning what the attention becomes
    tuning: OneShot | None  # None: the model as it is, or with the weights of a file
    weights: EI2Weights | None  # those of a file


# --- before any weights are loaded ------------------------------------------------------------------------------------


def model_facts(model: str | None) -> ModelFacts:
    """Read them from the model's configuration files, of a folder or on the hub; no weights are read.

    Raises ValueError where there is no such model, or one that EI² does not run on.
    """
    from diffusers import UNet2DConditionModel

    from ..demo.text_to_image import build_image_unet

    if model is None:
        frames = ImageToVideoConfig().frames
        with torch.device("meta"):
            network = build_image_unet()
    else:
        frames = FRAMES
        with configuration_of(model):
            model_kind(model)
            config = UNet2DConditionModel.load_config(model, subfolder="unet")
        with torch.device("meta"):
            network = UNet2DConditionModel.from_config(config)
    transformer_blocks(network)  # raises for a UNet that cannot be inflated
    levels = len(network.config.block_out_channels)
    return ModelFacts(network, frames, (8 * (network.config.sample_size or 64)) ** 2, 8 * 2 ** (levels - 1))


def check_files(args: argparse.Namespace) -> None:
    """Raise for results that could not be written."""
    inputs = [path for path in (args.clip, args.weights) if path is not None]
    check_output(args.output, inputs, args.force)
    if args.save_weights is not None:
        check_output(args.save_weights, inputs, args.force, (".safetensors",))
    if args.checkpoints is not None:
        check_folder(args.checkpoints)


def check_flags(args: argparse.Namespace, tuning: OneShot, inflation: InflationSettings, strength: float) -> None:
    """Raise for what is missing, and for what would change nothing. strength: of the patch."""
    check_request(args)
    tunes = args.weights is None and tuning.steps > 0
    needless = [name for name in dict.fromkeys((*TUNING, *INFLATION, *TUNED)) if given(args, name)]
    if args.weights is not None and needless:
        raise ValueError(f"--weights takes the place of the fine-tuning: leave out {named(needless)}")
    needless = [name for name in TUNED if given(args, name)]
    if not tunes and needless:
        raise ValueError(f"without fine-tuning {named(needless)} would do nothing: give --fine-tune-steps above 0")
    if given(args, "factor") and inflation.attention != "FFAM":
        raise ValueError(f"--factor is of FFAM's coarse tokens; with {inflation.attention} it would do nothing")
    centred = inflation.temporal != NO_TEMPORAL and TEMPORALS[inflation.temporal].centred
    if given(args, "axes") and not centred:
        raise ValueError(f"--axes is of STAM's centring; with {inflation.temporal} it would do nothing")
    if tunes and not (args.caption or "").strip():
        raise ValueError(
            "the caption is missing: say with --caption what the clip shows, since the fine-tuning learns the clip "
            "under it; --weights FILE and --fine-tune-steps 0 need none"
        )
    if tunes and strength == 0 and args.save_weights is None:
        raise ValueError("--patch-strength 0 would make no use of the fine-tuning: give --fine-tune-steps 0 too")


def tell_settings(job: EI2Job, args: argparse.Namespace) -> None:
    """Say what was chosen, by default and by the user."""
    s, inflation = job.settings, job.inflation if job.weights is None else job.weights.settings
    learnt = "no fine-tuning" if job.weights is None else f"the fine-tuning of {args.weights}"
    if job.tuning is not None:
        learnt = f"{job.tuning.steps} steps of fine-tuning at {job.tuning.learning_rate:g}"
    say(
        f"{inflation} in {s.place} blocks, strength {s.patch_strength:g}; {learnt}; {s.steps} steps of the schedule, "
        f"rewound by {s.strength:g}, guidance {s.guidance:g}"
    )


def prepare_ei2(args: argparse.Namespace) -> EI2Job:
    """Check and read all input, and say what is trimmed, resampled, resized or left out. Loads no model."""
    check_files(args)
    embedded = args.model is None
    changes = {ours: getattr(args, name) for name, ours in EDITING.items() if given(args, name)}
    settings = replace(EMBEDDED_SETTINGS if embedded else EI2Settings(), **changes)
    changes = {ours: getattr(args, name) for name, ours in TUNING.items() if given(args, name)}
    # Recomputing costs a third to half more time, and only large models are short of memory.
    own = {"checkpointing": not embedded, "seed": args.seed}
    tuning = replace(EMBEDDED_TUNING if embedded else OneShot(), **own, **changes)
    changes = {name: getattr(args, name) for name in INFLATION if given(args, name)}
    inflation = InflationSettings(**(({"temporal": NO_TEMPORAL} if tuning.steps == 0 else {}) | changes))
    check_flags(args, tuning, inflation, settings.patch_strength)
    facts, weights = model_facts(args.model), None
    if args.weights is not None:
        weights = load_weights(args.weights)
        weights.check(facts.network)
        if args.caption is not None and args.caption != weights.caption:
            say(f'{args.weights} was tuned on "{weights.caption}", not "{args.caption}"')
    count = frame_count(args.frames, facts.frames)
    clip, fps = read_clip(args.clip, args, count, facts.area, facts.multiple)
    tuning = tuning if weights is None and tuning.steps > 0 else None
    job = EI2Job(clip, fps, settings, inflation, tuning, weights)
    tell_settings(job, args)
    return job


# --- the work ---------------------------------------------------------------------------------------------------------


def load_pipeline(model: str | None) -> EI2Pipeline:
    """The model of an edit: the embedded one, or Stable Diffusion from a folder or the hub."""
    from ..benchmarks.runner import embedded_image_model

    if model is None:
        # So small a model gains little from more threads, and loses much where other work shares the cores.
        torch.set_num_threads(1)
        return EI2Pipeline(embedded_image_model())
    return EI2Pipeline.from_pretrained(model, *hardware())


def learn(
    pipeline: EI2Pipeline, job: EI2Job, progress: Progress, args: argparse.Namespace
) -> tuple[EI2Weights, list[float]]:
    """The fine-tuning, and its file where one is asked for. KeyboardInterrupt tells what was kept."""
    with told_tuning(progress, job.tuning.steps, args.checkpoints), whole_steps(progress) as callback:
        weights, losses = pipeline.tune(job.clip, args.caption, job.tuning, job.inflation, callback, args.checkpoints)
    if args.save_weights is not None:
        path = free_name(args.save_weights, args.force)
        save_weights(path, weights)
        # The edit is made with what the file holds, in half precision, so that the file gives the same clip again.
        weights = load_weights(path)
        say(f'{path}: the fine-tuning, learnt on "{weights.caption}"')
    return weights, losses


def told_losses(losses: list[float]) -> str:
    """Losses of a fine-tuning in words: means of their first and last tenths, as single ones are mostly chance."""
    tenth = max(1, len(losses) // 10)
    return f"loss {fmean(losses[:tenth]):.3f} at first and {fmean(losses[-tenth:]):.3f} at last"


def run_ei2(args: argparse.Namespace) -> int:
    """`rewind ei2`."""
    job = prepare_ei2(args)
    if args.model is None:
        say(
            "no --model: the embedded model is only a demonstration, it knows nothing but pictures of its synthetic "
            'world and prompts like "a red circle on a blue background"'
        )
    started = time.monotonic()
    pipeline, settings, weights = load_pipeline(args.model), job.settings, job.weights
    passes = len(truncate_sigmas(pipeline.family.schedule(settings.steps), settings.strength)) - 1
    steps, learnt = 0 if job.tuning is None else job.tuning.steps, ""
    progress = Progress({"fine-tuning": [steps], "inversion": [passes], "sampling": [passes]})
    if job.tuning is not None:
        weights, losses = learn(pipeline, job, progress, args)
        learnt = f" ({told_losses(losses)})"
    with told_sampling(progress, job.tuning is not None, args.save_weights is not None, "weights"):
        result = pipeline.edit(job.clip, args.prompt, settings, weights, job.inflation, progress)
    work = f"{steps} steps of fine-tuning{learnt}, {result.evaluations} network evaluations"
    write_result(args, result.frames, job.fps, started, work)
    return 0
