"""The pictures of the help pages of what is kept for other edits, and of what is decoded in chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from help_studio import SIZE, Studio

PRECISIONS = ("float16", "bfloat16")
KINDS = ("recolour", "background", "resize")  # of edits with one inversion
FRAMES, CHUNK, CLIP_SEED = 32, 14, 1_000


def save_inversion(studio: Studio) -> Any:
    positive, latent = studio.prepared[0], studio.prepared[4]
    exact = studio.inverted[3].trajectory.flatten(1)
    lines = []
    for name in PRECISIONS:
        how = {"model": studio.model, "positive": positive, "latent": latent, "sigmas": studio.sigmas}
        states = studio.run("RewindEDMInversion", **how, trajectory_dtype=name)[3].trajectory.flatten(1).float()
        lines.append((name, 1000 * (states - exact).norm(dim=1) / exact.norm(dim=1)))
    return studio.figures.curves("rounding error of the trajectory, thousandths", "noise level", lines)


def load_inversion(studio: Studio) -> Any:
    studio.run("RewindSaveInversion", inversion=studio.inverted[3], filename_prefix="help")
    inversion = studio.run("RewindLoadInversion", model=studio.model, inversion_name="help_00001_.safetensors")[3]
    rows = [("the clip", studio.clip)]
    for kind in KINDS:
        edited = studio.run("RewindDemoClip", edit=kind)[1]
        clip = {"clip": studio.clip, "edited_frame": edited, "width": SIZE, "height": SIZE}
        _, _, positive, negative, *_ = studio.run(
            "RewindVideoshopConditioning", clip_vision=studio.clip_vision, vae=studio.vae, **clip
        )
        how = {"model": studio.model, "positive": positive, "negative": negative, "inversion": inversion}
        rows.append((f"edit: {kind}", studio.decode(studio.run("RewindSVDDenoise", **how)[0])))
    return studio.sheet(*rows)


def chunked_decode(studio: Studio) -> Any:
    import torch

    world, slow = studio.module("demo.world"), studio.module("demo.clip").world_of(FRAMES)
    scene = world.sample(1, torch.Generator().manual_seed(CLIP_SEED), slow, "unpredictable", editable=True)
    frames = world.render(scene)[0][0].movedim(1, -1).contiguous()
    latent = studio.run("VAEEncode", pixels=frames, vae=studio.vae)[0]
    whole = studio.decode(latent)
    lines = []
    for overlap in (0, 4):
        how = {"samples": latent, "vae": studio.vae, "frames_at_once": CHUNK, "overlap": overlap}
        shown = studio.run("RewindChunkedDecode", **how)[0]
        steps = (shown - whole).diff(dim=0).square().mean((1, 2, 3)).sqrt()
        lines.append(("cut" if overlap == 0 else f"overlap {overlap}", 2550 * steps))
    return studio.figures.curves("jump of the error, tenths of a level of 255", "frame", lines)


PICTURES: dict[str, Callable[[Studio], Any]] = {
    "RewindSaveInversion.png": save_inversion,
    "RewindLoadInversion.jpg": load_inversion,
    "RewindChunkedDecode.png": chunked_decode,
}
