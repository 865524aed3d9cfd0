"""The pictures of the help pages, `web/docs/pictures/`, from the nodes' own outputs on the embedded model.

    .venv/bin/python docs/help_pictures.py [NODE_ID ...]

Run it again after the weights or a default changed. It starts itself again in the environment of the first ComfyUI
that `make test` would use, and takes some minutes on a CPU.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import help_ei2
import help_masks
import help_reuse
from help_studio import COLUMNS, NOISE_SEED, SIZE, STEPS, Studio, picture, stack

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "web" / "docs" / "pictures"
LIMIT = 60_000  # bytes of a picture
UNGUIDED = {"first_guidance": 1.0, "last_guidance": 1.0}
KINDS = ("off", "channel", "frame")  # of normalisation


def demo_clip(studio: Studio) -> Any:
    mask = studio.mask[..., None].expand(-1, -1, -1, 3)
    kinds = studio.edits[-COLUMNS:] if len(studio.edits) > COLUMNS else studio.edits
    first = [studio.run("RewindDemoClip", edit=kind)[1] for kind in kinds]
    return studio.sheet(
        ("clip", studio.clip),
        ("true_edit", studio.truth),
        ("mask", mask),
        ("edited_frame of the other kinds of edit", stack(first), kinds),
    )


def demo_text_edit(studio: Studio) -> Any:
    kinds = studio.text_edits
    made = {kind: studio.run("RewindDemoTextEdit", edit=kind) for kind in kinds}
    video, _, caption, *_ = made[kinds[0]]
    rows = [(f"true_edit, {kind}: {prompt}", frames) for kind, (_, prompt, _, frames, _) in made.items()]
    return studio.sheet((f"clip: {caption}", video.get_components().images), *rows)


def demo_models(studio: Studio) -> Any:
    frame = studio.clip[:1]
    positive, negative, empty = studio.run(
        "SVD_img2vid_Conditioning",
        clip_vision=studio.clip_vision,
        init_image=frame,
        vae=studio.vae,
        width=SIZE,
        height=SIZE,
        video_frames=len(studio.clip),
        motion_bucket_id=127,
        fps=7,
        augmentation_level=0.0,
    )
    rows = [("a clip of which the model gets the first frame alone", studio.clip)]
    for seed in (1, 2):
        made = studio.run(
            "KSampler",
            model=studio.model,
            seed=seed,
            steps=STEPS,
            cfg=1.0,
            sampler_name="euler",
            scheduler="karras",
            positive=positive,
            negative=negative,
            latent_image=empty,
        )[0]
        rows.append((f"what it makes of it, from random noise (seed {seed})", studio.decode(made)))
    return studio.sheet(*rows)


def demo_text_models(studio: Studio) -> Any:
    model, clip, _ = studio.text_models
    captions = (
        "a red circle moves right quickly on a blue background",
        "a green square moves up slowly on a red background",
        "a yellow triangle moves left quickly, at night",
        "a magenta circle moves down slowly on a grey background, striped",
    )
    encoded = {text: studio.run("CLIPTextEncode", clip=clip, text=text)[0] for text in captions}
    return studio.sheet(*((text, studio.generated(model, positive)) for text, positive in encoded.items()))


def conditioning(studio: Studio) -> Any:
    levels = (0.0, 0.02, 0.2, 0.5, 1.0)
    made = [studio.conditioning(augmentation_level=level) for level in levels]
    words = [f"level {level:g}" for level in levels]

    def seen(output: int) -> Any:
        return stack([studio.decode({"samples": outputs[output][0][1]["concat_latent_image"]}) for outputs in made])

    return studio.sheet(("source_positive", seen(0), words), ("edited_positive", seen(2), words))


def normalise(studio: Studio) -> Any:
    latent, space = studio.prepared[4], studio.model.model.process_latent_in
    made = {
        kind: studio.run("RewindLatentNormalize", model=studio.model, latent=latent, kind=kind)[0] for kind in KINDS
    }
    spreads = {kind: space(latent["samples"].float()) for kind, latent in made.items()}
    by_channel = [(kind, x.std((0, 2, 3))) for kind, x in spreads.items()]
    by_frame = [(kind, x.std((1, 2, 3))) for kind, x in spreads.items()]
    return studio.figures.side_by_side(
        [
            studio.figures.curves("spread of the latent, by channel", "channel", by_channel),
            studio.figures.curves("spread of the latent, by frame", "frame", by_frame),
        ]
    )


def inversion(studio: Studio) -> Any:
    inverted = studio.inverted[3]
    levels = inverted.sigmas.flip(0)
    out = studio.model.model.process_latent_out

    def visible(latents: Any, sigma: Any) -> Any:
        return studio.decode({"samples": out(latents / (1 + sigma**2) ** 0.5)})

    steps = [round(i * (len(levels) - 1) / (COLUMNS - 1)) for i in range(COLUMNS)]
    way = [visible(inverted.trajectory[i][:1], levels[i]) for i in steps]
    return studio.sheet(
        ("the clip", studio.clip),
        ("its first frame on the way", stack(way), [f"sigma {float(levels[i]):.3g}" for i in steps]),
        ("the noise of each frame", visible(inverted.latent.cpu(), levels[-1])),
        ("played again without an edit", studio.decode(studio.denoised(unedited=True, **UNGUIDED))),
    )


def sampler(studio: Studio) -> Any:
    positive, latent = studio.prepared[0], studio.prepared[4]
    guider = studio.run("BasicGuider", model=studio.model, conditioning=positive)[0]
    sigmas = studio.inverted[1]  # as far as the node itself rewinds
    copy = studio.decode(latent)
    rows = [("the clip through the VAE", copy)]
    noise, none = studio.run("RandomNoise", noise_seed=NOISE_SEED)[0], studio.run("DisableNoise")[0]
    euler = studio.run("KSamplerSelect", sampler_name="euler")[0]
    for guess in ("current", "random", "extrapolation", "last_direction"):
        there = studio.run("RewindEDMInversionSampler", guess_above=guess, guess_below=guess)[0]
        common = {"guider": guider, "sigmas": sigmas}
        end = studio.run("SamplerCustomAdvanced", noise=noise, sampler=there, latent_image=latent, **common)[0]
        back = studio.run("SamplerCustomAdvanced", noise=none, sampler=euler, latent_image=end, **common)[0]
        frames = studio.decode(back)
        captions = [f"{value:.1f} dB" for value in studio.inspection.frame_psnrs(frames, copy)]
        rows.append((f"there and back with {guess}", frames, captions))
    return studio.sheet(*rows)


def denoise(studio: Studio) -> Any:
    guided = studio.denoised(first_guidance=1.0, last_guidance=3.0)
    return studio.sheet(
        ("the source", studio.clip),
        ("result without guidance (1 to 1)", studio.decode(studio.denoised(**UNGUIDED))),
        ("result with guidance 1 to 3", studio.decode(guided)),
        ("the true edit", studio.truth),
    )


def rescale(studio: Studio) -> Any:
    rows = []
    for strength, words in ((0.0, "as it comes"), (0.5, "by half"), (1.0, "fully")):
        made = studio.run("RewindLatentRescale", latent=studio.result, reference=studio.prepared[5], strength=strength)[
            0
        ]
        rows.append((f"strength {strength:g}: {words}", studio.decode(made)))
    return studio.sheet(*rows, ("the true edit", studio.truth))


def round_trip(studio: Studio) -> Any:
    outputs = studio.run(
        "RewindRoundTripCheck",
        model=studio.model,
        positive=studio.prepared[0],
        inversion=studio.inverted[3],
        vae=studio.vae,
        clip=studio.clip,
    )
    return picture(outputs[1])


def trajectory(studio: Studio) -> Any:
    return picture(studio.run("RewindTrajectoryPlot", inversion=studio.inverted[3])[0])


def corrupted(studio: Studio, **settings: Any) -> Any:
    model, _, vae = studio.text_models
    return studio.run("RewindDreamixCorrupt", images=studio.text_clip[0], model=model, vae=vae, **settings)[0]


def dreamix_preset(studio: Studio) -> Any:
    rows = []
    for kind in ("motion", "style", "object", "background", "animate"):
        s, factor, stride, *_ = studio.run("RewindDreamixPreset", kind=kind)
        frames = corrupted(studio, factor=factor, stride=stride)
        rows.append((f"{kind}: s {s:g}, factor {factor:g}, stride {stride}", frames))
    return studio.sheet(("the clip", studio.text_clip[0]), *rows)


def dreamix_prompt(studio: Studio) -> Any:
    model, clip, _ = studio.text_models
    plain = "a shape moves right slowly"
    _, positive, written = studio.run("RewindDreamixPrompt", clip=clip, prompt=plain)
    texts = {plain: studio.run("CLIPTextEncode", clip=clip, text=plain)[0], written: positive}
    return studio.sheet(*((text, studio.generated(model, condition)) for text, condition in texts.items()))


def dreamix_corrupt(studio: Studio) -> Any:
    return studio.sheet(
        ("the clip", studio.text_clip[0]),
        *((f"factor {factor:g}", corrupted(studio, factor=factor)) for factor in (2.0, 4.0, 8.0)),
        ("factor 4, stride 3, held", corrupted(studio, stride=3)),
        ("factor 4, stride 3, linear", corrupted(studio, stride=3, temporal="linear")),
    )


def dreamix_fine_tune(studio: Studio) -> Any:
    model, clip, vae = studio.text_models
    token = studio.run("RewindDreamixPrompt", clip=clip, prompt="")[0]
    rows = [("the clip", studio.text_clip[0]), ("by the rare word, before", studio.generated(model, token))]
    for alpha in (0.0, 0.5):
        tuned = studio.run(
            "RewindDreamixFineTune", model=model, vae=vae, images=studio.text_clip[0], token=token, alpha=alpha
        )[0]
        rows.append((f"by the rare word, after, alpha {alpha:g}", studio.generated(tuned, token)))
    return studio.sheet(*rows)


def dreamix_coarse_video(studio: Studio) -> Any:
    picture, rows = studio.text_clip[0][:1], []
    moves = {"zoom out": "white", "pan left": "edge", "turn left": "reflect", "tilt": "white", "roll": "edge"}
    for move, fill in moves.items():
        frames = studio.run("RewindDreamixCoarseVideo", image=picture, frames=COLUMNS, move=move, fill=fill)[0]
        rows.append((f"{move}, {fill}", frames))
    return studio.sheet(*rows)


PICTURES: dict[str, Callable[[Studio], Any]] = {
    "RewindDemoClip.jpg": demo_clip,
    "RewindDemoTextEdit.jpg": demo_text_edit,
    "RewindDemoImageToVideo.jpg": demo_models,
    "RewindDemoTextToVideo.jpg": demo_text_models,
    "RewindVideoshopConditioning.jpg": conditioning,
    "RewindLatentNormalize.png": normalise,
    "RewindEDMInversion.jpg": inversion,
    "RewindEDMInversionSampler.jpg": sampler,
    "RewindSVDDenoise.jpg": denoise,
    "RewindLatentRescale.jpg": rescale,
    "RewindRoundTripCheck.jpg": round_trip,
    "RewindTrajectoryPlot.png": trajectory,
    "RewindDreamixPreset.jpg": dreamix_preset,
    "RewindDreamixPrompt.jpg": dreamix_prompt,
    "RewindDreamixCorrupt.jpg": dreamix_corrupt,
    "RewindDreamixFineTune.jpg": dreamix_fine_tune,
    "RewindDreamixCoarseVideo.jpg": dreamix_coarse_video,
    **help_masks.PICTURES,
    **help_ei2.PICTURES,
    **help_reuse.PICTURES,
}


def encoded(picture: Any, suffix: str) -> bytes:
    """The picture as a file below LIMIT, with less detail where noise makes it larger; ValueError where that fails."""
    tries = ((90, 0), (80, 0), (80, 2), (70, 2), (60, 2), (50, 2))  # JPEG's quality and subsampling of colour
    for quality, subsampling in tries:
        file = io.BytesIO()
        if suffix == ".png":
            picture.quantize(64).save(file, "PNG", optimize=True)
        else:
            picture.save(file, "JPEG", quality=quality, optimize=True, subsampling=subsampling)
        if len(file.getvalue()) < LIMIT:
            return file.getvalue()
    raise ValueError(f"the picture takes {len(file.getvalue())} bytes, {LIMIT} are allowed: draw fewer frames")


def draw(node_ids: Sequence[str]) -> None:
    """Draw the pictures of these nodes, in a process in which the host can be imported."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    import comfy_host
    import torch

    torch.set_num_threads(
        1
    )  # so small a model gains little from more, and loses much where other work shares the cores
    with tempfile.TemporaryDirectory() as base:
        host = comfy_host.boot(Path(os.environ["REWIND_HOST"]), Path(base))
        if not host.load_pack():
            raise RuntimeError("the pack did not load")
        studio = Studio(host)
        FOLDER.mkdir(exist_ok=True)
        for name, drawing in PICTURES.items():
            if not node_ids or Path(name).stem in node_ids:
                content = encoded(drawing(studio), Path(name).suffix)
                (FOLDER / name).write_bytes(content)
                print(f"{name}: {len(content) / 1000:.0f} kB", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nodes", nargs="*", metavar="NODE_ID", choices=[[], *(Path(name).stem for name in PICTURES)])
    node_ids = parser.parse_args().nodes
    if os.environ.get("REWIND_HOST"):
        draw(node_ids)
        return 0
    sys.path.insert(0, str(ROOT / "tests"))
    import run

    return run.in_a_host(__file__, *node_ids)


if __name__ == "__main__":
    sys.exit(main())
