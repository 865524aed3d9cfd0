"""The nodes that prepare a clip for Videoshop, and the one that brings its colours home."""

from __future__ import annotations

from typing import Any

import comfy.latent_formats
import comfy.utils
import torch
from comfy_api.latest import io
from torch import Tensor

from ..pipelines.evaluation.memory import in_words
from ..pipelines.videoshop.latents import NORMALISATIONS, augment, normalise, rescale, whiten_condition
from ..pipelines.videoshop.masks import latent_mask
from ..pipelines.videoshop.settings import DEFAULT
from .host import checks, costs
from .host.encoding import check_images, encoding_bytes, is_video_vae
from .host.schema import ADVANCED, Schema

CATEGORY = "Rewind/Videoshop"
NORMALISATION = "rewind_normalisation"  # the key under which a LATENT carries how it was normalised
ORIGINAL = "rewind_original"  # and what it was before


def resized(images: Tensor, width: int, height: int, name: str) -> Tensor:
    """Images [n, H, W, 3 or 4] as [n, height, width, 3], the way the host's own node does it: alpha dropped, bilinear,
    cropped around the centre. Raises ValueError for what is not a batch of finite images."""
    check_images(images, name)
    # Contiguous, so that a clip with alpha gives the very same numbers as one without.
    pixels = images[..., :3].contiguous().movedim(-1, 1)
    return comfy.utils.common_upscale(pixels, width, height, "bilinear", "center").movedim(1, -1)


def check_same_shape(clip: Tensor, edited_frame: Tensor) -> None:
    """ValueError where the edited frame cannot be the clip's first frame."""
    if edited_frame.shape[0] != 1:
        raise ValueError(
            f"edited_frame has {edited_frame.shape[0]} images: connect one, the edited first frame of the clip"
        )
    (h, w), (height, width) = edited_frame.shape[1:3], clip.shape[1:3]
    if abs(w * height - width * h) > 0.02 * width * h:
        raise ValueError(
            f"edited_frame is {w} x {h}, the clip {width} x {height}: the proportions differ, so the edit would not "
            "lie over the clip; crop or pad the edited frame to the clip's proportions"
        )


def region(mask: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """A MASK [H, W] or [n, H, W] as a mask of latents of a shape, see `latent_mask`; None for none."""
    return None if mask is None else latent_mask(mask.reshape(-1, *mask.shape[-2:]).float().cpu(), shape)


def _size_inputs() -> list[io.Input]:
    return [
        io.Int.Input(
            "width",
            default=1024,
            min=64,
            max=8192,
            step=8,
            tooltip="Width at which the model works. Larger keeps more detail and takes more memory and "
            "time; far from 1024 Stable Video Diffusion draws worse, hence the default.",
        ),
        io.Int.Input(
            "height",
            default=576,
            min=64,
            max=8192,
            step=8,
            tooltip="Height at which the model works. Keep the clip's proportions, or its sides are cropped; "
            "576 is what Stable Video Diffusion was trained on.",
        ),
    ]


def _model_inputs() -> list[io.Input]:
    """What the model is told of the clip."""
    return [
        io.Int.Input(
            "fps",
            default=DEFAULT.fps,
            min=1,
            max=120,
            tooltip="Frames a second the model believes in: higher makes it expect smaller steps of motion. "
            "It was trained on clips of about 7, whatever the clip's own rate.",
        ),
        io.Int.Input(
            "motion_bucket_id",
            default=DEFAULT.motion_bucket,
            min=1,
            max=1023,
            tooltip="How much motion the model expects: raise it for lively clips, lower it for calm ones. "
            "The motion itself comes from the inversion, so the middle value is a safe default.",
        ),
        io.Float.Input(
            "augmentation_level",
            default=DEFAULT.augmentation,
            min=0.0,
            max=10.0,
            step=0.01,
            tooltip="Noise on the first frame, in the model's own pixel range -1 to 1. Higher binds the "
            "result less to the frame; 0 binds it most. The default is the model's own; the paper's code "
            "uses 0.2.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=True,
            tooltip="Draws the augmentation noise, the same one for both pairs. Any value is as good as "
            "another; without augmentation it changes nothing.",
        ),
        io.Boolean.Input(
            "whitened_condition",
            default=DEFAULT.normalise_condition,
            optional=True,
            extra_dict=ADVANCED,
            tooltip="On, the source frame's latent is whitened as in the paper's released code, in the "
            "source pair alone; the two pairs then no longer match. Off, they differ by the edit alone.",
        ),
    ]


class VideoshopConditioning(io.ComfyNode):
    """Both pairs of conditions, and the latents of the clip and of the edited frame."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="RewindVideoshopConditioning",
            display_name="Videoshop Conditioning",
            category=CATEGORY,
            description="Prepares a clip and its edited first frame for Stable Video Diffusion: one pair of "
            "conditionings for the inversion (the clip's own first frame), one for the way back (the edited frame), "
            "both with the SAME seeded augmentation noise, so that they differ by the edit alone.",
            search_aliases=["SVD", "img2vid", "first frame edit", "video edit"],
            inputs=[
                io.ClipVision.Input("clip_vision", tooltip="The image encoder from the loader of the MODEL."),
                io.Vae.Input("vae", tooltip="The VAE from the loader of the MODEL."),
                io.Image.Input(
                    "clip",
                    tooltip="All frames of the source clip. The more frames, the more memory; use as many as the "
                    "model was trained on (14 or 25 for the released models, 8 for the embedded one); for longer "
                    "clips set frames_at_once of EDM Inversion.",
                ),
                io.Image.Input(
                    "edited_frame",
                    tooltip="The clip's FIRST frame after your edit, one image of the clip's proportions. Change "
                    "only what is to change: the nearer the rest is to the source, the better the edit follows.",
                ),
                *_size_inputs(),
                *_model_inputs(),
            ],
            outputs=[
                io.Conditioning.Output(
                    "source_positive", tooltip="The source's first frame: connect to the inversion."
                ),
                io.Conditioning.Output(
                    "source_negative", tooltip="Its empty counterpart, for an inversion with cfg above 1."
                ),
                io.Conditioning.Output("edited_positive", tooltip="The edited frame: connect to SVD Denoise."),
                io.Conditioning.Output("edited_negative", tooltip="Its empty counterpart: connect to SVD Denoise."),
                io.Latent.Output("source_latent", tooltip="The clip, one latent a frame: connect to Latent Normalize."),
                io.Latent.Output("edited_latent", tooltip="The edited frame: the reference of Latent Rescale."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        clip_vision: Any,
        vae: Any,
        clip: Tensor,
        edited_frame: Tensor,
        width: int,
        height: int,
        fps: int,
        motion_bucket_id: int,
        augmentation_level: float,
        seed: int,
        whitened_condition: bool = DEFAULT.normalise_condition,
    ) -> io.NodeOutput:
        frames, edited = resized(clip, width, height, "clip"), resized(edited_frame, width, height, "edited_frame")
        check_same_shape(clip, edited_frame)
        if len(frames) < 2:
            raise ValueError("the clip has 1 frame: connect all frames of the clip, at least 2")
        if is_video_vae(vae):
            raise ValueError(
                "this VAE takes a clip as a whole, as those of Wan do: connect that of Stable Video Diffusion, which "
                "comes with its MODEL from Image Only Checkpoint Loader (img2vid model)"
            )
        ids = {"motion_bucket_id": motion_bucket_id, "fps": fps, "augmentation_level": augmentation_level}
        noise = torch.randn(edited.shape, generator=torch.Generator().manual_seed(seed)).to(edited.device)
        size = encoding_bytes(vae, frames)
        each, most = in_words(size), in_words(len(frames) * size)
        costs.tell(
            cls.hidden.unique_id,
            "Videoshop Conditioning",
            f"{len(frames) + 3} frames through the VAE (the clip, its first frame, and the edited one twice; two of "
            f"them through CLIP Vision too); about {each} a frame, at most {most} on {vae.device} (as ComfyUI reckons, "
            "which encodes as many at once as it has room for)",
        )

        def pair(image: Tensor, original: Tensor, whiten: bool) -> tuple[list, list]:
            embedding = clip_vision.encode_image(original[..., :3]).image_embeds.unsqueeze(0)
            noisy = (augment(2 * image - 1, augmentation_level, noise) + 1) / 2
            latent = vae.encode(noisy)
            if whiten:
                latent = whiten_condition(latent, comfy.latent_formats.SD15().scale_factor)
            positive = [[embedding, {**ids, "concat_latent_image": latent}]]
            negative = [[torch.zeros_like(embedding), {**ids, "concat_latent_image": torch.zeros_like(latent)}]]
            return positive, negative

        return io.NodeOutput(
            *pair(frames[:1], clip[:1], whitened_condition),
            *pair(edited, edited_frame, False),
            {"samples": vae.encode(frames)},
            {"samples": vae.encode(edited)},
        )


class LatentNormalize(io.ComfyNode):
    """A clip's latent in the spread that the model was made for."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="RewindLatentNormalize",
            display_name="Latent Normalize",
            category=CATEGORY,
            description="Brings a clip's latent to unit spread in the MODEL's own space before an inversion "
            "(Videoshop). How it was done travels on in the LATENT and the inversion, so that SVD Denoise can undo "
            "it.",
            search_aliases=["whiten latent", "latent std", "standardize latent"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The MODEL in whose latent space the spread is measured; it is not changed."
                ),
                io.Latent.Input("latent", tooltip="The VAE-encoded clip."),
                io.Combo.Input(
                    "kind",
                    options=list(NORMALISATIONS),
                    default=DEFAULT.normalise,
                    tooltip='"channel" divides each channel by its spread over all frames (the paper); "frame" '
                    'centres and scales each frame as a whole (the paper\'s released code); "off" changes nothing. '
                    "On the embedded model normalising helps a change of colour, together with Latent Rescale at 1, "
                    "and costs all other edits: hence the default.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="1 normalises fully, as in the paper; lower goes part of the way; 0 hands the latent on "
                    "unchanged.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="The mask of SVD Denoise, if it has one: the spread is then measured inside it, where the "
                    "edit is. Without it the whole clip counts.",
                ),
            ],
            outputs=[
                io.Latent.Output("normalized", tooltip="The normalised latent: connect to an inversion, not to a VAE.")
            ],
        )

    @classmethod
    def execute(
        cls, model: Any, latent: dict[str, Any], kind: str, strength: float, mask: Tensor | None = None
    ) -> io.NodeOutput:
        samples = checks.check_latent(model, latent)
        if latent.get(NORMALISATION) is not None:
            raise ValueError(
                "this LATENT is normalised already: connect the VAE-encoded clip, and one Latent Normalize"
            )
        clean = model.model.process_latent_in(samples)
        normalised, normalisation = normalise(clean, kind, strength, mask=region(mask, samples.shape))
        if normalisation is None:
            return io.NodeOutput({**latent, "samples": samples})
        normalised = model.model.process_latent_out(normalised)
        return io.NodeOutput({**latent, "samples": normalised, NORMALISATION: normalisation, ORIGINAL: samples})


class LatentRescale(io.ComfyNode):
    """A clip's latent in the colours and contrast of the edited frame."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="RewindLatentRescale",
            display_name="Latent Rescale",
            category=CATEGORY,
            description="Gives the whole clip, channel by channel, the mean and spread that its first frame should "
            "have: those of the edited frame (Videoshop). It takes away the shift of colours that an edit by "
            "inversion leaves.",
            search_aliases=["latent adain", "color match", "colour match"],
            inputs=[
                io.Latent.Input("latent", tooltip="The denoised clip."),
                io.Latent.Input(
                    "reference", tooltip="The latent of the edited first frame, from Videoshop Conditioning."
                ),
                io.Float.Input(
                    "strength",
                    default=DEFAULT.rescale,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="1 matches the edited frame fully, as in the paper; lower matches less; 0 changes "
                    "nothing. On the embedded model it makes hardly a difference, hence the default; raise it where "
                    "colours have shifted.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="The mask of SVD Denoise, if it has one: mean and spread are then those inside it, and "
                    "what lies outside stays as it is, to the bit. Without it everything is changed.",
                ),
            ],
            outputs=[
                io.Latent.Output("rescaled", tooltip="The clip with the reference's statistics: connect to VAE Decode.")
            ],
        )

    @classmethod
    def execute(
        cls, latent: dict[str, Any], reference: dict[str, Any], strength: float, mask: Tensor | None = None
    ) -> io.NodeOutput:
        samples = latent["samples"]
        rescaled = rescale(samples, reference["samples"], strength, mask=region(mask, samples.shape))
        return io.NodeOutput({**latent, "samples": rescaled})
