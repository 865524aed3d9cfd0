"""What the nodes cost in a real ComfyUI: their sampling time against the host's own Euler through the same guider."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from . import runner
from .runner import PACK

HOST_EULER = "the host's euler"
# Runs in the host's interpreter, from the host's folder; argv is the pack's folder and what the part put in asks
# for. Loads the pack as the host would, then prints what that part has `found`, as JSON.
SCRIPT = """
import importlib, importlib.util, json, sys
pack, *given = sys.argv[1:]
sys.argv = sys.argv[:1]
sys.path.insert(0, "")
from comfy.cli_args import args
import torch
args.cpu = not torch.cuda.is_available()
spec = importlib.util.spec_from_file_location("rewind_timed", pack + "/__init__.py", submodule_search_locations=[pack])
sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[spec.name])
{}
print("RESULT" + json.dumps(found))
"""
SAMPLING = """
inversion = importlib.import_module("rewind_timed.nodes.videoshop")
denoising = importlib.import_module("rewind_timed.nodes.denoising")
timing = importlib.import_module("rewind_timed.nodes.host.timing")
found = timing.measure(inversion.EDMInversion, denoising.SVDDenoise, int(given[0]))
"""


def host_folder() -> Path:
    """The first ComfyUI in COMFYUI_PATH, or the default one. Raises FileNotFoundError where there is none."""
    first = os.environ.get("COMFYUI_PATH", "~/comfy/ComfyUI").split(os.pathsep)[0]
    host = Path(first).expanduser()
    if not (host / "comfy" / "samplers.py").is_file():
        raise FileNotFoundError(f"there is no ComfyUI at {host}: set COMFYUI_PATH to its folder")
    return host


def interpreter(host: Path) -> Path:
    """The Python that runs the host: of an environment in its folder, or one that the tests made for it, or ours."""
    candidates = [host / name / "bin" / "python" for name in (".venv", "venv")]
    candidates += sorted(PACK.glob(f".venvs/{host.resolve().name}-{'[0-9a-f]' * 8}/bin/python"))
    return next((path for path in candidates if path.is_file()), Path(sys.executable))


def in_host(part: str, given: list[str], python: Path | None = None) -> dict[str, Any]:
    """What a part of SCRIPT finds in the host's own interpreter, by default `interpreter(host_folder())`.

    Raises FileNotFoundError without a host or its interpreter; ValueError if the host fails.
    """
    host = host_folder()
    python = (python or interpreter(host)).absolute()  # the host runs in its own folder
    if not python.is_file():
        raise FileNotFoundError(f"there is no interpreter at {python}: --python names the one that the host runs in")
    command = [str(python), "-c", SCRIPT.replace("{}", part), str(PACK), *given]
    done = subprocess.run(command, cwd=host, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ValueError(f"{command[0]} cannot run ComfyUI at {host}: {last} (--python names another interpreter)")
    return json.loads(lines[-1].removeprefix("RESULT"))


def report(result: dict[str, Any]) -> str:
    """The table as Markdown."""
    rows, base = [], median(result["seconds"][HOST_EULER])
    for side, seconds in result["seconds"].items():
        low, _, high = quantiles(seconds, n=4)
        calls = sorted(set(result["evaluations"][side]))
        extra = "" if side == HOST_EULER else f"{sum(calls) / len(calls) - result['steps']:+g}"
        share = f"{median(seconds) / base - 1:+.1%}"
        rows.append([side, f"{median(seconds):.3f}", f"{low:.3f} to {high:.3f}", share, f"{calls}", extra])
    header = ["", "median, s", "quartiles, s", "against euler", "network evaluations", "beyond one a step"]
    return (
        f"# Cost in ComfyUI {result['host']}\n\n{result['runs']} interleaved runs of {result['steps']} steps on the "
        f"embedded model, `rewind benchmark cost`; torch {result['torch']}, {result['device']}.\n\n"
        + runner.table(header, rows)
    )


def main(python: Path | None = None, runs: int = 7, output: Path = runner.RESULTS) -> dict[str, Any]:
    """Measure, print and save.

    Raises FileNotFoundError without a host or its interpreter; ValueError for too few runs, or if the host fails.
    """
    if runs < 7:
        raise ValueError(f"got --runs {runs}; a median and its spread need at least 7")
    result = in_host(SAMPLING, [str(runs)], python)
    runner.save("cost", report(result), result, output)
    return result
