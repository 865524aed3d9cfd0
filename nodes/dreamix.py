"""The nodes around Dreamix's fine-tuning: settings, the prompt, the corrupted clip and a coarse video of a picture."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..pipelines.dreamix.coarse_video import EASINGS, FARTHEST, FILLS, MOVES, View, coarse_video, move
from ..pipelines.dreamix.corruption import TEMPORAL, degrade, sigmas_from
from ..pipelines.dreamix.presets import PRESETS
from ..pipelines.dreamix.prompts import PLACES, with_token
from .host import checks, sampling
from .host.encoding import as_images, check_images, check_length, encode_clip
from .host.schema import ADVANCED, Schema, show_text

CATEGORY = "Rewind/Dreamix"


def as_frames(images: Tensor, name: str) -> Tensor:
    """Images [n, H, W, 3 or 4] as frames [n, 3, H, W] in 0..1, alpha dropped; ValueError for anything else."""
    check_images(images, name, "RGB images")
    return images[..., :3].movedim(-1, 1).float().clamp(0, 1)  # some ways to resize go a little beyond


class DreamixPreset(io.ComfyNode):
    """Settings for a kind of edit, to be seen and changed."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="RewindDreamixPreset",
            display_name="Dreamix Preset",
            category=CATEGORY,
            description="Settings of Dreamix for a kind of edit. How to fine-tune for which kind is the paper's own "
            "finding, the numbers are Rewind's. They are shown on the node when it has run; to change one, disconnect "
            "it and type your own where it went.",
            search_aliases=["dreamix settings", "edit type"],
            inputs=[
                io.Combo.Input(
                    "kind",
                    options=list(PRESETS),
                    default="motion",
                    tooltip="What is to change. motion and background fine-tune on the clip and its frames at once; "
                    "style and object do without, which the paper's raters preferred; animate is for a picture made "
                    "into a Dreamix Coarse Video; subject is for pictures of one thing, shown in a new clip. The "
                    "motion is what fine-tuning helps most, hence the default.",
                ),
            ],
            outputs=[
                io.Float.Output("s", tooltip="The noise: connect to Dreamix Corrupt."),
                io.Float.Output("factor", tooltip="The downsampling a side: connect to Dreamix Corrupt."),
                io.Int.Output("stride", tooltip="The downsampling in time: connect to Dreamix Corrupt."),
                io.Float.Output("alpha", tooltip="The clip's share: connect to Dreamix Mixed Fine-Tune."),
                io.Int.Output(
                    "fine_tune_steps",
                    tooltip="Connect to the steps of Dreamix Mixed Fine-Tune; 0 where none is best.",
                ),
                io.Float.Output("second_pass", tooltip="The s of a second Dreamix Corrupt, behind an upscale."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, kind: str) -> io.NodeOutput:
        preset = PRESETS[kind]
        show_text(cls.hidden.unique_id, str(preset))
        values = preset.s, preset.factor, preset.stride, preset.alpha, preset.fine_tune_steps, preset.second_pass
        return io.NodeOutput(*values, ui=ui.PreviewText(str(preset)))


class DreamixPrompt(io.ComfyNode):
    """The rare word and the edit prompt, encoded."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="RewindDreamixPrompt",
            display_name="Dreamix Prompt",
            category=CATEGORY,
            description="Encodes both texts of Dreamix: the rare word alone, under which the clip is learnt, and the "
            "edit prompt, with the rare word in it, so that what was learnt is asked for.",
            search_aliases=["rare token", "sks", "edit prompt"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder from the loader of the MODEL."),
                io.String.Input(
                    "token",
                    default="sks",
                    tooltip="A word without meaning to the model: the clip is learnt under it. A common word brings "
                    "its own meaning along; sks is the one that others use.",
                ),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="",
                    tooltip="What the clip is to show: the result as a whole, not the change alone. What you leave out "
                    "is up to the model and to what it learnt. Empty is the token alone, which brings the clip back.",
                ),
                io.Combo.Input(
                    "place",
                    options=list(PLACES),
                    default=PLACES[0],
                    tooltip='Where the token goes. "before the prompt" puts it first, behind a leading a, an or the, '
                    'and adds none where the prompt has it; "as written" leaves it where you wrote it, and refuses a '
                    "prompt without it. Unsure which word it belongs to: leave the default.",
                ),
            ],
            outputs=[
                io.Conditioning.Output("token", tooltip="The bare token: connect to Dreamix Mixed Fine-Tune."),
                io.Conditioning.Output("edit", tooltip="The edit prompt: connect to the guider's positive side."),
                io.String.Output("prompt", tooltip="The edit prompt as it was encoded."),
            ],
        )

    @classmethod
    def execute(cls, clip: Any, token: str, prompt: str, place: str) -> io.NodeOutput:
        written = with_token(prompt, token, place)
        if clip is None:
            raise ValueError("there is no text encoder: the checkpoint holds none, connect the CLIP of the MODEL")

        def encoded(text: str) -> list:
            return clip.encode_from_tokens_scheduled(clip.tokenize(text))

        return io.NodeOutput(encoded(token), encoded(written), written)


class DreamixCorrupt(io.ComfyNode):
    """A clip degraded, and the noise levels at which the model takes it up."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="RewindDreamixCorrupt",
            display_name="Dreamix Corrupt",
            category=CATEGORY,
            description="Takes the detail out of a clip, encodes it, and says from which noise on the model is to "
            "restore it by the prompt (Dreamix). The noise itself is added by the sampler: connect the latent and the "
            "sigmas to SamplerCustomAdvanced with RandomNoise. One s means the same on every kind of model.",
            search_aliases=["downsample video", "SDEdit", "video to video", "denoise strength"],
            inputs=[
                io.Image.Input(
                    "images",
                    tooltip="All frames of the clip, at least 2: as many as the model was trained on, and for Wan and "
                    "others that shorten a clip 4 n + 1.",
                ),
                io.Model.Input("model", tooltip="The MODEL that will sample, fine-tuned or not; it is not changed."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the MODEL."),
                *cls._settings_inputs(),
            ],
            outputs=[
                io.Image.Output("images", tooltip="The degraded clip, without noise, to look at."),
                io.Latent.Output(
                    "latent", tooltip="The degraded clip, encoded; empty at s = 1. Connect to SamplerCustomAdvanced."
                ),
                io.Sigmas.Output(
                    "sigmas", tooltip="The schedule from s on: connect to SamplerCustomAdvanced. Empty at s = 0."
                ),
            ],
        )

    @staticmethod
    def _settings_inputs() -> list[io.Input]:
        return [
            io.Int.Input(
                "steps",
                default=25,
                min=1,
                max=10000,
                tooltip="Steps of the whole schedule, from pure noise: those below s are run, about half of them at "
                "the default. More are finer and take longer.",
            ),
            io.Float.Input(
                "s",
                default=0.9,
                min=0.0,
                max=1.0,
                step=0.01,
                tooltip="The noise. Higher gives the prompt more freedom, in motion above all; lower keeps more of the "
                "clip. 0 adds none and samples nothing; 1 begins from pure noise, and nothing of the clip is left. "
                "The default suits most edits, 0.2 to 0.4 a second pass.",
            ),
            io.Float.Input(
                "factor",
                default=4.0,
                min=1.0,
                max=64.0,
                step=0.1,
                tooltip="How far the clip is downsampled, a side, before it is brought to its size again. Higher "
                "leaves layout and colours alone; 1 keeps all detail, as for a second pass. The paper goes to 24 x 40 "
                "pixels, which a latent model cannot restore, hence the default.",
            ),
            io.Int.Input(
                "stride",
                default=1,
                min=1,
                max=64,
                tooltip="Every how many frames one is kept. Higher takes the clip's own motion away, for a new one; 1 "
                "keeps it, hence the default.",
            ),
            io.Combo.Input(
                "temporal",
                options=list(TEMPORAL),
                default="hold",
                tooltip='How the frames between are filled in: "hold" repeats the last one kept, "linear" fades to the '
                "next, which can leave ghosts. With stride 1 there are none.",
            ),
            io.Combo.Input(
                "scheduler",
                options=sampling.schedulers(),
                default=sampling.AUTOMATIC,
                optional=True,
                extra_dict=ADVANCED,
                tooltip="The host's schedulers. automatic is karras, which video models of Stable Video Diffusion's "
                "kind were made for, and simple for flow models such as Wan, which keeps to their own shift.",
            ),
        ]

    @classmethod
    def execute(
        cls,
        images: Tensor,
        model: Any,
        vae: Any,
        steps: int,
        s: float,
        factor: float,
        stride: int,
        temporal: str,
        scheduler: str = sampling.AUTOMATIC,
    ) -> io.NodeOutput:
        frames = as_frames(images, "images")
        if len(frames) < 2:
            raise ValueError(
                "images has 1 frame: connect all frames of the clip, or make one with Dreamix Coarse Video"
            )
        check_length(vae, len(frames))
        path = sampling.noise_path(model.get_model_object("model_sampling"))
        if path.preserving:
            raise ValueError(
                "CogVideoX samples in coordinates of its own, which the host's samplers do not keep to: use another "
                "text-to-video model, such as Wan"
            )
        sigmas = sigmas_from(sampling.noise_levels(model, scheduler, steps), s, path)
        degraded = as_images(degrade(frames, factor, stride=stride, temporal=temporal))
        samples = checks.check_latent(model, {"samples": encode_clip(vae, degraded)})
        # Of one level there is no step; the host's schedulers then give none, and its sampler the latent bit for bit.
        sigmas = sigmas if len(sigmas) > 1 else sigmas[:0]
        return io.NodeOutput(degraded, {"samples": torch.zeros_like(samples) if s == 1 else samples}, sigmas)


class DreamixCoarseVideo(io.ComfyNode):
    """A picture made into a clip with a camera's motion."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="RewindDreamixCoarseVideo",
            display_name="Dreamix Coarse Video",
            category=CATEGORY,
            description="Repeats a picture along a move of the camera: the coarse video from which Dreamix animates "
            "it. It need not look good: Dreamix Corrupt takes its detail away, and the model draws it anew.",
            search_aliases=["image to video", "Ken Burns", "camera motion", "pan and zoom", "perspective"],
            inputs=[
                io.Image.Input("image", tooltip="The picture, one image of the size that the model is to work at."),
                io.Int.Input(
                    "frames",
                    default=16,
                    min=2,
                    max=1024,
                    tooltip="Frames of the video: what the model was trained on (8 for the embedded one), and for Wan "
                    "4 n + 1.",
                ),
                *cls._move_inputs(),
                *cls._view_inputs(),
            ],
            outputs=[
                io.Image.Output(
                    "images", tooltip="The coarse video: connect to Dreamix Mixed Fine-Tune and Dreamix Corrupt."
                )
            ],
        )

    @staticmethod
    def _move_inputs() -> list[io.Input]:
        return [
            io.Combo.Input(
                "move",
                options=list(MOVES),
                default="zoom out",
                tooltip="What the camera does. zoom out shrinks the picture inside the canvas, as in the paper's "
                "figure, hence the default; replicate stands still and leaves all motion to the prompt.",
            ),
            io.Float.Input(
                "amount",
                default=1.0,
                min=-FARTHEST,
                max=FARTHEST,
                step=0.05,
                tooltip="How far the move goes: 1 as listed, 2 twice as far, below 0 the other way.",
            ),
            io.Combo.Input(
                "fill",
                options=list(FILLS),
                default="white",
                tooltip="What lies beyond the picture's edge: white, for the model to paint on (the paper's "
                "figure), its edge drawn out, or its reflection.",
            ),
            io.Combo.Input(
                "easing",
                options=list(EASINGS),
                default="smooth",
                tooltip="smooth starts and stops gently; linear moves evenly.",
            ),
        ]

    @staticmethod
    def _view_inputs() -> list[io.Input]:
        """What is added to the named move, so that every view can be reached."""

        def entry(name: str, default: float, low: float, high: float, step: float, tooltip: str) -> io.Input:
            limits = {"default": default, "min": low, "max": high, "step": step}
            return io.Float.Input(name, **limits, optional=True, extra_dict=ADVANCED, tooltip=tooltip)

        return [
            entry("zoom", 1.0, 0.1, 10.0, 0.01, "Times the move's own zoom at the end. Above 1 comes nearer."),
            entry("x", 0.0, -2.0, 2.0, 0.01, "Added shift of the picture at the end, to the right, in frame widths."),
            entry("y", 0.0, -2.0, 2.0, 0.01, "Added shift of the picture at the end, down, in frame heights."),
            entry("yaw", 0.0, -80.0, 80.0, 1.0, "Added turn at the end, degrees: the right edge goes away."),
            entry("pitch", 0.0, -80.0, 80.0, 1.0, "Added tilt at the end, degrees: the upper edge goes away."),
            entry("roll", 0.0, -180.0, 180.0, 1.0, "Added turn of the picture at the end, degrees, clockwise."),
        ]

    @classmethod
    def execute(
        cls,
        image: Tensor,
        frames: int,
        move: str,
        amount: float,
        fill: str,
        easing: str,
        zoom: float = 1.0,
        x: float = 0.0,
        y: float = 0.0,
        yaw: float = 0.0,
        pitch: float = 0.0,
        roll: float = 0.0,
    ) -> io.NodeOutput:
        pictures = as_frames(image, "image")
        if len(pictures) != 1:
            raise ValueError(
                f"image has {len(pictures)} images: connect one picture (pick it with ImageFromBatch); a clip goes to "
                "Dreamix Corrupt as it is"
            )
        end = view_at_end(move, amount, View(zoom, x, y, yaw, pitch, roll))
        return io.NodeOutput(as_images(coarse_video(pictures[0], frames, end, fill=fill, easing=easing)))


def view_at_end(name: str, amount: float, added: View) -> View:
    """Where a named move ends when a view is added to it: zooms are multiplied, everything else is summed."""
    own = move(name, amount)
    return View(
        own.zoom * added.zoom,
        own.x + added.x,
        own.y + added.y,
        own.yaw + added.yaw,
        own.pitch + added.pitch,
        own.roll + added.roll,
    )
