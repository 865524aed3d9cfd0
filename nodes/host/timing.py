"""How long the nodes sample, against the host's own Euler through the same guider. For `rewind benchmark cost`."""

from __future__ import annotations

import time
from typing import Any

import comfy.model_management
import comfy.samplers
import comfyui_version
import torch

from ...demo.models import ImageToVideoConfig
from ...pipelines.denoiser import karras_sigmas
from ...pipelines.videoshop.settings import DEFAULT
from . import sampling
from .models import load_demo_models

HOST_EULER = "the host's euler"  # as benchmarks/cost.py names it


def measure(inversion_node: type, denoising_node: type, runs: int, steps: int = 25) -> dict[str, Any]:
    """Seconds and network evaluations of each side, run by run, in turn, so that a busy machine hits all sides alike.

    inversion_node, denoising_node: EDM Inversion and SVD Denoise. A first run of each side is not counted.
    """
    # As the host calls a node: on a copy of its class, with the hidden inputs, of which there are none here.
    invert, denoise = (node.PREPARE_CLASS_CLONE(None).execute for node in (inversion_node, denoising_node))
    config = ImageToVideoConfig()
    model = load_demo_models()[0]
    generator = torch.Generator().manual_seed(0)
    side = config.size // 8
    clip = torch.randn(config.frames, 4, side, side, generator=generator)
    condition = {"concat_latent_image": clip[:1], "fps": 6, "motion_bucket_id": 127, "augmentation_level": 0.02}
    positive = [[torch.randn(1, 1, config.context, generator=generator), condition]]
    sigmas = karras_sigmas(steps).float()
    calls: list[int] = []
    model.model.diffusion_model.register_forward_pre_hook(lambda *_: calls.append(1))

    def host_euler() -> None:
        guider = sampling.guider(model, positive)
        euler = comfy.samplers.sampler_object("euler")
        sampling.sample(guider, euler, sigmas, torch.zeros_like(clip), clip, 0)

    def inversion() -> Any:
        keys = ("guess_above", "guess_below", "threshold")
        options = {key: getattr(DEFAULT, key) for key in keys}
        return invert(model, positive, {"samples": clip}, sigmas, strength=1.0, refine=0, seed=0, **options)

    with torch.inference_mode():
        inverted = inversion().result[3]

        def way_back() -> None:
            denoise(model, positive, positive, inverted, first_guidance=1.0, last_guidance=1.0, denormalize=True)

        sides = {HOST_EULER: host_euler, "EDM Inversion": inversion, "SVD Denoise": way_back}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        evaluations: dict[str, list[int]] = {name: [] for name in sides}
        for run in range(runs + 1):
            for name, sample in sides.items():
                calls.clear()
                started = time.perf_counter()
                sample()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if run:
                    seconds[name].append(time.perf_counter() - started)
                    evaluations[name].append(len(calls))
    return {
        "host": comfyui_version.__version__,
        "torch": torch.__version__,
        "device": str(comfy.model_management.get_torch_device()),
        "runs": runs,
        "steps": steps,
        "seconds": seconds,
        "evaluations": evaluations,
    }
