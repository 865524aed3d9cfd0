"""Fine-tuning inside the host: in the seat of a sampler, on a copy of the model, outside its inference mode.

The host's guider loads the model and prepares the conditions; `TrainingSampler.sample` gets both and hands denoisers to
`pipelines.dreamix.finetuning`. What a node hands on is the INPUT model with the LoRA as ordinary weight patches.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.samplers
import comfy.sd
import comfyui_version
import folder_paths
import torch
from comfy.ldm.modules.attention import attention_pytorch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ...pipelines.dreamix.finetuning import FineTuning, Subject, Tuned, fine_tune
from ...pipelines.dreamix.lora import to_host
from ...pipelines.dreamix.temporal import architecture
from .encoding import check_images, encode_clip
from .sampling import check_conditioning, check_embeddings, guider, latent_axes, noise_path

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


@dataclass(frozen=True)
class Material:
    """What is trained on: latents in the VAE's space, [T, 4, h, w] or [1, C, T, h, w], and one-frame clips of frames.

    clip is None where alpha is 0, frames where it is 1.
    """

    clip: Tensor | None
    frames: Tensor | None
    token: list  # CONDITIONING


def check_model(model: Any) -> None:
    """ValueError for a MODEL that cannot be tuned: its kind is not known, or no copy can be made to train on."""
    if "force_deepcopy" not in inspect.signature(type(model).clone).parameters:
        raise ValueError(
            f"Dreamix Mixed Fine-Tune needs a ComfyUI that can copy a model (0.33 does), this is "
            f"{comfyui_version.__version__}: update ComfyUI. Every other node of Rewind works as it is"
        )
    network = model.model.diffusion_model
    kind = architecture(network)
    noise_path(model.get_model_object("model_sampling"))
    if (
        kind == "joint"
        and network.patch_embedding.in_channels != model.get_model_object("latent_format").latent_channels
    ):
        raise ValueError("this MODEL is told by a picture what to show: use the text-to-video model of its family")
    if getattr(model, "cached_patcher_init", None) is None:
        raise ValueError("this MODEL cannot be copied, so it cannot be tuned: load it by one of ComfyUI's own loaders")


def check_token(model: Any, token: list) -> None:
    """ValueError unless there is a CONDITIONING for this MODEL."""
    if not token:
        raise ValueError("token is empty: connect the token output of Dreamix Prompt")
    network = model.model.diffusion_model
    width = getattr(network, "text_dim", None) or model.model.model_config.unet_config.get("context_dim")
    check_embeddings(token, "token", width, "CLIP")


def encode(model: Any, vae: Any, images: Tensor, token: list, alpha: float) -> Material:
    """Encode what alpha needs of images [T, H, W, 3 or more] in 0..1, alpha channels dropped.

    Raises ValueError for images or a VAE that cannot be, or a token that was made for another size.
    """
    check_images(images, "images")
    if alpha > 0 and len(images) < 2:
        raise ValueError(
            f"got 1 image, and alpha is {alpha:g}, which learns a motion too: connect a clip of at least 2 frames, or "
            "set alpha to 0"
        )
    pixels = images[..., :3].float().clamp(0, 1).contiguous()  # some ways to resize go a little beyond
    if model.get_model_object("latent_format").latent_dimensions == 2:  # frames are the batch
        clip = frames = encode_clip(vae, pixels)
    else:
        clip = encode_clip(vae, pixels) if alpha > 0 else None
        frames = _one_by_one(vae, pixels) if alpha < 1 else None
    for latents in (clip, frames):
        if latents is not None:
            _check_latents(model, latents)
            check_conditioning(model, token, latents, "token")
    return Material(clip if alpha > 0 else None, frames if alpha < 1 else None, token)


def _one_by_one(vae: Any, pixels: Tensor) -> Tensor:
    """Each picture as a clip of one frame, [M, C, 1, h, w]."""
    latents = []
    for picture in pixels:
        comfy.model_management.throw_exception_if_processing_interrupted()
        latents.append(vae.encode(picture[None]))
    return torch.cat(latents)


def _check_latents(model: Any, latents: Tensor) -> None:
    """ValueError for what the MODEL does not take."""
    dimensions, channels = latent_axes(model)
    if latents.ndim != dimensions or latents.shape[1] != channels:
        raise ValueError(
            f"the VAE gives latents of shape {tuple(latents.shape)}, this MODEL takes {channels} channels in "
            f"{dimensions} axes: connect the VAE that belongs to the MODEL"
        )
    if not torch.isfinite(latents).all():
        raise ValueError("the VAE gives NaN or infinite values: it may need --fp32-vae, or the images are damaged")


class TrainingSampler(comfy.samplers.Sampler):
    """A SAMPLER in whose seat a fine-tuning runs; `tuned` is its result.

    settings, on_step, checkpoints, every: of `fine_tune`.
    """

    def __init__(
        self,
        material: Material,
        settings: FineTuning,
        on_step: Callable[[dict[str, Any]], None],
        checkpoints: Path | None,
        every: int,
    ):
        self.material, self.settings, self.on_step = material, settings, on_step
        self.checkpoints, self.every = checkpoints, every
        self.tuned: Tuned | None = None

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
        model, device = model_wrap.inner_model, noise.device

        def own(latents: Tensor | None) -> Tensor | None:
            # Made outside inference mode: autograd keeps what it computes with.
            return None if latents is None else model.process_latent_in(latents.to(device, torch.float32).clone())

        def denoiser(options: dict[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
            def denoise(x: Tensor, sigma: Tensor) -> Tensor:
                comfy.model_management.throw_exception_if_processing_interrupted()
                return model_wrap(x, sigma, **{**extra_args, "model_options": options})

            return denoise

        options, sampling = extra_args["model_options"], model.model_sampling
        one_by_one = comfy.model_patcher.create_model_options_clone(options)
        kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
        comfy.patcher_extension.add_wrapper_with_key(kind, "rewind", _one_frame_each, one_by_one, is_model_options=True)
        subject = Subject(
            network=model.diffusion_model,
            video=denoiser(options),
            pictures=denoiser(one_by_one),
            clip=own(self.material.clip),
            frames=own(self.material.frames),
            path=noise_path(sampling),
            sigma_range=(float(sampling.sigma_min), float(sampling.sigma_max)),
        )
        self.tuned = fine_tune(subject, self.settings, self.on_step, self.checkpoints, self.every)
        return torch.zeros_like(latent_image)


def _one_frame_each(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """A wrapper around a network: one whose batch is a clip's frames takes every frame for a clip of its own.

    Transformers, whose batch holds clips, are not told a number of frames.
    """
    if "num_video_frames" in kwargs:
        kwargs["num_video_frames"] = 1
    return executor(*args, **kwargs)


@contextmanager
def _training() -> Iterator[None]:
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


def _kept(copy: Any, material: Material, settings: FineTuning) -> float:
    """Bytes that the larger of both losses keeps for the way back.

    Counted in one step on a corner of the latents and carried over by size: attention too needs memory in proportion.
    """
    most = 0.0
    for name, alpha in (("clip", 1.0), ("frames", 0.0)):
        latents = getattr(material, name)
        if latents is None:
            continue
        corner = latents[..., :CORNER, :CORNER]
        if name == "frames":
            corner, count = corner[:CORNER_FRAMES], min(settings.pictures, len(latents))
            size = latents[:count].numel()
        else:
            corner = corner[:CORNER_FRAMES] if corner.ndim == 4 else corner[:, :, :CORNER_FRAMES]
            size = latents.numel()
        part = replace(material, **{"clip": None, "frames": None, name: corner})
        once = replace(settings, steps=1, alpha=alpha, checkpointing=False)
        with Kept(copy.model.diffusion_model) as kept:
            _in_seat(copy, part, once, lambda step: None)
        most = max(most, kept.bytes * size / corner.numel())
    return most


def check_memory(copy: Any, material: Material, settings: FineTuning) -> None:
    """ValueError where training a loaded copy on these latents would not fit into the memory that is free."""
    needed = (RECOMPUTED if settings.checkpointing else KEPT) * _kept(copy, material, settings) + RESERVE
    free = comfy.model_management.get_free_memory(copy.load_device)
    if needed > free:
        help_ = "fewer or smaller frames" + ("" if settings.checkpointing else ", or gradient_checkpointing")
        raise ValueError(
            f"fine-tuning on these frames needs about {needed / 2**30:.1f} GiB beside the model, and "
            f"{free / 2**30:.1f} GiB can be had: use {help_} (memory_check can be turned off)"
        )


def _training_copy(model: Any, precision: str) -> Any:
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


def _in_seat(
    copy: Any,
    material: Material,
    settings: FineTuning,
    on_step: Callable[[dict[str, Any]], None],
    checkpoints: Path | None = None,
    every: int = 1,
) -> Tuned:
    """Run `fine_tune` in the seat of a sampler of the host's guider."""
    sampler = TrainingSampler(material, settings, on_step, checkpoints, every)
    # The conditions are prepared for these latents; where frames are the batch, for all of them.
    seat = material.frames if material.clip is None else material.clip
    seat = (seat if seat.ndim == 4 else seat[:1]).float().clone()
    conditioning = [[_own(embedding), _own(extra)] for embedding, extra in material.token]
    guider(copy, conditioning).sample(
        torch.zeros_like(seat), seat, sampler, torch.tensor([1.0, 0.0]), disable_pbar=True, seed=settings.seed
    )
    return sampler.tuned


def train(
    model: Any,
    material: Material,
    settings: FineTuning,
    on_step: Callable[[dict[str, Any]], None],
    every: int = 25,
    memory_check: bool = True,
) -> Tuned:
    """Fine-tune a copy of a MODEL; the adapters in the host's names. The MODEL itself is not changed.

    on_step, every: of `fine_tune`. memory_check: refuse what would not fit. Raises ValueError for bad input; on Cancel
    what was trained stays in `checkpoint_folder`.
    """
    check_model(model)
    with _training():
        copy = _training_copy(model, settings.precision)
        if memory_check:
            check_memory(copy, material, settings)
        tuned = _in_seat(copy, material, settings, on_step, checkpoint_folder(), every)
    return replace(tuned, lora=to_host(tuned.lora))


def with_lora(model: Any, lora: dict[str, Tensor], strength: float = 1.0) -> Any:
    """The MODEL with a LoRA as weight patches, by the host's own function (as LoraLoaderModelOnly does)."""
    return comfy.sd.load_lora_for_models(model, None, lora, strength, 0)[0]
