"""The node that fine-tunes a video model on a clip or a set of pictures, as Dreamix does."""

from __future__ import annotations

from functools import partial
from typing import Any

import comfy.utils
from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor

from ..pipelines.dreamix.finetuning import FineTuning
from ..pipelines.dreamix.lora import TARGETS
from ..pipelines.dreamix.temporal import MASKS
from .figures import loss_curves, to_tensor, trained
from .host import costs, mixed_training
from .host.schema import ADVANCED, Schema
from .host.training import precision_of

CATEGORY = "Rewind/Dreamix"
DEFAULT = FineTuning()
PRECISIONS = ("auto", "bfloat16", "float32")
PICTURE_EVERY = 10  # steps between two pictures of the loss on the node


def _settings_inputs() -> list[io.Input]:
    return [
        io.Float.Input(
            "alpha",
            default=DEFAULT.alpha,
            min=0.0,
            max=1.0,
            step=0.05,
            tooltip="What is learnt: 1 the clip with its motion, 0 its frames as an unordered set of pictures, between "
            "them both (the paper's mixed fine-tuning). Use 0.5 to change a motion, 0 for a picture to animate or the "
            "pictures of a subject.",
        ),
        io.Int.Input(
            "steps",
            default=DEFAULT.steps,
            min=0,
            max=100000,
            tooltip="How long to train. Few keep the model's freedom, many keep more of the source and in the end its "
            "motion too; 0 trains nothing and hands the MODEL on as it is.",
        ),
        io.Float.Input(
            "learning_rate",
            default=DEFAULT.learning_rate,
            min=1e-6,
            max=1.0,
            step=1e-6,
            tooltip="How far each step goes. Large models want 1e-4 to 5e-4, the embedded one takes more.",
        ),
        io.Int.Input(
            "rank",
            default=DEFAULT.rank,
            min=1,
            max=256,
            tooltip="Size of the LoRA: higher can learn more detail and makes a larger file.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=True,
            tooltip="Draws the LoRA's start and all noise: equal seeds train equally.",
        ),
    ]


def _advanced_inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "mask",
            options=list(MASKS),
            default=DEFAULT.mask,
            optional=True,
            extra_dict=ADVANCED,
            tooltip="How single frames pass the temporal layers: identity lets attention see the own frame only and "
            "takes the temporal convolutions out (the paper's sentence), bypass leaves the temporal path out whole. "
            "For transformers such as Wan both are the same.",
        ),
        io.Combo.Input(
            "targets",
            options=list(TARGETS),
            default=DEFAULT.targets,
            optional=True,
            extra_dict=ADVANCED,
            tooltip="Which layers learn. The feed-forward layers too can learn more, in more memory and time.",
        ),
        io.Combo.Input(
            "mixed_precision",
            options=list(PRECISIONS),
            default="auto",
            optional=True,
            extra_dict=ADVANCED,
            tooltip="What the model computes in while it trains; the LoRA stays in float32. auto: float32 where the "
            "MODEL works in it, else bfloat16.",
        ),
        io.Boolean.Input(
            "gradient_checkpointing",
            default=False,
            optional=True,
            extra_dict=ADVANCED,
            tooltip="Compute each block twice instead of keeping what it computed: less memory, a third to half more "
            "time.",
        ),
        io.Int.Input(
            "checkpoint_every",
            default=25,
            min=1,
            max=100000,
            optional=True,
            extra_dict=ADVANCED,
            tooltip="Steps between two files that a run can go on from. Cancel writes one too: run the same graph "
            "again, with as many or more steps, and it goes on where it stopped.",
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


class DreamixFineTune(io.ComfyNode):
    """Mixed video-image fine-tuning of a LoRA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="RewindDreamixFineTune",
            display_name="Dreamix Mixed Fine-Tune",
            category=CATEGORY,
            description="Teaches a video model the look of one clip, and as much of its motion as alpha says, under a "
            "rare word: a LoRA, trained on the clip and on its frames at once (Dreamix, arXiv 2302.01329). Takes "
            "UNets of Stable Video Diffusion's architecture and Wan. Needs a ComfyUI that can copy a model (0.33).",
            search_aliases=["train LoRA", "one-shot tuning", "DreamBooth video", "mixed fine-tuning"],
            inputs=[
                io.Model.Input("model", tooltip="The video model. It is not changed: a copy is trained."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the MODEL."),
                io.Image.Input(
                    "images",
                    tooltip="The frames of the clip, or with alpha 0 a set of pictures of one size in any order.",
                ),
                io.Conditioning.Input(
                    "token", tooltip="The rare word alone, encoded: the token output of Dreamix Prompt."
                ),
                *_settings_inputs(),
                *_advanced_inputs(),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The MODEL with the LoRA on."),
                io.LoraModel.Output("lora", tooltip="The LoRA: Save LoRA keeps it, LoraLoaderModelOnly loads it."),
                io.LossMap.Output("losses", tooltip="The losses of every step, for the Loss Graph."),
                io.Int.Output("steps", tooltip="How many steps were trained."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        vae: Any,
        images: Tensor,
        token: list,
        alpha: float,
        steps: int,
        learning_rate: float,
        rank: int,
        seed: int,
        mask: str = DEFAULT.mask,
        targets: str = DEFAULT.targets,
        mixed_precision: str = "auto",
        gradient_checkpointing: bool = False,
        checkpoint_every: int = 25,
        memory_check: bool = True,
    ) -> io.NodeOutput:
        if steps == 0:
            return io.NodeOutput(model, {}, cls._for_a_graph([], {}), 0)
        mixed_training.check_model(model)
        mixed_training.check_token(model, token)
        settings = FineTuning(
            steps=steps,
            alpha=alpha,
            learning_rate=learning_rate,
            rank=rank,
            targets=targets,
            mask=mask,
            precision=precision_of(model, mixed_precision),
            checkpointing=gradient_checkpointing,
            seed=seed,
        )
        material = mixed_training.encode(model, vae, images, token, alpha)
        say = partial(costs.tell, cls.hidden.unique_id, "Dreamix Mixed Fine-Tune")
        progress = cls._progress(steps)
        tuned = mixed_training.train(model, material, settings, progress, checkpoint_every, memory_check, say)
        curves = {"video": tuned.losses.video, "frames": tuned.losses.frames}
        picture = ui.PreviewImage(to_tensor(loss_curves(curves)), cls=cls)
        losses = cls._for_a_graph(tuned.losses.total, curves)
        tuned_model = mixed_training.with_lora(model, tuned.lora)
        return io.NodeOutput(tuned_model, tuned.lora, losses, len(tuned.losses.total), ui=picture)

    @staticmethod
    def _for_a_graph(total: list[float], parts: dict[str, list[float]]) -> Any:
        """A LOSS_MAP; for less than 2 steps, which the host's Loss Graph cannot draw, nodes behind it are left out."""
        if len(total) < 2:
            return ExecutionBlocker(None)
        return {"loss": total} | {name: values for name, values in parts.items() if trained(values)}

    @staticmethod
    def _progress(steps: int):
        """Progress each step, with a picture of both losses now and then."""
        bar = comfy.utils.ProgressBar(steps)
        curves: dict[str, list[float]] = {"video": [], "frames": []}

        def report(step: dict[str, Any]) -> None:
            for name, values in curves.items():
                values.append(step[name])
            done = step["i"] + 1
            picture = loss_curves(curves) if done % PICTURE_EVERY == 0 else None
            bar.update_absolute(done, steps, None if picture is None else ("JPEG", picture, 512))

        return report
