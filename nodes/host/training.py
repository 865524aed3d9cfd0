"""Training inside the host: in the seat of a sampler, on a copy of the model, outside its inference mode.

The host's guider loads the model and prepares the conditions; `Seat.sample` gets both and calls what trains. What a
node hands on is the INPUT model with what was learnt as ordinary patches. Which losses are trained is for
`mixed_training.py` (Dreamix) and `one_shot.py` (EI²) to say.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.samplers
import comfyui_version
import folder_paths
import torch
from comfy.ldm.modules.attention import attention_pytorch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ...pipelines.evaluation.memory import in_words
from .checks import latent_axes
from .sampling import guider

# Peak of memory in training: so many times what autograd would keep of one loss without checkpointing (`Kept`), and a
# reserve. Measured as growth of the process on a CPU in float32, not on a GPU. On the embedded network at 16 x 24 x 24
# latents 1.31 without and 0.67 with checkpointing (0.80 and 0.19 where the allocator hands back at once what is free);
# at 8 x 12 x 12, and on 8 random blocks of Wan's class, 2.2 to 2.5, all of them less than 320 MiB above what is kept.
# What the host reckons for sampling is no unit for this, as it does not know of depth: the same is 0.6 to 5.6 in it.
KEPT, RECOMPUTED, RESERVE = 1.6, 0.8, 2**29
CORNER, CORNER_FRAMES = 16, 4  # of the latents on which that is counted
# What would mix the positive side with a negative one that training does not have.
GUIDANCE = (
    "sampler_cfg_function",
    "sampler_pre_cfg_function",
    "sampler_post_cfg_function",
    "disable_cfg1_optimization",
)


def check_copyable(model: Any, node: str) -> None:
    """ValueError where no copy of a MODEL can be made to train on. node: who asks."""
    if "force_deepcopy" not in inspect.signature(type(model).clone).parameters:
        raise ValueError(
            f"{node} needs a ComfyUI that can copy a model (0.33 does), this is "
            f"{comfyui_version.__version__}: update ComfyUI. Every other node of Rewind works as it is"
        )
    if getattr(model, "cached_patcher_init", None) is None:
        raise ValueError("this MODEL cannot be copied, so it cannot be tuned: load it by one of ComfyUI's own loaders")


def check_latents(model: Any, latents: Tensor) -> None:
    """ValueError for what the MODEL does not take."""
    dimensions, channels = latent_axes(model)
    if latents.ndim != dimensions or latents.shape[1] != channels:
        raise ValueError(
            f"the VAE gives latents of shape {tuple(latents.shape)}, this MODEL takes {channels} channels in "
            f"{dimensions} axes: connect the VAE that belongs to the MODEL"
        )
    if not torch.isfinite(latents).all():
        raise ValueError("the VAE gives NaN or infinite values: it may need --fp32-vae, or the images are damaged")


# Called with what the host's guider hands to a sampler: (model_wrap, its extra_args, the device).
Training = Callable[[Any, dict[str, Any], torch.device], Any]


class Seat(comfy.samplers.Sampler):
    """A SAMPLER in whose seat a training runs; `result` is what it returns."""

    def __init__(self, function: Training):
        self.function, self.result = function, None

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        latent_image: Tensor,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        self.result = self.function(model_wrap, extra_args, noise.device)
        return torch.zeros_like(latent_image)


def in_seat(copy: Any, conditioning: list, seat: Tensor, seed: int, function: Training) -> Any:
    """Run a training under a CONDITIONING in the seat of a sampler of the host's guider; what it returns.

    seat: latents for which the conditions are prepared; where frames are the batch, all of them.
    """
    sampler = Seat(function)
    latents = seat.float().clone()
    conditioning = [[_own(embedding), _own(extra)] for embedding, extra in conditioning]
    guider(copy, conditioning).sample(
        torch.zeros_like(latents), latents, sampler, torch.tensor([1.0, 0.0]), disable_pbar=True, seed=seed
    )
    return sampler.result


def own_latents(model: Any, latents: Tensor, device: torch.device) -> Tensor:
    """Latents in model space on a device, made outside inference mode: autograd keeps what it computes with."""
    return model.process_latent_in(latents.to(device, torch.float32).clone())


def denoiser(
    model_wrap: Any, extra_args: dict[str, Any], options: dict[str, Any]
) -> Callable[[Tensor, Tensor], Tensor]:
    """A denoiser of `pipelines` under model options; Cancel ends it."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        return model_wrap(x, sigma, **{**extra_args, "model_options": options})

    return denoise


@contextmanager
def training_mode() -> Iterator[None]:
    """Outside inference mode, with gradients, and with the host told so (some of its models then work out of place)."""
    flag = hasattr(comfy.model_management, "in_training")
    with torch.inference_mode(False), torch.enable_grad():
        if flag:
            comfy.model_management.in_training = True
        try:
            yield
        finally:
            if flag:
                comfy.model_management.in_training = False


def _own(value: Any) -> Any:
    """A copy in which no tensor was made in inference mode."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _own(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_own(item) for item in value)
    return value


def precision_of(model: Any, wanted: str) -> str:
    """The precision that "auto" stands for: float32 where the model is computed in it, else bfloat16."""
    if wanted != "auto":
        return wanted
    dtype = model.model.manual_cast_dtype or model.model.get_dtype()
    return "float32" if dtype == torch.float32 else "bfloat16"


def checkpoint_folder() -> Path:
    """Where runs that were ended early lie."""
    return Path(folder_paths.get_user_directory()) / "rewind"


class Kept:
    """Inside, counts the bytes that autograd keeps for the way back, weights left out. Every storage counts once."""

    def __init__(self, network: torch.nn.Module):
        self.weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
        self.storages: dict[int, int] = {}
        self.hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    def __enter__(self) -> Kept:
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)

    @property
    def bytes(self) -> int:
        """What was kept."""
        return sum(size for pointer, size in self.storages.items() if pointer not in self.weights)


def training_bytes(kept: float, checkpointing: bool) -> float:
    """What training takes beside the model. kept: bytes that autograd keeps of one loss without checkpointing."""
    return (RECOMPUTED if checkpointing else KEPT) * kept + RESERVE


def tell_training(
    say: Callable[[str], None], copy: Any, passes: int, kept: float | None, checkpointing: bool = False
) -> None:
    """Say what training a loaded copy costs, before it starts; ValueError where it would not fit into free memory.

    passes: of the network there and back. kept: as in `training_bytes`, None where nobody counted it.
    """
    text, weights = f"{passes} passes of the network there and back", copy.model_size()
    if kept is None:
        say(f"{text}; memory beside {in_words(weights)} of weights is not estimated, memory_check is off")
        return
    needed, free = training_bytes(kept, checkpointing), comfy.model_management.get_free_memory(copy.load_device)
    say(
        f"{text}; at most about {in_words(weights + needed)} on {copy.load_device} ({in_words(weights)} of weights and "
        f"{in_words(needed)} to train, by one step on a corner of the frames)"
    )
    if needed > free:
        help_ = "fewer or smaller frames" + ("" if checkpointing else ", or gradient_checkpointing")
        raise ValueError(
            f"fine-tuning on these frames needs about {needed / 2**30:.1f} GiB beside the model, and "
            f"{free / 2**30:.1f} GiB can be had: use {help_} (memory_check can be turned off)"
        )


def training_copy(model: Any, precision: str) -> Any:
    """A loaded copy of a MODEL with its patches, without guidance, frozen."""
    # Not the host's dynamic memory, in which weights may lie elsewhere than where they are used.
    copy = model.clone(disable_dynamic=True, force_deepcopy=True)
    copy.set_model_compute_dtype({"float32": torch.float32, "bfloat16": torch.bfloat16}[precision])
    for name in GUIDANCE:
        copy.model_options.pop(name, None)
    # Kernels that the host may have been started with (sage and others) have no way back.
    copy.model_options["transformer_options"]["optimized_attention_override"] = _attention
    copy.model.requires_grad_(False)
    comfy.model_management.load_models_gpu([copy], memory_required=1e20, force_full_load=True)
    return copy


def _attention(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """PyTorch's own attention, whatever the host has chosen."""
    return attention_pytorch(*args, **kwargs)
