"""A clip four times the model's length against the known answer: in parts, in context windows, and at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from ..demo.clip import SEEDS, Example, example, world_of
from ..demo.world import EDITS
from ..pipelines.evaluation.memory import held_memory, peak_memory
from ..pipelines.evaluation.metrics import flow_error, psnr
from ..pipelines.videoshop.parts import parts
from ..pipelines.videoshop.pipeline import VideoshopPipeline
from ..pipelines.videoshop.settings import DEFAULT, VideoshopSettings
from . import runner
from .editing import counted
from .statistics import estimate, margin
from .windows import OwnFramePipeline

LENGTH, TIMES = 8, 4  # frames of the model, and how many times as long the clips are
FRAMES = TIMES * LENGTH
CLIPS, KINDS = 8, ("recolour", "reshape", "background")
SIDE = 192  # pixels of the clips that memory is measured on

Record = dict[str, Any]


@dataclass(frozen=True)
class Way:
    """A row of the table. at_once: of the pipeline's own parts, 0 for none; windows: of the host's kind, own_frame:
    each told of its own first frame; by_hand: the short pipeline, again and again; rescale: how far to the statistics
    of the edited frame, by the first part's own."""

    name: str
    at_once: int = 0
    windows: bool = False
    own_frame: bool = False
    by_hand: bool = False
    rescale: float = 0.0


WHOLE, WINDOWS, IN_PARTS = "the clip at once", "context windows", "parts"
WAYS = (
    Way(WHOLE),
    Way(WINDOWS, windows=True),
    Way("context windows, each told of its own first frame", windows=True, own_frame=True),
    Way("parts by hand: own random directions, the last frame through the VAE", at_once=LENGTH, by_hand=True),
    Way(IN_PARTS, at_once=LENGTH),
    Way("parts, rescaled to the edited frame", at_once=LENGTH, rescale=1.0),
)


@dataclass(frozen=True)
class Job:
    """One clip in one way, inverted once, and its edits."""

    seed: int
    kinds: tuple[str, ...]
    way: Way
    settings: VideoshopSettings = DEFAULT


# --- the ways ---------------------------------------------------------------------------------------------------------


def edited(pipeline: VideoshopPipeline, job: Job, examples: Sequence[Example]) -> list[tuple[Tensor, int]]:
    """The frames [T, 3, H, W] of each edit of a clip, and the network calls of its way back."""
    source, way, generator = examples[0].source, job.way, torch.Generator().manual_seed(job.seed)
    if way.own_frame:
        pipeline = OwnFramePipeline(pipeline, LENGTH)
    if way.by_hand:
        return [_by_hand(pipeline, job, source, chosen.edited_frame) for chosen in examples]
    length = LENGTH if way.windows and not way.own_frame else 0
    settings = replace(job.settings, frames_at_once=way.at_once, context_length=length, rescale=way.rescale)
    inversion = pipeline.invert(source, settings, generator)
    results = []
    for chosen in examples:
        with counted(pipeline.unet) as calls:
            result = pipeline(source, chosen.edited_frame, settings, progress=False, inversion=inversion)
        results.append((result.frames, len(calls)))
    return results


def _by_hand(pipeline: VideoshopPipeline, job: Job, source: Tensor, frame: Tensor) -> tuple[Tensor, int]:
    """What a user does without parts: edit the next piece from the last frame of the one before, as a picture."""
    frames, calls = source[:0], 0
    for number, (start, stop) in enumerate(parts(len(source), job.way.at_once)):
        generator = torch.Generator().manual_seed(1000 * job.seed + number)
        result = pipeline(source[start:stop], frame, job.settings, generator, progress=False)
        frames = torch.cat([frames, result.frames[1:] if number else result.frames])
        frame, calls = result.frames[-1], calls + result.evaluations["denoising"]
    return frames, calls


# --- measures ---------------------------------------------------------------------------------------------------------


def joins() -> list[int]:
    """The frames that two parts share: between each and the next lies a join."""
    return [start for start, _ in parts(FRAMES, LENGTH)[1:]]


def beside(values: Sequence[float], at: Sequence[int]) -> tuple[float, float]:
    """The mean of values [T - 1], one for each pair of neighbouring frames, at the joins and elsewhere."""
    far = [value for i, value in enumerate(values) if i not in set(at)]
    return fmean(values[i] for i in at), fmean(far)


def colour_errors(frames: Tensor, chosen: Example) -> Tensor:
    """How far the mean colour inside the edited region is from the true edit's, [T, 3] in levels of 255."""
    weight = chosen.region[:, None]
    return 255 * ((frames - chosen.target) * weight).sum((2, 3)) / weight.sum((2, 3))


def measure(frames: Tensor, chosen: Example) -> Record:
    """The measures of a result [T, 3, H, W]. What is at a join is the step from the shared frame to the next."""
    at, colours = joins(), colour_errors(frames, chosen)
    flows = [
        flow_error(frames[i : i + 2], chosen.flow[i : i + 1], chosen.target_mask[i : i + 2]) for i in range(FRAMES - 1)
    ]
    flow_joins, flow_middles = beside(flows, at)
    colour_joins, colour_middles = beside(colours.diff(dim=0).norm(dim=1).tolist(), at)
    return {
        "psnr_edit": psnr(frames, chosen.target, chosen.region),
        "psnr_last": psnr(frames[-LENGTH:], chosen.target[-LENGTH:], chosen.region[-LENGTH:]),
        "flow_joins": flow_joins,
        "flow_middles": flow_middles,
        "colour_joins": colour_joins,
        "colour_middles": colour_middles,
        "drift": float((colours[-LENGTH:].mean(0) - colours[:LENGTH].mean(0)).norm()),
    }


@torch.no_grad()
def work(pipeline: VideoshopPipeline, job: Job) -> list[Record]:
    """A record for each edit of a clip, and for its true answer through the VAE."""
    examples = [example(job.seed, kind, world=world_of(FRAMES)) for kind in job.kinds]
    records = []
    for chosen, (frames, calls) in zip(examples, edited(pipeline, job, examples), strict=True):
        about = {"seed": job.seed, "kind": chosen.kind}
        if job.way.name == WHOLE:
            through = pipeline.decode(pipeline.encode(chosen.target))
            records.append(about | {"way": VAE, "calls": 0} | measure(through, chosen))
        records.append(about | {"way": job.way.name, "calls": calls} | measure(frames, chosen))
    return records


# --- memory -----------------------------------------------------------------------------------------------------------


class NoVae:
    """In the place of a VAE, which takes most of the memory at so small a size: a frame is its own latents, made small.

    It has no dtype of weights to ask for but float32.
    """

    encoder = decoder = SimpleNamespace(conv_in=SimpleNamespace(weight=torch.zeros(1)))

    def encode(self, pixels: Tensor) -> Any:
        latents = avg_pool2d(pixels, 8)
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: torch.cat([latents, latents[:, :1]], 1)))

    def decode(self, latents: Tensor, num_frames: int) -> Any:
        return SimpleNamespace(sample=interpolate(latents[:, :3], scale_factor=8))


def peaks(pipeline: VideoshopPipeline, frames: int, at_once: int, length: int, vae: bool = True) -> dict[str, float]:
    """What this process holds before an edit of a clip of SIDE x SIDE pixels, and the most it held with it, MiB.

    at_once: of parts, length: of windows, 0 for none. vae: the whole edit, or the network's two ways alone, without the
    pictures.
    """
    if not vae:
        pipeline.vae = NoVae()
    video = torch.rand(frames, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    settings = VideoshopSettings(steps=2, strength=1.0, frames_at_once=at_once, context_length=length)
    pipeline.chunk = LENGTH
    pipeline(video[:2, :, :64, :64], video[0, :, :64, :64], replace(settings, frames_at_once=0), progress=False)
    before = held_memory()
    if vae:
        pipeline(video, video[0], settings, progress=False)
    else:
        pipeline.denoise(pipeline.invert(video, settings), video[0], settings)
    return {"before": before, "peak": peak_memory()}


THRESHOLD = "MALLOC_MMAP_THRESHOLD_"
PARTS = ("the whole edit", "the network alone")
MEMORY = {
    f"{LENGTH} frames at once: one window": (LENGTH, 0, 0),
    f"{FRAMES} frames in parts of {LENGTH}": (FRAMES, LENGTH, 0),
    f"{FRAMES} frames in context windows of {LENGTH}": (FRAMES, 0, LENGTH),
    f"{FRAMES} frames at once": (FRAMES, 0, 0),
}


def _peaks_anew(load: Callable[[], VideoshopPipeline], *size: Any) -> dict[str, float]:
    torch.set_num_threads(1)
    return peaks(load(), *size)


def measure_memory(load: Callable[[], VideoshopPipeline]) -> dict[str, dict[str, dict[str, float]]]:
    """`peaks` of every row of MEMORY, with the VAE and of the network alone, each in a process of its own.

    GNU's allocator gives all but small blocks back at once there, instead of when it sees fit: what is measured would
    otherwise be how it was fragmented, by a fifth to either side.
    """
    before = os.environ.get(THRESHOLD)
    os.environ[THRESHOLD] = str(2**16)
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in MEMORY}
    try:
        for name, size in MEMORY.items():
            for part in PARTS:
                with get_context("spawn").Pool(1) as pool:
                    found[name][part] = pool.apply(_peaks_anew, (load, *size, part == PARTS[0]))
                    pool.close()
                    pool.join()
    finally:
        if before is None:
            del os.environ[THRESHOLD]
        else:
            os.environ[THRESHOLD] = before
    return found


# --- tables -----------------------------------------------------------------------------------------------------------

VAE = "true edit through the VAE"
COLUMNS = {
    "edited region to the true edit, dB": ("psnr_edit", 2),
    f"its last {LENGTH} frames, dB": ("psnr_last", 2),
    "flow error at the joins, pixels": ("flow_joins", 2),
    "elsewhere": ("flow_middles", 2),
    "step of the colour error at the joins, of 255": ("colour_joins", 1),
    "elsewhere ": ("colour_middles", 1),
    "drift of the colour, of 255": ("drift", 1),
}


def of(records: Sequence[Record], name: str) -> list[Record]:
    """The records of a row."""
    return [record for record in records if record["way"] == name]


def results_table(records: Sequence[Record]) -> str:
    """A row a way: mean and 95 % interval over clips."""
    rows = []
    for name in (VAE, *(way.name for way in WAYS)):
        own = of(records, name)
        calls = str(own[0]["calls"]) if own[0]["calls"] else "-"
        rows.append([name, calls, *(estimate(own, key, digits) for key, digits in COLUMNS.values())])
    return runner.table(["way", "network calls of an edit", *COLUMNS], rows)


def gain_table(records: Sequence[Record]) -> str:
    """How far the edited region of each way is above that of the parts, clip by clip."""
    rows = []
    for way in WAYS:
        if way.name == IN_PARTS:
            continue
        mean, bound = margin(of(records, way.name), of(records, IN_PARTS), "psnr_edit")
        _, below = margin(of(records, IN_PARTS), of(records, way.name), "psnr_edit")
        told = "better" if bound > 0 else "worse" if below > 0 else "inside the noise"
        rows.append([way.name, f"{mean:+.2f}", f"{bound:+.2f}", told])
    return runner.table(["way", "over parts, dB", "lower 95 % bound", "than parts"], rows)


def memory_table(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """A row a length and way: what an edit took above the loaded model, and its share of one window's."""
    taken = {name: [own[part]["peak"] - own[part]["before"] for part in PARTS] for name, own in found.items()}
    one = next(iter(taken.values()))
    rows = [
        [name, *(cell for size, least in zip(sizes, one) for cell in (f"{size:.0f}", f"{size / least:.2f}"))]
        for name, sizes in taken.items()
    ]
    header = [cell for part in PARTS for cell in (f"{part}, MiB", "of one window")]
    return runner.table(["clip", *header], rows)


def report(records: Sequence[Record], memory: dict[str, dict[str, dict[str, float]]], seeds: str) -> str:
    """All tables as Markdown."""
    clips = len({record["seed"] for record in records})
    kinds = [kind for kind in EDITS if any(record["kind"] == kind for record in records)]
    text = (
        f"# Clips of {FRAMES} frames with a model of {LENGTH}\n\n{clips} clips of {seeds} seeds, edits "
        f"{', '.join(kinds)}, `rewind benchmark long`: mean and 95 % interval over clips. Joins lie behind frames "
        f"{', '.join(str(i + 1) for i in joins())}, where one part ends; the other ways are measured at the same "
        "places. Flow error: of the object, against its true motion. Colour error: of the mean colour inside the "
        "edited region against the true edit; its step from a frame to the next, and its drift from the first "
        f"{LENGTH} frames to the last {LENGTH}. A network call is on at most {LENGTH} frames, at once on {FRAMES}.\n"
    )
    text += f"{runner.lead(clips, CLIPS)}\n{results_table(records)}"
    if clips > 1:
        text += f"\n## Against parts\n\n{gain_table(records)}"
    return text + (
        f"\n## Memory\n\nThe most that an edit of {SIDE} x {SIDE} pixels held above the loaded model, each in a "
        f"process of its own; no trajectory is stored, the VAE takes {LENGTH} frames at once. Its decoder takes the "
        f"most at this size, hence also without it.\n\n{memory_table(memory)}"
    )


# --- the run ----------------------------------------------------------------------------------------------------------


def main(
    clips: int = CLIPS,
    seeds: str = "test",
    kinds: Sequence[str] = KINDS,
    workers: int | None = None,
    output: Path = runner.RESULTS,
    load: Callable[[], Any] = runner.embedded_pipeline,
    settings: VideoshopSettings = DEFAULT,
) -> list[Record]:
    """Edit in each way, measure, print and save. Memory comes first, while this process is small."""
    kept = output / "long.partial.jsonl"
    memory = measure_memory(load)
    jobs = [Job(SEEDS[seeds] + index, tuple(kinds), way, settings) for index in range(clips) for way in WAYS]
    records = [record for part in runner.run(work, jobs, "long", workers, load, kept) for record in part]
    data = {
        "seeds": seeds,
        "machine": runner.machine(),
        "settings": asdict(settings),
        "memory": memory,
        "records": records,
    }
    runner.save("long", report(records, memory, seeds), data, output)
    kept.unlink()
    return records
