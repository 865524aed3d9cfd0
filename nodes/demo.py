"""The embedded models and the embedded clip: everything runs with no download."""

from __future__ import annotations

from fractions import Fraction

from comfy_api.latest import InputImpl, Types, io

from ..demo.captions import caption
from ..demo.clip import FPS, example, world_of
from ..demo.text_edits import KINDS, TOKEN, text_example
from ..demo.world import EDITS, World
from ..pipelines.videoshop.settings import DEFAULT
from .host.encoding import as_images
from .host.models import load_demo_image_models, load_demo_models, load_demo_text_models
from .host.schema import Schema

CATEGORY = "Rewind/Demo"


class DemoImageToVideo(io.ComfyNode):
    """The embedded tiny Stable Video Diffusion."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="RewindDemoImageToVideo",
            display_name="Rewind Demo Models (image to video)",
            category=CATEGORY,
            description="A tiny Stable Video Diffusion that comes with Rewind: the real architecture, trained on the "
            "world of Rewind Demo Clip. It knows nothing else, but runs in seconds without a graphics card: 8 frames "
            "of 96 x 96. Replace it with Image Only Checkpoint Loader for real clips.",
            search_aliases=["SVD", "tiny model", "example model"],
            inputs=[],
            outputs=[
                io.Model.Output("model", tooltip="The image-to-video MODEL."),
                io.ClipVision.Output("clip_vision", tooltip="Its image encoder."),
                io.Vae.Output("vae", tooltip="Its VAE, with a temporal decoder."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*load_demo_models())


class DemoTextToVideo(io.ComfyNode):
    """The embedded tiny text-to-video model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="RewindDemoTextToVideo",
            display_name="Rewind Demo Models (text to video)",
            category=CATEGORY,
            description="A tiny text-to-video model that comes with Rewind: the architecture of Stable Video "
            "Diffusion with a text in the place of the picture, trained on a world of moving shapes. It knows captions "
            "such as: a red circle moves right quickly on a blue background. Any other word means nothing to it. It "
            "runs in seconds without a graphics card: 8 frames of 96 x 96. Replace it with the loaders of a real "
            "text-to-video model for real clips.",
            search_aliases=["text to video", "tiny model", "example model"],
            inputs=[],
            outputs=[
                io.Model.Output("model", tooltip="The text-to-video MODEL."),
                io.Clip.Output("clip", tooltip="Its text encoder, for CLIP Text Encode."),
                io.Vae.Output("vae", tooltip="Its VAE, with a temporal decoder: that of the image-to-video model."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*load_demo_text_models())


class DemoTextToImage(io.ComfyNode):
    """The embedded tiny text-to-image model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="RewindDemoTextToImage",
            display_name="Rewind Demo Models (text to image)",
            category=CATEGORY,
            description="A tiny text-to-image model that comes with Rewind: the architecture of Stable Diffusion 1.5, "
            "trained on single frames of a world of moving shapes. It knows captions such as: a red circle on a blue "
            "background. Any other word means nothing to it. It runs in seconds without a graphics card: pictures of "
            "96 x 96. Replace it with Load Checkpoint and a model of Stable Diffusion 1.5 for real clips.",
            search_aliases=["SD 1.5", "text to image", "tiny model", "example model"],
            inputs=[],
            outputs=[
                io.Model.Output("model", tooltip="The text-to-image MODEL."),
                io.Clip.Output("clip", tooltip="Its text encoder, for CLIP Text Encode: the text-to-video model's."),
                io.Vae.Output("vae", tooltip="Its VAE, with a temporal decoder: that of the image-to-video model."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*load_demo_image_models())


class DemoClip(io.ComfyNode):
    """A clip of the synthetic world with an edit whose true result is known."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="RewindDemoClip",
            display_name="Rewind Demo Clip",
            category=CATEGORY,
            description="A short clip of a moving shape and an edit of it, from the world of the demo models. "
            "Because the clip is drawn from known parameters, the TRUE edited clip is known exactly, to compare a "
            "result with.",
            search_aliases=["example clip", "synthetic video", "test video"],
            inputs=[
                io.Combo.Input(
                    "edit",
                    options=list(EDITS),
                    default="recolour",
                    tooltip="What is changed in the first frame: the object's colour, shape or size, a band added to "
                    "it, the object removed, or the background. recolour shows best whether an edit reaches the last "
                    "frame.",
                ),
                io.Int.Input(
                    "seed",
                    default=7,
                    min=0,
                    max=0xFFFFFFFF,
                    tooltip="Draws the clip, its motion and its edit. Each value is another clip; the motion turns "
                    "and changes its speed in a way that the first frame does not tell.",
                ),
                io.Int.Input(
                    "frames",
                    default=World().frames,
                    min=2,
                    max=64,
                    optional=True,
                    tooltip="Length of the clip. 8 is what the demo model was trained on; more, to try what is made "
                    "for clips longer than a model.",
                ),
            ],
            outputs=[
                io.Video.Output("clip", tooltip="The source clip, frames of 96 x 96."),
                io.Image.Output("edited_frame", tooltip="The first frame after the edit: what you would paint."),
                io.Image.Output(
                    "true_edit", tooltip="Every frame of the truly edited clip, to compare with; not an input."
                ),
                io.Mask.Output("mask", tooltip="Where the edit may show, frame by frame."),
            ],
        )

    @classmethod
    def execute(cls, edit: str, seed: int, frames: int = World().frames) -> io.NodeOutput:
        chosen = example(seed, edit, world=world_of(frames))
        source, target = as_images(chosen.source), as_images(chosen.target)
        video = InputImpl.VideoFromComponents(Types.VideoComponents(images=source, frame_rate=Fraction(DEFAULT.fps)))
        return io.NodeOutput(video, target[:1], target, chosen.region)


class DemoTextEdit(io.ComfyNode):
    """A clip of the captioned world with a text edit of which a right answer is known."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="RewindDemoTextEdit",
            display_name="Rewind Demo Clip (text edit)",
            category=CATEGORY,
            description="A short clip of a moving shape and an edit of it in words, from the world of the "
            "text-to-video demo model. The prompt names the motion and what is changed; how the shape looks must come "
            "from the clip. One right answer is drawn from known parameters, to compare a result with.",
            search_aliases=["example clip", "example prompt", "synthetic video", "test video"],
            inputs=[
                io.Combo.Input(
                    "edit",
                    options=list(KINDS),
                    default="motion",
                    tooltip="What the prompt asks for: another direction or speed, a style (at night, or striped), "
                    "another colour or shape of the object, or another background. motion needs the fine-tuning most: "
                    "its prompt does not tell what the shape looks like.",
                ),
                io.Int.Input(
                    "seed",
                    default=7,
                    min=0,
                    max=0xFFFFFFFF,
                    tooltip="Draws the clip and its edit; each value is another one. The clip is the same for every "
                    "kind of edit.",
                ),
                io.String.Input(
                    "token",
                    default=TOKEN,
                    tooltip="The rare word that stands for this clip's object, as given to the fine-tuning; it is put "
                    "into the prompt. Leave it empty where nothing was fine-tuned.",
                ),
            ],
            outputs=[
                io.Video.Output("clip", tooltip="The source clip: 8 frames of 96 x 96."),
                io.String.Output("prompt", tooltip="What is asked for, with the token; for CLIP Text Encode."),
                io.String.Output("caption", tooltip="All that the source clip shows, in words."),
                io.Image.Output("true_edit", tooltip="Every frame of one right answer, to compare with; not an input."),
                io.String.Output(
                    "edited_caption",
                    tooltip="All that the true edit shows, in words: the caption with what is changed. For models that "
                    "are asked in whole captions, such as EI²'s.",
                ),
            ],
        )

    @classmethod
    def execute(cls, edit: str, seed: int, token: str) -> io.NodeOutput:
        chosen = text_example(seed, edit)
        source, target = as_images(chosen.source), as_images(chosen.target)
        video = InputImpl.VideoFromComponents(Types.VideoComponents(images=source, frame_rate=Fraction(FPS)))
        edited = caption(chosen.target_words, 0)
        return io.NodeOutput(video, chosen.prompt(token.strip()), chosen.caption, target, edited)
