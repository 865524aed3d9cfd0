"""The node of Videoshop (arXiv 2403.14617) that plays an inverted clip again, from its edited first frame."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..pipelines.videoshop.inversion import Inversion
from ..pipelines.videoshop.parts import Part, guidance_of, parts_of
from ..pipelines.videoshop.settings import DEFAULT
from .host import checks, costs, parts, sampling
from .host.schema import ADVANCED, InversionType, Schema
from .preparation import CATEGORY, region


def _interval_inputs() -> list[io.Input]:
    return [
        io.Float.Input(
            "guidance_from",
            default=0.0,
            min=0.0,
            max=1000.0,
            step=0.01,
            optional=True,
            extra_dict=ADVANCED,
            tooltip="Lowest sigma at which guidance applies. Raised, the last steps go without and cost "
            "half; 0 guides to the end.",
        ),
        io.Float.Input(
            "guidance_to",
            default=1000.0,
            min=0.0,
            max=1000.0,
            step=0.01,
            optional=True,
            extra_dict=ADVANCED,
            tooltip="Highest sigma at which guidance applies. Lowered, the first steps go without and cost "
            "half; the default is above every noise level.",
        ),
    ]


def _mask_input() -> io.Input:
    return io.Mask.Input(
        "mask",
        optional=True,
        tooltip="Where the edit may show, best from Edit Mask: one mask a frame, or one for all. Outside it the "
        "source's own noise is put back at every step, and in the end the source's latent itself, to the bit; a soft "
        "edge mixes both. Without it the whole clip is played anew.",
    )


class SVDDenoise(io.ComfyNode):
    """An inverted clip played again with the edited first frame."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="RewindSVDDenoise",
            display_name="SVD Denoise",
            category=CATEGORY,
            description="Plays an inverted clip again with the edited first frame as the condition, by the sampler "
            "and on the noise levels that belong to the inversion. Guidance runs linearly from the first frame to "
            "the last; it replaces a guidance function (VideoLinearCFGGuidance) on the MODEL.",
            search_aliases=["videoshop", "img2vid", "video edit"],
            inputs=[
                io.Model.Input("model", tooltip="The Stable Video Diffusion MODEL that made the inversion."),
                io.Conditioning.Input("positive", tooltip="edited_positive of Videoshop Conditioning."),
                io.Conditioning.Input("negative", tooltip="edited_negative of Videoshop Conditioning."),
                InversionType.Input("inversion", tooltip="From EDM Inversion with Noise Extrapolation."),
                io.Float.Input(
                    "first_guidance",
                    default=DEFAULT.first_guidance,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Guidance on the first frame. Higher follows the edited frame more firmly, too high "
                    "gives hard edges and colours; 1 is none and, on both frames, halves the time.",
                ),
                io.Float.Input(
                    "last_guidance",
                    default=DEFAULT.last_guidance,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Guidance on the last frame, where the edit fades most: raise it if the edit is lost on "
                    "the way, lower it if the motion is. The default edits the validation clips of the embedded "
                    "model best.",
                ),
                io.Boolean.Input(
                    "denormalize",
                    default=DEFAULT.denormalise,
                    tooltip="Undoes Latent Normalize at the end. On unless Latent Rescale is to do all of it, as in "
                    "the paper's released code; without a Latent Normalize it changes nothing.",
                ),
                *_interval_inputs(),
                _mask_input(),
            ],
            outputs=[io.Latent.Output("latent", tooltip="The edited clip: connect to Latent Rescale.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: list,
        negative: list,
        inversion: Inversion,
        first_guidance: float,
        last_guidance: float,
        denormalize: bool,
        guidance_from: float = 0.0,
        guidance_to: float = 1000.0,
        mask: Tensor | None = None,
    ) -> io.NodeOutput:
        if not checks.is_svd(model):
            raise ValueError(
                f"this MODEL is {type(model.model).__name__}, not Stable Video Diffusion: for other models connect "
                "the NOISE of the inversion to SamplerCustomAdvanced"
            )
        if guidance_from > guidance_to:
            raise ValueError(f"guidance_from ({guidance_from:g}) is above guidance_to ({guidance_to:g}): swap them")
        samples = sampling.state_of(model, inversion)
        checks.check_conditioning(model, positive, samples, "positive")
        checks.check_conditioning(model, negative, samples, "negative")
        masked = region(mask, samples.shape)
        if masked is not None and inversion.original is None:
            raise ValueError("the inversion does not hold the source's latent, which the mask is to keep: make it anew")
        found, interval = parts_of(inversion), (guidance_from, guidance_to)

        def make_guider(told: list, part: Part) -> sampling.FrameGuider:
            guider = sampling.FrameGuider(model)
            guider.set_conds(told, negative)
            guider.set_guidance(*guidance_of(first_guidance, last_guidance, part, len(samples)), interval)
            return guider

        costs.tell_way_back(
            cls.hidden.unique_id,
            "SVD Denoise",
            make_guider(positive, found[0]),
            samples,
            inversion.sigmas,
            first_guidance,
            last_guidance,
            interval,
            found=found,
        )
        result = parts.play(model, inversion, positive, make_guider, undo=denormalize, region=masked)
        return io.NodeOutput({"samples": result})
