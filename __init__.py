"""Rewind: video editing with diffusion models for ComfyUI. Rewind a clip to noise, change one frame, play it again."""

from __future__ import annotations

import logging
import re
import sys

MINIMUM_HOST = (0, 7, 0)
WEB_DIRECTORY = "./web"

logger = logging.getLogger(__name__)


def _host_version() -> str:
    """The version of the ComfyUI that is running; empty where there is none, or one too old to say."""
    return getattr(sys.modules.get("comfyui_version"), "__version__", "")


def _host_is_too_old() -> bool:
    numbers = tuple(int(part) for part in re.findall(r"\d+", _host_version())[:3])
    return bool(numbers) and numbers < MINIMUM_HOST


if _host_is_too_old():
    logger.error(
        "Rewind needs ComfyUI %s or newer, this is %s: update ComfyUI. None of its nodes were loaded.",
        ".".join(map(str, MINIMUM_HOST)),
        _host_version(),
    )


async def comfy_entrypoint():
    """What ComfyUI calls to get the nodes."""
    from comfy_api.latest import ComfyExtension

    class Rewind(ComfyExtension):
        async def get_node_list(self) -> list:
            return [] if _host_is_too_old() else _nodes()

    return Rewind()


def _nodes() -> list[type]:
    from .nodes import (
        decoding,
        demo,
        denoising,
        dreamix,
        ei2,
        ei2_weights,
        finetuning,
        inspection,
        inversions,
        masks,
        preparation,
        videoshop,
    )

    return [
        preparation.VideoshopConditioning,
        preparation.LatentNormalize,
        videoshop.EDMInversion,
        videoshop.EDMInversionSampler,
        denoising.SVDDenoise,
        preparation.LatentRescale,
        decoding.ChunkedDecode,
        masks.EditMask,
        masks.MaskedSampler,
        masks.SourceComposite,
        masks.PixelComposite,
        inversions.SaveInversion,
        inversions.LoadInversion,
        inspection.RoundTripCheck,
        inspection.TrajectoryPlot,
        dreamix.DreamixPreset,
        dreamix.DreamixPrompt,
        dreamix.DreamixCorrupt,
        dreamix.DreamixCoarseVideo,
        finetuning.DreamixFineTune,
        ei2.EI2TemporalPatch,
        ei2.EI2OneShotTune,
        ei2_weights.EI2LoadWeights,
        ei2_weights.EI2SaveWeights,
        ei2.CovariateShiftProbe,
        demo.DemoImageToVideo,
        demo.DemoTextToVideo,
        demo.DemoTextToImage,
        demo.DemoClip,
        demo.DemoTextEdit,
    ]
