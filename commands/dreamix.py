"""`rewind dreamix`: a clip edited, a picture animated or a subject put in a new clip, by a prompt."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from ..demo.clip import FPS
from ..demo.models import ImageToVideoConfig
from ..pipelines.dreamix.coarse_video import STILL, coarse_video, move
from ..pipelines.dreamix.corruption import coarse_size, degrade_time, sigmas_from
from ..pipelines.dreamix.families import model_kind
from ..pipelines.dreamix.finetuning import FineTuning
from ..pipelines.dreamix.lora import State, from_diffusers, to_diffusers
from ..pipelines.dreamix.pipeline import DreamixPipeline, DreamixSettings
from ..pipelines.dreamix.presets import PRESETS, Preset
from ..pipelines.dreamix.prompts import with_token
from ..pipelines.video import read_image
from .files import (
    check_folder,
    check_output,
    check_request,
    choose_size,
    configuration_of,
    frame_count,
    free_name,
    given,
    named,
    read_clip,
    resized,
    say,
    tell_length,
    write_result,
)
from .tuning import Progress, hardware, told_sampling, told_tuning, whole_steps

KINDS = ("motion", "style", "object", "background")
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
TOKEN = "rewind.token"  # in the head of a LoRA file: the word that it was trained under
# What the command line may change of the preset's settings, and of its fine-tuning.
EDITING = {"noise": "s", "factor": "factor", "stride": "stride", "steps": "steps", "guidance": "guidance"}
EDITING |= {"temporal": "temporal", "negative": "negative", "second_pass": "second_pass", "scale": "scale"}
TUNING = {"fine_tune_steps": "steps", "alpha": "alpha", "learning_rate": "learning_rate", "rank": "rank"}
TUNING |= {"mask": "mask"}
DEGRADING = ("factor", "coarse_size", "stride", "temporal")
MOVING = ("amount", "fill", "easing")


@dataclass(frozen=True)
class ModelFacts:
    """What must be known of a model before it is loaded."""

    network: str  # its name in the pipeline, and in the names of a LoRA's weights
    frames: int  # of a result, where the user asks for none
    area: int  # pixels of the frames it was trained on
    multiple: int  # both sides must be multiples of it
    stride: int  # clips have stride n + 1 frames
    fps: int  # of a result made of pictures


@dataclass(frozen=True)
class DreamixJob:
    """An edit with all its input read and checked."""

    clip: Tensor  # [T, 3, H, W], what is edited
    learnt: Tensor  # [T or M, 3, H, W], what the model is tuned on
    fps: Fraction
    prompt: str
    settings: DreamixSettings
    tuning: FineTuning | None  # None: the model as it is, or with the adapters of a file
    lora: State | None  # the adapters of a file
    network: str


# --- before any weights are loaded ------------------------------------------------------------------------------------


def model_facts(model: str | None) -> ModelFacts:
    """Read them from the model's configuration files, of a folder or on the hub; no weights are read.

    Raises ValueError where there is no such model, or one that Dreamix does not run on.
    """
    if model is None:
        own = ImageToVideoConfig()
        return ModelFacts("unet", own.frames, own.size**2, 8 * 2 ** (len(own.unet_channels) - 1), 1, FPS)
    from diffusers import AutoencoderKLWan, UNet3DConditionModel, WanTransformer3DModel

    with configuration_of(model):
        if model_kind(model) == "TextToVideoSDPipeline":
            unet = UNet3DConditionModel.load_config(model, subfolder="unet")
            area = (8 * (unet.get("sample_size") or 32)) ** 2
            return ModelFacts("unet", 16, area, 8 * 2 ** (len(unet["block_out_channels"]) - 1), 1, 8)
        patch = WanTransformer3DModel.load_config(model, subfolder="transformer")["patch_size"][-1]
        vae = AutoencoderKLWan.load_config(model, subfolder="vae").get("scale_factor_spatial") or 8
    # Two seconds at Wan's 16 frames a second. It knows five, 81 frames, which no common GPU has the memory to tune on.
    return ModelFacts("transformer", 33, 832 * 480, vae * patch, 4, 16)


def check_files(args: argparse.Namespace) -> None:
    """Raise for inputs that do not fit the task, and for results that could not be written."""
    check_output(args.output, args.clip, args.force)
    if args.save_lora is not None:
        check_output(args.save_lora, args.clip, args.force, (".safetensors",))
    if args.checkpoints is not None:
        check_folder(args.checkpoints)
    pictures = [path for path in args.clip if path.suffix.lower() in PICTURES]
    if args.animate is not None and not len(pictures) == len(args.clip) == 1:
        raise ValueError(f"--animate takes one picture ({', '.join(PICTURES)})")
    if args.subject and len(pictures) < len(args.clip):
        raise ValueError(f"--subject takes pictures ({', '.join(PICTURES)}), not clips")
    if args.animate is None and not args.subject:
        if len(args.clip) > 1:
            raise ValueError(f"got {len(args.clip)} files; a clip is one, pictures of a subject need --subject")
        if pictures:
            raise ValueError(f"{pictures[0]} is a picture: --animate MOVE animates it, --subject makes a clip of it")


def options(args: argparse.Namespace, names: Iterable[str]) -> str:
    """Those of some options that are given, as they are typed."""
    return named(name for name in names if given(args, name))


def check_flags(args: argparse.Namespace, preset: Preset) -> None:
    """Raise for what contradicts the task, and for what would change nothing."""
    check_request(args)
    task = "--subject" if args.subject else "--animate"
    if (args.subject or args.animate) and args.alpha:
        raise ValueError(f"got --alpha {args.alpha:g}; {task} learns from pictures alone, with 0")
    if args.subject and args.noise not in (None, 1):
        raise ValueError(f"got --noise {args.noise:g}; --subject begins from pure noise, with 1")
    if args.subject and (told := options(args, DEGRADING)):
        raise ValueError(f"{told} would degrade a clip, and --subject has none: leave it out")
    if args.animate is None and (told := options(args, MOVING)):
        raise ValueError(f"{told} is of --animate, which moves a picture: leave it out")
    if args.animate == STILL and (told := options(args, MOVING)):
        raise ValueError(f"{told} would do nothing: --animate {STILL} does not move the picture")
    stride = preset.stride if args.stride is None else args.stride
    if args.temporal is not None and stride == 1:
        raise ValueError("--temporal fills in what --stride leaves out, and every frame is kept: give --stride too")
    if args.factor is not None and args.coarse_size is not None:
        raise ValueError("--factor and --coarse-size both tell how far the clip is downsampled: give one of them")
    second = preset.second_pass if args.second_pass is None else args.second_pass
    if args.scale is not None and not second:
        raise ValueError("--scale enlarges in the second pass, and there is none: give --second-pass too")
    steps = preset.fine_tune_steps if args.fine_tune_steps is None else args.fine_tune_steps
    learning = (*TUNING, "save_lora", "checkpoints")
    if args.lora is not None and (told := options(args, learning)):
        raise ValueError(f"--lora takes the place of the fine-tuning: leave out {told}")
    told = options(args, [name for name in learning if name != "fine_tune_steps"])
    if args.lora is None and steps == 0 and told:
        raise ValueError(f"without fine-tuning {told} would do nothing: give --fine-tune-steps above 0")


def read_lora(path: Path, network: str) -> tuple[State, str | None]:
    """Adapters of a file in diffusers' names, and the word they were trained under where the file tells it."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, "pt") as file:
            token = (file.metadata() or {}).get(TOKEN)
            keys = list(file.keys())
            state = from_diffusers({key: file.get_tensor(key) for key in keys}, network)
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is not a whole LoRA file in safetensors' format ({error})") from error
    if not state:
        raise ValueError(f"{path} holds no LoRA in diffusers' names; --lora takes what --save-lora wrote")
    if any(key.split(".")[0] != network for key in keys):
        raise ValueError(f"{path} is a LoRA of another kind of model: it is not for the {network} of this one")
    return state, token


def read_pictures(args: argparse.Namespace, facts: ModelFacts) -> Tensor:
    """The pictures [M, 3, H, W] of one or several files, at the model's size, in the proportions of the first."""
    pictures = [read_image(path) for path in args.clip]
    size = choose_size(args.size, pictures[0].shape[2], pictures[0].shape[1], facts.area, facts.multiple)
    return torch.cat([resized(path.name, picture[None], size) for path, picture in zip(args.clip, pictures)])


def tell_settings(task: str, settings: DreamixSettings, tuning: FineTuning | None, lora: Path | None) -> None:
    """Say what was chosen, by the preset of the task and by the user."""
    learnt = "no fine-tuning" if lora is None else f"the fine-tuning of {lora}"
    if tuning is not None:
        learnt = f"{tuning.steps} steps of fine-tuning with alpha {tuning.alpha:g}"
    second = "no second pass"
    if settings.second_pass:
        second = f"a second pass at {settings.second_pass:g}, {settings.scale:g} times as large"
    small = f"factor {settings.factor:g}" if settings.size is None else "down to {1}x{0}".format(*settings.size)
    degraded = f"{small}, stride {settings.stride}"
    say(f"{task}: noise {settings.s:g}, {degraded}; {learnt}; {second}")


def prepare_dreamix(args: argparse.Namespace) -> DreamixJob:
    """Check and read all input, and say what is trimmed, resampled, resized or left out. Loads no model."""
    task = "subject" if args.subject else "animate" if args.animate else args.kind or KINDS[0]
    preset = PRESETS[task]
    check_files(args)
    check_flags(args, preset)
    changes = {ours: getattr(args, name) for name, ours in EDITING.items() if given(args, name)}
    own = {"s": preset.s, "factor": preset.factor, "stride": preset.stride, "second_pass": preset.second_pass}
    size = None if args.coarse_size is None else args.coarse_size[::-1]
    settings = DreamixSettings(**(own | changes), size=size)
    changes = {ours: getattr(args, name) for name, ours in TUNING.items() if given(args, name)}
    # Recomputing costs half as much time again, and only large models are short of memory.
    own = {"steps": preset.fine_tune_steps, "alpha": preset.alpha, "checkpointing": args.model is not None}
    tuning = FineTuning(**(own | changes), seed=args.seed)
    facts = model_facts(args.model)
    lora, token = (None, None) if args.lora is None else read_lora(args.lora, facts.network)
    settings = replace(settings, token=args.token if args.token is not None else token or settings.token)
    if token not in (None, settings.token):
        say(f"{args.lora} was learnt under the word {token}, not {settings.token}")
    with_token(args.prompt, settings.token)  # raises for a token that is not one word
    count = frame_count(args.frames, facts.frames, facts.stride)
    if args.animate is not None:
        learnt = read_pictures(args, facts)
        moved = {name: getattr(args, name) for name in ("fill", "easing") if given(args, name)}
        amount = 1.0 if args.amount is None else args.amount
        clip = learnt = coarse_video(learnt[0], count, move(args.animate, amount), **moved)
        fps = Fraction(args.fps or facts.fps)
    elif args.subject:
        learnt = read_pictures(args, facts)
        clip, fps = torch.zeros(count, *learnt.shape[1:]), Fraction(args.fps or facts.fps)
    else:
        clip, fps = read_clip(args.clip[0], args, count, facts.area, facts.multiple, facts.stride)
        if facts.stride == 1:
            tell_length(len(clip), facts.frames)
        learnt = clip
    coarse_size(*clip.shape[2:], settings.factor, size)  # both raise now what the edit would after the fine-tuning
    degrade_time(clip, settings.stride, settings.temporal)
    tuning = tuning if lora is None and tuning.steps > 0 else None
    tell_settings(task, settings, tuning, args.lora)
    return DreamixJob(clip, learnt, fps, args.prompt, settings, tuning, lora, facts.network)


# --- the work ---------------------------------------------------------------------------------------------------------


def load_pipeline(model: str | None) -> DreamixPipeline:
    """The model of an edit: the embedded one, or one of `families` from a folder or the hub."""
    from ..benchmarks.runner import embedded_text_pipeline

    if model is None:
        # So small a model gains little from more threads, and loses much where other work shares the cores.
        torch.set_num_threads(1)
        return embedded_text_pipeline()
    return DreamixPipeline.from_pretrained(model, *hardware())


def write_lora(path: Path, state: State, network: str, token: str) -> None:
    """Adapters in diffusers' names, with the word they were trained under."""
    from safetensors.torch import save_file

    tensors = {key: tensor.contiguous() for key, tensor in to_diffusers(state, network).items()}
    save_file(tensors, path, metadata={"format": "pt", TOKEN: token})
    say(f"{path}: the fine-tuning, learnt under the word {token}")


def learn(pipeline: DreamixPipeline, job: DreamixJob, progress: Progress, args: argparse.Namespace) -> State:
    """The fine-tuning, and its file where one is asked for. KeyboardInterrupt tells what was kept."""
    with told_tuning(progress, job.tuning.steps, args.checkpoints), whole_steps(progress) as callback:
        tuned = pipeline.fine_tune(job.learnt, job.settings.token, job.tuning, callback, args.checkpoints)
    if args.save_lora is not None:
        write_lora(free_name(args.save_lora, args.force), tuned.lora, job.network, job.settings.token)
    return tuned.lora


def run_dreamix(args: argparse.Namespace) -> int:
    """`rewind dreamix`."""
    job = prepare_dreamix(args)
    if args.model is None:
        say(
            "no --model: the embedded model is only a demonstration, it knows nothing but clips of its synthetic world "
            'and prompts like "a red circle moves right"'
        )
    started = time.monotonic()
    pipeline, settings = load_pipeline(args.model), job.settings
    schedule, path = pipeline.family.schedule(settings.steps), pipeline.family.path
    passes = [len(sigmas_from(schedule, s, path)) - 1 for s in (settings.s, settings.second_pass)]
    steps = 0 if job.tuning is None else job.tuning.steps
    progress = Progress({"fine-tuning": [steps], "sampling": [count for count in passes if count]})
    lora = job.lora if job.tuning is None else learn(pipeline, job, progress, args)
    with told_sampling(progress, job.tuning is not None, args.save_lora is not None, "lora"):
        result = pipeline.edit(job.clip, job.prompt, settings, args.seed, lora, progress)
    work = f"{steps} steps of fine-tuning, {result.evaluations} network evaluations"
    write_result(args, result.frames, job.fps, started, work)
    return 0
