"""The nodes that keep an edit where it is: the mask of an edit, and what lies outside it put back."""

from __future__ import annotations

from functools import partial
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io
from torch import Tensor

from ..pipelines.evaluation.memory import in_words
from ..pipelines.motion import Flow, Raft, lucas_kanade
from ..pipelines.videoshop.costs import evaluations_in_words, flow_bytes, mask_bytes
from ..pipelines.videoshop.inversion import Inversion
from ..pipelines.videoshop.masks import (
    DEFAULT_MASK,
    MaskSettings,
    StoredSource,
    check_mask,
    composite,
    composite_pixels,
    edit_mask,
)
from ..pipelines.videoshop.parts import parts_of
from .host import costs, sampling
from .host.encoding import as_images, check_images
from .host.noise import IN_PARTS
from .host.schema import ADVANCED, InversionType, OpticalFlowType, Schema
from .preparation import CATEGORY, check_same_shape, region, resized


def _mask_inputs() -> list[io.Input]:
    """How the mask is made."""
    return [
        io.Float.Input(
            "threshold",
            default=DEFAULT_MASK.threshold,
            min=0.0,
            max=0.99,
            step=0.01,
            tooltip="How far a pixel's colour must differ from the source's to count as edited, in 0 to 1. Raise it "
            "where noise or compression of the edited picture counts, lower it where a faint edit does not.",
        ),
        io.Int.Input(
            "grow",
            default=DEFAULT_MASK.grow,
            min=0,
            max=512,
            tooltip="Pixels by which the mask is widened to each side. Raise it for shadows, for an edit that reaches "
            "further in later frames, and where the motion is not quite met; lower it to keep more of the source.",
        ),
        io.Int.Input(
            "feather",
            default=DEFAULT_MASK.feather,
            min=0,
            max=512,
            tooltip="Pixels beyond that over which the mask falls to 0. Raise it where the edge of the edit shows; 0 "
            "ends it hard, and everything outside is the source, to the bit.",
        ),
    ]


def _flow(optical_flow: Any) -> Flow:
    """How motion is estimated: by the host's optical flow model, or without weights where there is none."""
    device = comfy.model_management.get_torch_device()
    if optical_flow is not None:
        comfy.model_management.load_model_gpu(optical_flow)
        return Raft(optical_flow.model)
    if device.type != "cuda":  # others lack some of the operations
        return lucas_kanade
    return lambda frame, other: lucas_kanade(frame.to(device), other.to(device)).to(frame.device)


def _costs_in_words(optical_flow: Any, frames: Tensor, feather: int) -> str:
    """What the mask of a clip [T, 3, H, W] costs; flow without weights is no network's."""
    count, _, height, width = frames.shape
    there, here = flow_bytes(height, width, optical_flow is not None), mask_bytes(count, height, width, feather)
    if optical_flow is None:
        device = comfy.model_management.get_torch_device()
        flow = f"the motion of {count - 1} pair{'s' if count > 2 else ''} of frames"
    else:
        device, flow = optical_flow.load_device, evaluations_in_words(count - 1)
        there += optical_flow.model_size()
    if device.type == "cuda":
        return f"{flow}; at most about {in_words(there)} on {device}; {in_words(here)} of main memory"
    return f"{flow}; at most about {in_words(there + here)} of main memory"


class EditMask(io.ComfyNode):
    """Where a first frame was edited, followed through the clip."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="RewindEditMask",
            display_name="Edit Mask",
            category=CATEGORY,
            description="Makes a mask of where the edited frame differs from the clip's first one, and lets it follow "
            "the clip's motion: one mask a frame, for SVD Denoise and Pixel Composite. The motion is estimated from "
            "the source clip by optical flow that needs no weights.",
            search_aliases=["difference mask", "track mask", "mask propagation", "optical flow", "inpaint mask"],
            inputs=[
                io.Image.Input("clip", tooltip="All frames of the source clip, as Videoshop Conditioning gets them."),
                io.Image.Input("edited_frame", tooltip="The clip's FIRST frame after your edit, one image."),
                *_mask_inputs(),
                io.Mask.Input(
                    "first_mask",
                    optional=True,
                    tooltip="A mask of the first frame, painted or from another node, in the place of the difference; "
                    "threshold then changes nothing. It follows the motion too.",
                ),
                OpticalFlowType.Input(
                    "optical_flow",
                    optional=True,
                    extra_dict=ADVANCED,
                    tooltip="A learned optical flow (RAFT), from Load Optical Flow Model where your ComfyUI has it: "
                    "surer where the motion is large. Without it no weights are needed.",
                ),
            ],
            outputs=[
                io.Mask.Output("mask", tooltip="One mask a frame, 1 where the edit may show: connect to SVD Denoise.")
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        clip: Tensor,
        edited_frame: Tensor,
        threshold: float,
        grow: int,
        feather: int,
        first_mask: Tensor | None = None,
        optical_flow: Any = None,
    ) -> io.NodeOutput:
        height, width = clip.shape[1:3]
        frames, edited = (
            resized(images, width, height, name).movedim(-1, 1).float()
            for images, name in ((clip, "clip"), (edited_frame, "edited_frame"))
        )
        check_same_shape(clip, edited_frame)
        if first_mask is not None:
            first_mask = first_mask.reshape(-1, 1, *first_mask.shape[-2:]).float()
            if len(first_mask) != 1:
                raise ValueError(
                    f"first_mask has {len(first_mask)} masks: connect one, of the clip's first frame; masks of all "
                    "frames go to SVD Denoise as they are"
                )
            first_mask = comfy.utils.common_upscale(first_mask, width, height, "bilinear", "center")[0, 0]
        bar = comfy.utils.ProgressBar(len(frames) - 1)

        def tell(number: int) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(number)

        settings = MaskSettings(threshold, grow, feather)
        costs.tell(cls.hidden.unique_id, "Edit Mask", _costs_in_words(optical_flow, frames, feather))
        return io.NodeOutput(edit_mask(frames, edited[0], settings, _flow(optical_flow), first_mask, tell))


class MaskedSampler(io.ComfyNode):
    """The way back under a mask, as a SAMPLER for the host's own SamplerCustomAdvanced."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="RewindMaskedSampler",
            display_name="Masked Sampler",
            category=CATEGORY,
            description="Plays an inverted clip again under a mask, as a SAMPLER for SamplerCustomAdvanced, on every "
            "model that can be inverted: outside the mask the source's own noise is put back at every step. Give it "
            "the latent and the SIGMAS of the inversion, DisableNoise, and any GUIDER; Source Composite behind it "
            "makes what lies outside equal to the source, to the bit.",
            search_aliases=["inpaint sampler", "masked denoise", "inversion inpainting"],
            inputs=[
                InversionType.Input("inversion", tooltip="From EDM Inversion with Noise Extrapolation."),
                io.Mask.Input(
                    "mask",
                    tooltip="Where the edit may show, best from Edit Mask: one mask a frame, or one for all. A soft "
                    "edge mixes both.",
                ),
            ],
            outputs=[
                io.Sampler.Output(
                    "sampler",
                    tooltip="Connect to SamplerCustomAdvanced; a normalised clip comes out in its own scale.",
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, inversion: Inversion, mask: Tensor) -> io.NodeOutput:
        if (count := len(parts_of(inversion))) > 1:
            raise ValueError(IN_PARTS.format(count))
        masked = region(mask, inversion.latent.shape)
        stored, normalisation = StoredSource(inversion, masked), inversion.normalisation

        def put_back(x: Tensor, sigma: float) -> Tensor:
            if not torch.count_nonzero(x):
                raise ValueError(
                    "the LATENT is empty: connect the latent of the inversion to SamplerCustomAdvanced instead"
                )
            return stored(x, sigma)

        def finish(x: Tensor) -> Tensor:
            x = x if normalisation is None else normalisation.undo(x)
            return composite(x, inversion.source, masked)

        before = partial(costs.tell_sampling, cls.hidden.unique_id, "Masked Sampler", 0)
        return io.NodeOutput(sampling.euler_sampler(finish, put_back, before))


class SourceComposite(io.ComfyNode):
    """The source's latent laid over an edited one, outside a mask."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="RewindSourceComposite",
            display_name="Source Composite",
            category=CATEGORY,
            description="Puts the source's latent back outside a mask, to the bit, and mixes both in a soft edge. A "
            "latent counts as masked where any of its pixels is, in space and in time; Latent Composite Masked looks "
            "at the middle of it alone, and takes no video latents. For pixels there is Pixel Composite.",
            search_aliases=["latent composite", "paste latent", "keep source"],
            inputs=[
                io.Latent.Input("latent", tooltip="The edited clip, for example from SamplerCustomAdvanced."),
                io.Latent.Input("source", tooltip="The VAE-encoded source clip, before any Latent Normalize."),
                io.Mask.Input("mask", tooltip="Where the edit may show: one mask a frame, or one for all."),
            ],
            outputs=[io.Latent.Output("latent", tooltip="Both in one: connect to VAE Decode.")],
        )

    @classmethod
    def execute(cls, latent: dict[str, Any], source: dict[str, Any], mask: Tensor) -> io.NodeOutput:
        edited, original = latent["samples"], source["samples"]
        if edited.shape != original.shape:
            raise ValueError(
                f"the latent has shape {tuple(edited.shape)}, the source {tuple(original.shape)}: connect the latent "
                "of the clip that was edited"
            )
        return io.NodeOutput({**latent, "samples": composite(edited, original, region(mask, edited.shape))})


class PixelComposite(io.ComfyNode):
    """The source's own pixels laid over an edited clip, outside a mask."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="RewindPixelComposite",
            display_name="Pixel Composite",
            category=CATEGORY,
            description="Puts the source's own pixels back outside a mask, to the bit, which a VAE would soften, and "
            "mixes both in a soft edge. Unlike Image Composite Masked it brings the source to the size of the edit, "
            "and takes away the shift of colours that the VAE leaves beside an edit.",
            search_aliases=["image composite", "paste image", "keep source", "colour match"],
            inputs=[
                io.Image.Input("images", tooltip="The edited clip from VAE Decode."),
                io.Image.Input("clip", tooltip="The source clip, as Videoshop Conditioning gets it."),
                io.Mask.Input("mask", tooltip="Where the edit may show: one mask a frame, or one for all."),
                io.Boolean.Input(
                    "match",
                    default=True,
                    tooltip="Shifts the colours of the edit so that just outside the mask they are the source's. On, "
                    "the edge hardly shows; off where the edit changes the light around it on purpose.",
                ),
            ],
            outputs=[io.Image.Output("images", tooltip="Both in one: connect to Create Video.")],
        )

    @classmethod
    def execute(cls, images: Tensor, clip: Tensor, mask: Tensor, match: bool) -> io.NodeOutput:
        check_images(images, "images")
        height, width = images.shape[1:3]
        source, mask = resized(clip, width, height, "clip"), mask.reshape(-1, 1, *mask.shape[-2:]).float()
        if len(source) != len(images):
            raise ValueError(
                f"images has {len(images)} frames, clip {len(source)}: connect the frames that were edited, trimmed "
                "alike"
            )
        check_mask(mask[:, 0], len(images), height, width)
        mask = comfy.utils.common_upscale(mask, width, height, "bilinear", "center")[:, 0]
        edited = images[..., :3].movedim(-1, 1).float()
        mixed = composite_pixels(edited, source.movedim(-1, 1).to(edited), mask.to(edited), match)
        return io.NodeOutput(as_images(mixed))
