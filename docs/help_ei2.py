"""The pictures of EI²'s help pages, and of its model's: a clip tuned on and edited with that model's settings."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

from help_studio import COLUMNS, NOISE_SEED, SIZE, STEPS, Studio, picture, stack

CLIP_SEED = 6  # of the clip that is tuned on and edited


class ClipEditor:
    """The embedded text-to-image model, a clip and its caption, and what was tuned on it; each is made once."""

    def __init__(self, studio: Studio):
        self.run = studio.run
        self.model, self.clip, self.vae = self.run("RewindDemoTextToImage")
        video, _, self.caption, *_ = self.run("RewindDemoTextEdit", edit="object", seed=CLIP_SEED)
        self.frames = video.get_components().images
        self.tuning, self.settings = studio.text_to_image.EI2_TUNING, studio.text_to_image.EI2_SETTINGS
        edits = studio.image_edits
        self.prompts = {name: edits.image_edit(CLIP_SEED, name).prompt for name in edits.EDITS}
        self.tuned = cache(self._tuned)

    def encoded(self, text: str) -> Any:
        return self.run("CLIPTextEncode", clip=self.clip, text=text)[0]

    @cached_property
    def latent(self) -> dict:
        return self.run("VAEEncode", pixels=self.frames, vae=self.vae)[0]

    @cached_property
    def sigmas(self) -> Any:
        how = {"scheduler": "karras", "steps": self.settings.steps, "denoise": 1.0}
        return self.run("BasicScheduler", model=self.model, **how)[0]

    def empty(self, frames: int) -> dict:
        return self.run("EmptyLatentImage", width=SIZE, height=SIZE, batch_size=frames)[0]

    def _tuned(self, share: float = 1.0) -> tuple:
        """MODEL, weights and the plot of the loss of a one-shot tuning, or of a share of its steps."""
        how = {"steps": round(share * self.tuning.steps), "learning_rate": self.tuning.learning_rate}
        clip = {"images": self.frames, "caption": self.encoded(self.caption)}
        return self.run("RewindEI2OneShotTune", model=self.model, vae=self.vae, **clip, **how)

    def patched(self, **settings: Any) -> Any:
        return self.run("RewindEI2TemporalPatch", model=self.model, **settings)[0]

    def edited(self, model: Any, prompt: str) -> Any:
        """The clip rewound by a MODEL with the empty prompt and sampled back by another, as frames."""
        nothing = self.encoded("")
        s = self.settings
        how = {"strength": s.strength, "guess_above": s.guess, "guess_below": s.guess, "refine": s.refine}
        _, sigmas, noise, _ = self.run(
            "RewindEDMInversion", model=model, positive=nothing, latent=self.latent, sigmas=self.sigmas, **how
        )
        pair = {"positive": self.encoded(prompt), "negative": nothing}
        made = self.run(
            "SamplerCustomAdvanced",
            noise=noise,
            guider=self.run("CFGGuider", model=model, cfg=s.guidance, **pair)[0],
            sampler=self.run("KSamplerSelect", sampler_name="euler")[0],
            sigmas=sigmas,
            latent_image=self.empty(len(self.frames)),
        )[0]
        return self.run("VAEDecode", vae=self.vae, samples=made)[0]

    def pictures(self, prompt: str, count: int) -> Any:
        """Pictures of a prompt from random noise, each decoded alone: the VAE takes a batch for a clip."""
        how = {"seed": NOISE_SEED, "steps": STEPS, "cfg": self.settings.guidance}
        how |= {"sampler_name": "euler", "scheduler": "karras"}
        pair = {"positive": self.encoded(prompt), "negative": self.encoded("")}
        made = self.run("KSampler", model=self.model, latent_image=self.empty(count), **how, **pair)[0]
        alone = [{"samples": latent[None]} for latent in made["samples"]]
        return stack([self.run("VAEDecode", vae=self.vae, samples=latent)[0] for latent in alone])


editor = cache(ClipEditor)


def demo_image_models(studio: Studio) -> Any:
    prompts = (
        "a red circle on a blue background",
        "a green square on a red background",
        "a yellow triangle, at night",
        "a magenta circle on a grey background, striped",
    )
    words = [f"picture {i + 1}" for i in range(COLUMNS)]
    return studio.sheet(*((prompt, editor(studio).pictures(prompt, COLUMNS), words) for prompt in prompts))


def temporal_patch(studio: Studio) -> Any:
    e = editor(studio)
    prompt = e.prompts["colour"]
    _, weights, _ = e.tuned()
    models = {
        f"{prompt}: every frame for itself": e.model,
        "first frame, nothing tuned": e.patched(attention="first frame"),
        "FFAM, nothing tuned": e.patched(attention="FFAM"),
        "FFAM, with weights": e.patched(weights=weights),
    }
    return studio.sheet((e.caption, e.frames), *((title, e.edited(model, prompt)) for title, model in models.items()))


def one_shot_tune(studio: Studio) -> Any:
    e = editor(studio)
    prompt, share = e.prompts["background"], 0.25
    (few, *_), (tuned, _, plot) = e.tuned(share), e.tuned()
    rows = studio.sheet(
        (e.caption, e.frames),
        (f"{prompt}: nothing tuned", e.edited(e.patched(), prompt)),
        (f"after {round(share * e.tuning.steps)} steps", e.edited(few, prompt)),
        (f"after {e.tuning.steps} steps", e.edited(tuned, prompt)),
    )
    return studio.figures.stacked([rows, picture(plot)])


def save_weights(studio: Studio) -> Any:
    """How large what a file holds is, block by block."""
    from torch.linalg import matrix_norm

    weights = editor(studio).tuned()[1].tensors
    parts = {
        "temporal": "temporal.to_out.weight",
        "self queries": "attn1.to_q.diff",
        "cross queries": "attn2.to_q.diff",
    }
    first = next(iter(parts.values()))
    blocks = [name.removesuffix(f".{first}") for name in weights if name.endswith(first)]
    measures = {
        part: [float(matrix_norm(weights[f"{block}.{name}"], 2)) for block in blocks] for part, name in parts.items()
    }
    names = [block.replace(".transformer_blocks.", ".") for block in blocks]
    return studio.figures.bars("largest singular value of what was tuned", names, measures)


def load_weights(studio: Studio) -> Any:
    e = editor(studio)
    e.run("RewindEI2SaveWeights", weights=e.tuned()[1], filename_prefix="help")
    weights = e.run("RewindEI2LoadWeights", weights_name="help_00001_.safetensors")[0]
    model = e.patched(weights=weights)
    return studio.sheet((e.caption, e.frames), *((prompt, e.edited(model, prompt)) for prompt in e.prompts.values()))


def shift_probe(studio: Studio) -> Any:
    e = editor(studio)
    told = {"samples": e.latent, "conditioning": e.encoded(e.caption)}
    return picture(e.run("RewindCovariateShiftProbe", model=e.model, weights=e.tuned()[1], **told)[0])


PICTURES: dict[str, Callable[[Studio], Any]] = {
    "RewindDemoTextToImage.jpg": demo_image_models,
    "RewindEI2TemporalPatch.jpg": temporal_patch,
    "RewindEI2OneShotTune.jpg": one_shot_tune,
    "RewindEI2SaveWeights.png": save_weights,
    "RewindEI2LoadWeights.jpg": load_weights,
    "RewindCovariateShiftProbe.png": shift_probe,
}
