"""What the benchmarks share: the model, work spread over processes, statistics, tables, and files of results."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

PACK = Path(__file__).resolve().parent.parent
RESULTS = Path("benchmarks/results")


def embedded_pipeline():
    """The embedded model as a VideoshopPipeline, on a GPU where there is one."""
    from ..demo.models import SCALING_FACTOR, load_components
    from ..pipelines.videoshop.pipeline import VideoshopPipeline

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return VideoshopPipeline(*(part.to(device) for part in load_components()), scaling_factor=SCALING_FACTOR)


def embedded_text_pipeline():
    """The embedded text-to-video model as a DreamixPipeline, on a GPU where there is one."""
    from ..demo.text import load_text_components
    from ..pipelines.dreamix.families import TextSVD
    from ..pipelines.dreamix.pipeline import DreamixPipeline

    device = "cuda" if torch.cuda.is_available() else "cpu"
    *modules, tokenizer = load_text_components()
    return DreamixPipeline(TextSVD(*(part.to(device) for part in modules), tokenizer))


def embedded_image_model():
    """The embedded text-to-image model as EI²'s TextToImage, on a GPU where there is one."""
    from ..demo.text_to_image import alphas_cumprod, load_image_components
    from ..pipelines.ei2.family import TextToImage

    device = "cuda" if torch.cuda.is_available() else "cpu"
    *modules, tokenizer = load_image_components()
    return TextToImage(*(part.to(device) for part in modules), tokenizer, alphas_cumprod())


def default_workers() -> int:
    """One single-threaded process a core, or one process that has the GPU."""
    return 1 if torch.cuda.is_available() else os.cpu_count() or 1


_model: Any = None  # of a worker process


def _start_worker(load: Callable[[], Any]) -> None:
    global _model
    torch.set_num_threads(1)
    _model = load()


def _work(function: Callable[[Any, Any], Any], item: Any) -> Any:
    return function(_model, item)


def run(
    function: Callable[[Any, Any], Any],
    items: Sequence[Any],
    label: str,
    workers: int | None = None,
    load: Callable[[], Any] = embedded_pipeline,
    kept: Path | None = None,
) -> list[Any]:
    """function(model, item) of every item, in order, with progress on stderr.

    More than one worker: processes of one thread each, which load the model for themselves; function, items and load
    must then be picklable. workers: None is `default_workers()`. kept: a file that each result (JSON) is added to as it
    comes; a run that was interrupted goes on from there, unless the machine, the code or the weights are others.
    """
    results = _read_kept(kept)
    left = [item for item in items if repr(item) not in results]
    if kept is not None and results:
        print(f"{label}: {len(items) - len(left)} of {len(items)} are in {kept}", file=sys.stderr, flush=True)
    count = min(workers or default_workers(), len(left))
    if count > 1:
        with get_context("spawn").Pool(count, _start_worker, (load,)) as pool:
            _collect(pool.imap(partial(_work, function), left), left, label, results, kept)
            pool.close()
            pool.join()
    elif left:
        _collect(map(partial(function, load()), left), left, label, results, kept)
    return [results[repr(item)] for item in items]


def _collect(
    found: Iterable[Any], items: Sequence[Any], label: str, results: dict[str, Any], kept: Path | None
) -> None:
    started = time.monotonic()
    for number, (item, result) in enumerate(zip(items, found, strict=True), 1):
        results[repr(item)] = result
        if kept is not None:
            with kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps([repr(item), result]) + "\n")
        spent = time.monotonic() - started
        left = spent / number * (len(items) - number)
        print(f"{label}: {number}/{len(items)}, {spent:.0f} s spent, {left:.0f} s left", file=sys.stderr, flush=True)


def _read_kept(kept: Path | None) -> dict[str, Any]:
    """The results of an interrupted run on this machine, code and weights; begins the file where there is none."""
    if kept is None:
        return {}
    from ..demo.models import IMAGE_WEIGHTS, TEXT_WEIGHTS, WEIGHTS

    code = sorted(file for folder in ("benchmarks", "demo", "pipelines") for file in (PACK / folder).rglob("*.py"))
    digest = hashlib.sha256(
        b"".join(file.read_bytes() for file in [*code, WEIGHTS, TEXT_WEIGHTS, IMAGE_WEIGHTS] if file.is_file())
    ).hexdigest()
    made_by = json.dumps([machine(), digest])
    lines = kept.read_text(encoding="utf-8").splitlines() if kept.is_file() else []
    if lines[:1] != [made_by]:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(made_by + "\n", encoding="utf-8")
        return {}
    return dict(json.loads(line) for line in lines[1:])


def summary(values: Iterable[float]) -> dict[str, float]:
    """Mean, standard deviation over clips and number of the values that are numbers."""
    known = [v for v in values if not math.isnan(v)]
    return {
        "mean": fmean(known) if known else math.nan,
        "sd": stdev(known) if len(known) > 1 else math.nan,
        "n": len(known),
    }


def mean_sd(values: Iterable[float], digits: int) -> str:
    """ "12.3 ± 0.4", or a dash where there is no number."""
    stats = summary(values)
    if not stats["n"]:
        return "-"
    spread = f" ± {stats['sd']:.{digits}f}" if stats["n"] > 1 else ""
    return f"{stats['mean']:.{digits}f}{spread}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is left-aligned, the others right-aligned."""
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def lead(clips: int, wanted: int) -> str:
    """A paragraph for a report of fewer clips than a result takes; empty otherwise."""
    return f"\nFewer than {wanted} clips: a lead, not a result.\n" if clips < wanted else ""


def machine() -> str:
    """What a figure of time or of the last digit depends on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return f"Python {platform.python_version()}, torch {torch.__version__}, {device}"


def save(name: str, markdown: str, data: dict[str, Any], folder: Path = RESULTS) -> None:
    """Print the Markdown, and write it and the data to <folder>/<name>.md and .json. NaN becomes null."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(markdown, encoding="utf-8")
    (folder / f"{name}.json").write_text(json.dumps(_plain(data), indent=1) + "\n", encoding="utf-8")
    print(markdown)
    print(f"written to {folder / name}.md and .json", file=sys.stderr)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(held) for key, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(held) for held in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
