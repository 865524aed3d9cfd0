"""The nodes of EI² (arXiv 2305.17431): a text-to-image model as a consistent video editor, tuned on one clip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import comfy.utils
from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker
from PIL.Image import Image
from torch import Tensor

from ..pipelines.ei2.covariate_shift import Reading, by_block, by_block_and_level, by_level, overall
from ..pipelines.ei2.ffam import ATTENTIONS
from ..pipelines.ei2.inflation import NO_TEMPORAL, PLACES, InflationSettings
from ..pipelines.ei2.stam import AXES, TEMPORALS
from ..pipelines.ei2.tuning import OneShot
from .figures import bars, loss_curves, shaded_table, stacked, to_tensor
from .host import costs, one_shot, patches
from .host.schema import ADVANCED, EI2WeightsType, Schema
from .host.training import precision_of

CATEGORY = "Rewind/EI²"
DEFAULT, INFLATION = OneShot(), InflationSettings()
AS_TUNED = "as tuned"
PRECISIONS = ("auto", "bfloat16", "float32")
PICTURE_EVERY = 10  # steps between two pictures of the loss on the node
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # shares of the training times at which the shift is measured
SHIFTS = ("mean shift", "variance shift")


def _attention_inputs(options: list[str]) -> list[io.Input]:
    """What takes the place of self-attention, the same for the patch and the tuning."""
    as_tuned = f'"{AS_TUNED}": what the weights were tuned with, its factor too; FFAM without any. '
    return [
        io.Combo.Input(
            "attention",
            options=options,
            default=options[0],
            tooltip=f"What frames see of each other. {as_tuned if AS_TUNED in options else ''}"
            '"FFAM": their own tokens and the coarse ones of all other frames (the paper). "sparse-causal": the first '
            'frame and the one before (Tune-A-Video). "first frame": it alone, the most rigid. "own frame": nothing, '
            "the model's own attention.",
        ),
        io.Int.Input(
            "coarse_factor",
            default=INFLATION.factor,
            min=1,
            max=8,
            tooltip="How many times coarser other frames are seen, on each side (FFAM). 2 is the paper's; 1 sees all "
            "of them and costs most, 4 and more are cheaper and hold details together less.",
        ),
    ]


class EI2TemporalPatch(io.ComfyNode):
    """FFAM and STAM on a text-to-image model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="RewindEI2TemporalPatch",
            display_name="EI² Temporal Patch",
            category=CATEGORY,
            description="Makes the frames of a batch see each other in a text-to-image model, so that they become one "
            "clip (EI², arXiv 2305.17431). Without weights it is FFAM alone, which needs no training; with the weights "
            "of EI² One-Shot Tune the tuned temporal attention comes with it. For Stable Diffusion 1.x, 2.x and SDXL.",
            search_aliases=["FFAM", "STAM", "video consistency", "cross-frame attention", "Tune-A-Video"],
            inputs=[
                io.Model.Input("model", tooltip="The text-to-image model. It is not changed."),
                *_attention_inputs([AS_TUNED, *ATTENTIONS]),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How much of it counts. 1 is all, lower mixes the model's own attention back in (which "
                    "then is computed too) and weakens what was tuned; 0 is the model as it was, exactly.",
                ),
                io.Combo.Input(
                    "blocks",
                    options=list(PLACES),
                    default=PLACES[0],
                    tooltip="Which blocks of the model get it. All hold the clip together best; leave some out where "
                    "another pack needs their self-attention, or for speed (the outer ones of input and output cost "
                    "most).",
                ),
                EI2WeightsType.Input(
                    "weights",
                    optional=True,
                    tooltip="What EI² One-Shot Tune learnt of a clip, or EI² Load Weights. None: nothing is tuned.",
                ),
            ],
            outputs=[io.Model.Output("model", tooltip="The MODEL whose batches are clips.")],
        )

    @classmethod
    def execute(
        cls, model: Any, attention: str, coarse_factor: int, strength: float, blocks: str, weights: Any = None
    ) -> io.NodeOutput:
        one_shot.check_model(model)
        if weights is not None and attention == AS_TUNED:
            settings = weights.settings
        else:
            settings = InflationSettings(INFLATION.attention if attention == AS_TUNED else attention, coarse_factor)
        return io.NodeOutput(patches.inflate(model, settings, weights, strength, blocks))


def _tuning_inputs() -> list[io.Input]:
    return [
        io.Int.Input(
            "steps",
            default=DEFAULT.steps,
            min=0,
            max=100000,
            tooltip="How long to tune. More keep the clip's motion and looks better, and in the end resist the edit; "
            "500 is Tune-A-Video's. 0 tunes nothing and only lets the frames see each other.",
        ),
        io.Float.Input(
            "learning_rate",
            default=DEFAULT.learning_rate,
            min=1e-7,
            max=1.0,
            step=1e-7,
            tooltip="How far each step goes. 3e-5 is Tune-A-Video's for Stable Diffusion; the embedded model takes "
            "more. Too high breaks the picture.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=True,
            tooltip="Draws the start of the temporal attention and all noise: equal seeds tune equally.",
        ),
        io.Combo.Input(
            "temporal",
            options=[*TEMPORALS, NO_TEMPORAL],
            default=INFLATION.temporal,
            tooltip='What is put between self- and cross-attention. "STAM" is the paper\'s; the others are what it is '
            'compared with, for research; "none" tunes the queries alone.',
        ),
    ]


def _advanced_inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "centring",
            options=list(AXES),
            default=INFLATION.axes,
            optional=True,
            extra_dict=ADVANCED,
            tooltip="Over what Instance Centering takes the mean. Over frames a still picture stays exactly as it is; "
            "over space too only the mean of a whole clip is taken off. The paper does not say.",
        ),
        io.Combo.Input(
            "mixed_precision",
            options=list(PRECISIONS),
            default="auto",
            optional=True,
            extra_dict=ADVANCED,
            tooltip="Arithmetic of the network; what is trained is always float32. auto is float32 where the model is, "
            "else bfloat16.",
        ),
        io.Boolean.Input(
            "gradient_checkpointing",
            default=False,
            optional=True,
            extra_dict=ADVANCED,
            tooltip="Compute each block twice instead of keeping it: much less memory, a third to half more time. "
            "The result is the same.",
        ),
        io.Int.Input(
            "checkpoint_every",
            default=25,
            min=1,
            max=100000,
            optional=True,
            extra_dict=ADVANCED,
            tooltip="Steps after which the run is saved. A run that was cancelled, or crashed, goes on from there when "
            "the same inputs are run again.",
        ),
        io.Boolean.Input(
            "memory_check",
            default=True,
            optional=True,
            extra_dict=ADVANCED,
            tooltip="Refuse clips that would not fit into memory before anything is trained, by one step on a corner "
            "of the clip; the estimate has a margin.",
        ),
    ]


class EI2OneShotTune(io.ComfyNode):
    """One-shot tuning of a text-to-image model on a clip and its caption."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="RewindEI2OneShotTune",
            display_name="EI² One-Shot Tune",
            category=CATEGORY,
            description="Teaches a text-to-image model one clip under its caption: a temporal attention between the "
            "frames and the queries of the model's own attention (EI², arXiv 2305.17431). Edit the clip afterwards by "
            "another prompt: rewind it with EDM Inversion, sample it back. For Stable Diffusion 1.x, 2.x and SDXL. "
            "Needs a ComfyUI that can copy a model (0.33).",
            search_aliases=["Tune-A-Video", "one-shot video tuning", "STAM", "FFAM"],
            inputs=[
                io.Model.Input("model", tooltip="The text-to-image model. It is not changed: a copy is trained."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the MODEL."),
                io.Image.Input("images", tooltip="The frames of the clip; 8 to 24 are usual."),
                io.Conditioning.Input(
                    "caption", tooltip="What the clip shows, by CLIP Text Encode. The edited prompt differs from it."
                ),
                *_tuning_inputs(),
                *_attention_inputs(list(ATTENTIONS)),
                *_advanced_inputs(),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The MODEL with what was tuned on: EI² Temporal Patch does the same."),
                EI2WeightsType.Output("weights", tooltip="What was learnt, for EI² Save Weights and the patch."),
                io.Image.Output("loss_plot", tooltip="The loss of every step."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        vae: Any,
        images: Tensor,
        caption: list,
        steps: int,
        learning_rate: float,
        seed: int,
        temporal: str,
        attention: str,
        coarse_factor: int,
        centring: str = INFLATION.axes,
        mixed_precision: str = "auto",
        gradient_checkpointing: bool = False,
        checkpoint_every: int = 25,
        memory_check: bool = True,
    ) -> io.NodeOutput:
        inflation = InflationSettings(attention, coarse_factor, temporal, centring)
        one_shot.check_model(model)
        one_shot.check_text(model, caption, "caption")
        if steps == 0:
            weights = one_shot.untuned(model, inflation)
            return io.NodeOutput(patches.inflate(model, inflation, weights), weights, ExecutionBlocker(None))
        one_shot.check_tunable(model, inflation)
        settings = OneShot(
            steps=steps,
            learning_rate=learning_rate,
            precision=precision_of(model, mixed_precision),
            checkpointing=gradient_checkpointing,
            seed=seed,
        )
        latents = one_shot.encode(model, vae, images)
        say = partial(costs.tell, cls.hidden.unique_id, "EI² One-Shot Tune")
        weights, losses = one_shot.tune(
            model, latents, caption, settings, inflation, cls._progress(steps), checkpoint_every, memory_check, say
        )
        tuned = patches.inflate(model, inflation, weights)
        plot = to_tensor(loss_curves({"loss": losses}))
        return io.NodeOutput(tuned, weights, plot, ui=ui.PreviewImage(plot, cls=cls))

    @staticmethod
    def _progress(steps: int):
        """Progress each step, with a picture of the loss now and then."""
        bar = comfy.utils.ProgressBar(steps)
        losses: list[float] = []

        def report(step: dict[str, Any]) -> None:
            losses.append(step["total"])
            done = step["i"] + 1
            picture = loss_curves({"loss": losses}) if done % PICTURE_EVERY == 0 else None
            bar.update_absolute(done, steps, None if picture is None else ("JPEG", picture, 512))

        return report


class CovariateShiftProbe(io.ComfyNode):
    """The covariate shift of a tuned model's temporal modules."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="RewindCovariateShiftProbe",
            display_name="Covariate-Shift Probe",
            category=CATEGORY,
            description="Measures how far each tuned temporal module moves the mean and the spread of the features "
            "that pass it, over five noise levels: what STAM is meant to keep small, since the layers behind it were "
            "trained without it. Shifts are ours to define; the help page has the formulas.",
            search_aliases=["distribution shift", "STAM", "diagnostics"],
            inputs=[
                io.Model.Input("model", tooltip="The text-to-image model; an EI² patch on it makes no difference."),
                EI2WeightsType.Input("weights", tooltip="The tuned modules that are measured."),
                io.Latent.Input("samples", tooltip="A clip, by VAE Encode: the one that was tuned on, for example."),
                io.Conditioning.Input("conditioning", tooltip="The prompt: that of the clip, or the edited one."),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, tooltip="Draws the noise that is added."
                ),
            ],
            outputs=[
                io.Image.Output("plot", tooltip="Both shifts of every block, in the order in which they are passed."),
                io.Float.Output("mean_shift", tooltip="Of all blocks and noise levels: 0 is none."),
                io.Float.Output("variance_shift", tooltip="Of all blocks and noise levels: 0 is none."),
                io.String.Output("table", tooltip="The numbers block by block, as Markdown."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, weights: Any, samples: dict[str, Any], conditioning: list, seed: int) -> io.NodeOutput:
        one_shot.check_model(model)
        one_shot.check_text(model, conditioning, "conditioning")
        latents = one_shot.check_clip(model, samples)
        say = partial(costs.tell_sampling, cls.hidden.unique_id, "Covariate-Shift Probe", 0)
        readings = one_shot.probe_shift(model, latents, conditioning, weights, TIMES, seed, before=say)
        readings = [replace(r, block=r.block.replace(".transformer_blocks.", ".")) for r in readings]
        shifts = overall(readings)
        picture = to_tensor(_shift_plot(readings))
        shown = ui.PreviewImage(picture, cls=cls)
        return io.NodeOutput(picture, *shifts, _shift_tables(readings), ui=shown)


def _at_levels(readings: list[Reading]) -> tuple[list[str], dict[str, dict[str, list[float]]]]:
    """The noise levels as they are written, and for each shift its values at them, row by row: blocks, then all."""
    rows = {**by_block_and_level(readings), "all blocks": by_level(readings)}
    values = {
        shift: {name: [pair[number] for pair in levels.values()] for name, levels in rows.items()}
        for number, shift in enumerate(SHIFTS)
    }
    return [f"{sigma:.3g}" for sigma in by_level(readings)], values


def _shift_tables(readings: list[Reading]) -> str:
    """Markdown: both shifts block by block, averaged over the noise levels; then a table a shift, level by level."""
    sigmas, values = _at_levels(readings)
    tables = [(("block", *SHIFTS), by_block(readings))]
    tables += [((f"{shift} at sigma", *sigmas), rows) for shift, rows in values.items()]
    return "\n\n".join(_markdown(*table) for table in tables)


def _markdown(header: Sequence[str], rows: Mapping[str, Sequence[float]]) -> str:
    """A Markdown table: numbers in rows with names."""
    cells = [[name, *(f"{value:.4f}" for value in row)] for name, row in rows.items()]
    lines = [f"| {' | '.join(line)} |" for line in (header, *cells)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def _shift_plot(readings: list[Reading]) -> Image:
    """Bars block by block, averaged over the noise levels; below them the values at each level."""
    blocks = by_block(readings)
    means = {shift: [pair[number] for pair in blocks.values()] for number, shift in enumerate(SHIFTS)}
    sigmas, values = _at_levels(readings)
    cells = {f"{shift} at sigma": list(rows.values()) for shift, rows in values.items()}
    return stacked(
        [
            bars("covariate shift of each temporal module", list(blocks), means),
            shaded_table("the same at each noise level", [*blocks, "all blocks"], sigmas, cells),
        ]
    )
