"""The nodes that keep what EI²'s one-shot tuning learnt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from ..pipelines.ei2.weights import load_weights, save_weights
from .ei2 import CATEGORY
from .host import files
from .host.schema import EI2WeightsType, Schema, show_text


class EI2SaveWeights(io.ComfyNode):
    """Weights of a one-shot tuning to a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="RewindEI2SaveWeights",
            display_name="EI² Save Weights",
            category=CATEGORY,
            description="Writes what EI² One-Shot Tune learnt to models/ei2, as one safetensors file with the model's "
            "architecture and the settings; EI² Load Weights reads it.",
            search_aliases=["save tuning"],
            inputs=[
                EI2WeightsType.Input("weights", tooltip="What EI² One-Shot Tune learnt."),
                files.EI2.prefix_input("ei2"),
                io.String.Input(
                    "caption",
                    default="",
                    optional=True,
                    tooltip="What the clip shows, the text that it was tuned under: EI² Load Weights shows it, so that "
                    "you know the file again. It changes no result. Left empty, what the weights have stays.",
                ),
            ],
            outputs=[],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, weights: Any, filename_prefix: str, caption: str = "") -> io.NodeOutput:
        path = files.EI2.free_path(filename_prefix)
        save_weights(path, replace(weights, caption=caption.strip() or weights.caption))
        show_text(cls.hidden.unique_id, f"saved {path.name}")
        return io.NodeOutput()


class EI2LoadWeights(io.ComfyNode):
    """Weights of a one-shot tuning from a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="RewindEI2LoadWeights",
            display_name="EI² Load Weights",
            category=CATEGORY,
            description="Reads what EI² Save Weights wrote, and shows of what clip and model it is. Whether it fits a "
            "MODEL is checked where it is used.",
            search_aliases=["load tuning"],
            inputs=[
                io.Combo.Input(
                    "weights_name",
                    options=files.EI2.names(),
                    tooltip="A file in models/ei2, for one clip and one kind of model each, or one that comes with "
                    "Rewind. Press R to see new ones.",
                ),
            ],
            outputs=[EI2WeightsType.Output("weights", tooltip="For EI² Temporal Patch and the Covariate-Shift Probe.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, weights_name: str) -> str:
        return files.EI2.stamp(weights_name)

    @classmethod
    def execute(cls, weights_name: str) -> io.NodeOutput:
        weights = load_weights(files.EI2.path_of(weights_name))
        show_text(cls.hidden.unique_id, str(weights))
        return io.NodeOutput(weights)
