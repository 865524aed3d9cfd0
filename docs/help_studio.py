"""Where the pictures of the help pages are made: the nodes run one by one on the embedded models."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

SIZE, STEPS, COLUMNS, NOISE_SEED = 96, 25, 5, 3


class Studio:
    """The nodes run one by one on the embedded model, as the workflows wire them; what is shared is made once."""

    def __init__(self, host: Any):
        self.run, self.module = host.run_node, host.module
        self.figures, self.inspection = host.module("nodes.figures"), host.module("nodes.inspection")
        self.edits, self.text_edits = host.module("demo.world").EDITS, host.module("demo.text_edits").KINDS
        self.image_edits, self.text_to_image = host.module("demo.image_edits"), host.module("demo.text_to_image")
        self.model, self.clip_vision, self.vae = self.run("RewindDemoImageToVideo")
        video, self.edited_frame, self.truth, self.mask = self.run("RewindDemoClip")
        self.clip = video.get_components().images

    def conditioning(self, **settings: Any) -> tuple:
        """Both pairs of conditionings, the clip's latent and the edited frame's."""
        return self.run(
            "RewindVideoshopConditioning",
            clip_vision=self.clip_vision,
            vae=self.vae,
            clip=self.clip,
            edited_frame=self.edited_frame,
            width=SIZE,
            height=SIZE,
            **settings,
        )

    @cached_property
    def prepared(self) -> tuple:
        return self.conditioning()

    @cached_property
    def sigmas(self) -> Any:
        return self.run("BasicScheduler", model=self.model, scheduler="karras", steps=STEPS, denoise=1.0)[0]

    @cached_property
    def inverted(self) -> tuple:
        """latent, sigmas, noise, inversion with every setting at its default."""
        positive, latent = self.prepared[0], self.prepared[4]
        return self.run("RewindEDMInversion", model=self.model, positive=positive, latent=latent, sigmas=self.sigmas)

    def denoised(self, unedited: bool = False, **settings: Any) -> dict:
        """The inverted clip played again, with the edited frame or without an edit."""
        positive, negative = self.prepared[:2] if unedited else self.prepared[2:4]
        inversion = self.inverted[3]
        pair = {"positive": positive, "negative": negative}
        return self.run("RewindSVDDenoise", model=self.model, inversion=inversion, **pair, **settings)[0]

    @cached_property
    def result(self) -> dict:
        return self.denoised()

    @cached_property
    def text_models(self) -> tuple:
        """MODEL, CLIP and VAE of the embedded text-to-video model."""
        return self.run("RewindDemoTextToVideo")

    @cached_property
    def text_clip(self) -> tuple:
        """The clip of the text edit, its prompt with the token, and its caption."""
        video, prompt, caption, *_ = self.run("RewindDemoTextEdit")
        return video.get_components().images, prompt, caption

    def generated(self, model: Any, positive: Any, seed: int = NOISE_SEED) -> Any:
        """A clip of the text-to-video model from pure noise, as frames."""
        _, clip, vae = self.text_models
        empty = self.run("EmptyLatentImage", width=SIZE, height=SIZE, batch_size=len(self.clip))[0]
        negative = self.run("CLIPTextEncode", clip=clip, text="")[0]
        how = {"seed": seed, "steps": STEPS, "cfg": 3.0, "sampler_name": "euler", "scheduler": "karras"}
        pair = {"positive": positive, "negative": negative}
        made = self.run("KSampler", model=model, latent_image=empty, **how, **pair)[0]
        return self.run("VAEDecode", vae=vae, samples=made)[0]

    def decode(self, latent: dict) -> Any:
        return self.run("VAEDecode", vae=self.vae, samples=latent)[0]

    def sheet(self, *rows: tuple[str, Any] | tuple[str, Any, Sequence[str]]) -> Any:
        """Rows of (title, frames) or (title, frames, a caption a frame), in COLUMNS columns spread over the frames."""
        drawn = []
        for title, frames, *captions in rows:
            shown = [round(i * (len(frames) - 1) / (COLUMNS - 1)) for i in range(COLUMNS)]
            words = captions[0] if captions else [f"frame {i + 1}" for i in range(len(frames))]
            drawn.append((title, frames[shown], [words[i] for i in shown]))
        return self.figures.contact_sheet(drawn)


def stack(pictures: Sequence[Any]) -> Any:
    import torch

    return torch.cat(list(pictures))


def picture(image: Any) -> Any:
    """An IMAGE of one picture as a Pillow picture."""
    from PIL import Image

    return Image.fromarray((image[0].clamp(0, 1) * 255).round().byte().numpy())
