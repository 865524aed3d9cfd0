"""`rewind dreamix`: a clip edited, a picture animated or a subject put in a new clip, by a prompt."""

from __future__ import annotations

import argparse
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..demo.clip import FPS
from ..demo.models import ImageToVideoConfig
from ..pipelines.dreamix.coarse_video import coarse_video, move
from ..pipelines.dreamix.corruption import coarse_size, degrade_time, sigmas_from
from ..pipelines.dreamix.families import model_kind
from ..pipelines.dreamix.finetuning import FineTuning
from ..pipelines.dreamix.lora import State, from_diffusers, to_diffusers
from ..pipelines.dreamix.pipeline import Callback, DreamixPipeline, DreamixResult, DreamixSettings
from ..pipelines.dreamix.presets import PRESETS, Preset
from ..pipelines.dreamix.prompts import with_token
from ..pipelines.video import read_image, read_video, write_video
from .files import check_folder, check_output, choose_size, free_name, resized, say, tell_length, tell_reading

KINDS = ("motion", "style", "object", "background")
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
TOKEN = "rewind.token"  # in the head of a LoRA file: the word that it was trained under
# What the command line may change of the preset's settings, and of its fine-tuning.
EDITING = {"noise": "s", "factor": "factor", "stride": "stride", "steps": "steps", "guidance": "guidance"}
EDITING |= {"negative": "negative", "second_pass": "second_pass", "scale": "scale"}
TUNING = {"fine_tune_steps": "steps", "alpha": "alpha", "learning_rate": "learning_rate", "rank": "rank"}
TUNING |= {"mask": "mask"}


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

    try:
        if model_kind(model) == "TextToVideoSDPipeline":
            unet = UNet3DConditionModel.load_config(model, subfolder="unet")
            area = (8 * (unet.get("sample_size") or 32)) ** 2
            return ModelFacts("unet", 16, area, 8 * 2 ** (len(unet["block_out_channels"]) - 1), 1, 8)
        patch = WanTransformer3DModel.load_config(model, subfolder="transformer")["patch_size"][-1]
        vae = AutoencoderKLWan.load_config(model, subfolder="vae").get("scale_factor_spatial") or 8
    except OSError as error:
        raise ValueError(
            f"{model} is not a model in diffusers' layout, neither a folder nor a hub's id within reach ({error})"
        ) from error
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


def check_flags(args: argparse.Namespace, preset: Preset) -> None:
    """Raise for what contradicts the task, and for what would change nothing."""
    if not args.prompt.strip():
        raise ValueError("the prompt is empty; say what the result shows")
    task = "--subject" if args.subject else "--animate"
    if (args.subject or args.animate) and args.alpha:
        raise ValueError(f"got --alpha {args.alpha:g}; {task} learns from pictures alone, with 0")
    if args.subject and args.noise not in (None, 1):
        raise ValueError(f"got --noise {args.noise:g}; --subject begins from pure noise, with 1")
    if args.subject and (args.factor, args.stride) != (None, None):
        raise ValueError("--factor and --stride degrade a clip, and --subject has none: leave them out")
    if args.guidance is not None and not 0 <= args.guidance < math.inf:
        raise ValueError(f"got --guidance {args.guidance}; it must be at least 0, and 1 is none")
    if args.fps is not None and args.fps < 1:
        raise ValueError(f"got --fps {args.fps}; it must be at least 1")
    second = preset.second_pass if args.second_pass is None else args.second_pass
    if args.scale is not None and not second:
        raise ValueError("--scale enlarges in the second pass, and there is none: give --second-pass too")
    steps = preset.fine_tune_steps if args.fine_tune_steps is None else args.fine_tune_steps
    needless = ["--" + name.replace("_", "-") for name in (*TUNING, "save_lora", "checkpoints") if given(args, name)]
    if args.lora is not None and needless:
        raise ValueError(f"--lora takes the place of the fine-tuning: leave out {', '.join(needless)}")
    needless = [name for name in needless if name != "--fine-tune-steps"]
    if args.lora is None and steps == 0 and needless:
        raise ValueError(f"without fine-tuning {', '.join(needless)} would do nothing: give --fine-tune-steps above 0")


def given(args: argparse.Namespace, name: str) -> bool:
    return getattr(args, name) is not None


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


def frame_count(args: argparse.Namespace, facts: ModelFacts) -> int:
    """How many frames the result shall have. Raises ValueError for a number that the model does not take."""
    count, stride = facts.frames if args.frames is None else args.frames, facts.stride
    if count < 2:
        raise ValueError(f"got --frames {count}; a clip has at least 2")
    if (count - 1) % stride:
        below = (count - 1) // stride * stride + 1
        fitting = f"{below} or {below + stride}" if below > 1 else f"{below + stride}"
        raise ValueError(f"got --frames {count}; this model takes {stride} n + 1: {fitting} for example")
    return count


def read_clip(args: argparse.Namespace, facts: ModelFacts, count: int) -> tuple[Tensor, Fraction]:
    """The clip of a file, as long as the model can take of it and at the model's size, and its frames a second."""
    (path,) = args.clip
    read = read_video(path, frames=count, fps=args.fps)
    frames, height, width = len(read.frames), *read.frames.shape[2:]
    fitting = (frames - 1) // facts.stride * facts.stride + 1
    if fitting < 2:
        fewest = f"; this model takes {facts.stride} n + 1" if facts.stride > 1 else ""
        had = f"{frames} frames" if frames > 1 else "one frame"
        raise ValueError(f"{path} has {had}; a clip has at least {facts.stride + 1}{fewest}")
    size = choose_size(args.size, width, height, facts.area, facts.multiple)
    tell_reading(read, args.frames, args.fps)
    if fitting < frames:
        say(f"the last {frames - fitting} of {frames} frames are left out: this model takes {facts.stride} n + 1")
    if facts.stride == 1:
        tell_length(fitting, facts.frames)
    if read.has_audio:
        say("the audio track is left out")
    return resized("clip", read.frames[:fitting], size), read.fps


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
    second = f"a second pass at {settings.second_pass:g}" if settings.second_pass else "no second pass"
    degraded = f"factor {settings.factor:g}, stride {settings.stride}"
    say(f"{task}: noise {settings.s:g}, {degraded}; {learnt}; {second}")


def prepare_dreamix(args: argparse.Namespace) -> DreamixJob:
    """Check and read all input, and say what is trimmed, resampled, resized or left out. Loads no model."""
    task = "subject" if args.subject else "animate" if args.animate else args.kind or KINDS[0]
    preset = PRESETS[task]
    check_files(args)
    check_flags(args, preset)
    changes = {ours: getattr(args, name) for name, ours in EDITING.items() if given(args, name)}
    own = {"s": preset.s, "factor": preset.factor, "stride": preset.stride, "second_pass": preset.second_pass}
    settings = DreamixSettings(**(own | changes))
    changes = {ours: getattr(args, name) for name, ours in TUNING.items() if given(args, name)}
    # Recomputing costs a third more time, and only large models are short of memory.
    own = {"steps": preset.fine_tune_steps, "alpha": preset.alpha, "checkpointing": args.model is not None}
    tuning = FineTuning(**(own | changes), seed=args.seed)
    facts = model_facts(args.model)
    lora, token = (None, None) if args.lora is None else read_lora(args.lora, facts.network)
    settings = replace(settings, token=args.token if args.token is not None else token or settings.token)
    if token not in (None, settings.token):
        say(f"{args.lora} was learnt under the word {token}, not {settings.token}")
    with_token(args.prompt, settings.token)  # raises for a token that is not one word
    count = frame_count(args, facts)
    if args.animate is not None:
        learnt = read_pictures(args, facts)
        clip = learnt = coarse_video(learnt[0], count, move(args.animate))
        fps = Fraction(args.fps or facts.fps)
    elif args.subject:
        learnt = read_pictures(args, facts)
        clip, fps = torch.zeros(count, *learnt.shape[1:]), Fraction(args.fps or facts.fps)
    else:
        learnt, fps = read_clip(args, facts, count)
        clip = learnt
    coarse_size(*clip.shape[2:], settings.factor)  # both raise now what the edit would after the fine-tuning
    degrade_time(clip, settings.stride)
    tuning = tuning if lora is None and tuning.steps > 0 else None
    tell_settings(task, settings, tuning, args.lora)
    return DreamixJob(clip, learnt, fps, args.prompt, settings, tuning, lora, facts.network)


# --- the work ---------------------------------------------------------------------------------------------------------


class Progress:
    """Bars on stderr: one of the fine-tuning, one of each pass of the sampling. Called with what the loops tell."""

    def __init__(self, totals: dict[str, list[int]]):
        self.totals, self.bar, self.tuned = totals, None, 0

    def __call__(self, step: dict[str, Any]) -> None:
        phase = "fine-tuning" if "loss" in step else "sampling"
        if self.bar is None or (phase == "sampling" and step["i"] == 0):
            self.close()
            # A fine-tuning that goes on from a checkpoint does not begin at 0.
            total = self.totals[phase].pop(0)
            self.bar = tqdm(desc=phase, total=total, initial=step["i"], file=sys.stderr)
        if phase == "fine-tuning":
            self.tuned = step["i"] + 1
            losses = {name: f"{step[name]:.3f}" for name in ("video", "frames") if not math.isnan(step[name])}
            self.bar.set_postfix(losses, refresh=False)
        self.bar.update()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def load_pipeline(model: str | None) -> DreamixPipeline:
    """The model of an edit: the embedded one, or one of `families` from a folder or the hub."""
    from ..benchmarks.runner import embedded_text_pipeline

    if model is None:
        # So small a model gains little from more threads, and loses much where other work shares the cores.
        torch.set_num_threads(1)
        return embedded_text_pipeline()
    on_gpu = torch.cuda.is_available()
    # Gradients pass the network: bfloat16 has the range for them that float16 lacks.
    return DreamixPipeline.from_pretrained(
        model, torch.bfloat16 if on_gpu else torch.float32, "cuda" if on_gpu else "cpu"
    )


def write_lora(path: Path, state: State, network: str, token: str) -> None:
    """Adapters in diffusers' names, with the word they were trained under."""
    from safetensors.torch import save_file

    tensors = {key: tensor.contiguous() for key, tensor in to_diffusers(state, network).items()}
    save_file(tensors, path, metadata={"format": "pt", TOKEN: token})
    say(f"{path}: the fine-tuning, learnt under the word {token}")


@contextmanager
def whole_steps(callback: Callback) -> Iterator[Callback]:
    """Inside, Ctrl-C ends a fine-tuning with the step that it falls in, so that a later run goes on exactly.

    Pressed again, it ends it at once.
    """
    pressed = False

    def press(*_: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    def after(step: dict[str, Any]) -> None:
        callback(step)
        if pressed:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, press)
    try:
        yield after
    finally:
        signal.signal(signal.SIGINT, before)


def learn(pipeline: DreamixPipeline, job: DreamixJob, progress: Progress, args: argparse.Namespace) -> State:
    """The fine-tuning, and its file where one is asked for. KeyboardInterrupt tells what was kept."""
    try:
        with whole_steps(progress) as callback:
            tuned = pipeline.fine_tune(job.learnt, job.settings.token, job.tuning, callback, args.checkpoints)
    except KeyboardInterrupt as stop:
        told = f"stopped after {progress.tuned} of {job.tuning.steps} steps of fine-tuning"
        if not progress.tuned:
            told = "stopped before the first step of fine-tuning"
        if args.checkpoints is None:
            told += "; nothing is kept, with --checkpoints FOLDER it would be"
        else:
            told += f"; the same command goes on from what {args.checkpoints} holds"
        raise KeyboardInterrupt(told) from stop
    finally:
        progress.close()
    if args.save_lora is not None:
        write_lora(free_name(args.save_lora, args.force), tuned.lora, job.network, job.settings.token)
    return tuned.lora


def sample(
    pipeline: DreamixPipeline, job: DreamixJob, lora: State | None, progress: Progress, args: argparse.Namespace
) -> DreamixResult:
    """The edit itself. KeyboardInterrupt tells what became of the fine-tuning."""
    try:
        return pipeline.edit(job.clip, job.prompt, job.settings, args.seed, lora, progress)
    except KeyboardInterrupt as stop:
        told = "stopped while sampling; no clip is written"
        if job.tuning is not None and args.save_lora is None:
            told += " and the fine-tuning is lost, --save-lora FILE keeps it"
        elif job.tuning is not None:
            told += ", but the fine-tuning is: --lora with its file takes its place"
        raise KeyboardInterrupt(told) from stop
    finally:
        progress.close()


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
    result = sample(pipeline, job, lora, progress, args)
    output = free_name(args.output, args.force)
    write_video(output, result.frames, job.fps)
    say(
        f"{output}: {len(result.frames)} frames at {float(job.fps):g} frames a second, "
        f"{time.monotonic() - started:.0f} s, {steps} steps of fine-tuning, {result.evaluations} network evaluations"
    )
    return 0
