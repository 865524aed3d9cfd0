"""What a step of fine-tuning costs beside the host's own Train LoRA. For `rewind benchmark dreamix`."""

from __future__ import annotations

import time
from typing import Any

import comfy.model_management
import comfy.utils
import comfyui_version
import torch
from torch import Tensor

from ...demo.text_edits import TOKEN, text_example
from ...pipelines.dreamix.finetuning import FineTuning
from ...pipelines.evaluation.memory import held_memory, peak_memory
from .encoding import as_images
from .mixed_training import Material, train
from .models import load_demo_text_models


def measure(alpha: float | None, checkpointing: bool, steps: int) -> dict[str, Any]:
    """Seconds of each step but the first, and the peak above the memory held before, of one way in its own process.

    alpha: of our fine-tuning; None is the host's Train LoRA. All train a LoRA of one rank on the embedded model, in
    float32, on one batch of a clip's 8 latents; ours with alpha below 1 on its 8 frames besides. The host's own LoRA is
    on every layer, ours on the attention.
    """
    model, clip, vae = load_demo_text_models()
    with torch.inference_mode():  # as the host runs its nodes: what they hand on carries no graph
        latents = vae.encode(as_images(text_example(0).source))
        token = clip.encode_from_tokens_scheduled(clip.tokenize(TOKEN))
    comfy.model_management.load_models_gpu([model])
    times: list[float] = []
    before = held_memory()
    if alpha is None:
        comfy.utils.set_progress_bar_global_hook(lambda *_, **__: times.append(time.perf_counter()))
        _train_lora(model, latents, token, checkpointing, steps)
    else:
        material = Material(latents if alpha > 0 else None, latents if alpha < 1 else None, token)
        settings = FineTuning(steps=steps, alpha=alpha, checkpointing=checkpointing)
        train(model, material, settings, lambda _: times.append(time.perf_counter()), every=steps + 1)
    return {
        "host": comfyui_version.__version__,
        "torch": torch.__version__,
        "device": str(comfy.model_management.get_torch_device()),
        "seconds": [later - earlier for earlier, later in zip(times, times[1:])],
        "peak_mib": peak_memory() - before,
    }


def _train_lora(model: Any, latents: Tensor, token: list, checkpointing: bool, steps: int) -> None:
    """The host's node with its own defaults, but in float32, with our rank, and all latents in a step."""
    from comfy_extras.nodes_train import TrainLoraNode

    schema = TrainLoraNode.define_schema()
    values = {field.id: getattr(field, "default", None) for field in schema.inputs}
    values |= {"model": model, "batch_size": len(latents), "steps": steps, "rank": FineTuning().rank}
    values |= {"training_dtype": "fp32", "lora_dtype": "fp32", "gradient_checkpointing": checkpointing}
    given = {name: [value] for name, value in values.items()}
    TrainLoraNode.execute(**given | {"latents": [{"samples": latents}], "positive": [token]})
