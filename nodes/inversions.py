"""The nodes that keep an inversion for edits of another day."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..pipelines.evaluation.memory import in_words
from ..pipelines.videoshop.inversion import Inversion
from ..pipelines.videoshop.inversion_file import file_bytes, load_inversion, save_inversion
from .host import costs, sampling
from .host.files import INVERSIONS
from .host.noise import InvertedNoise
from .host.schema import InversionType, Schema
from .preparation import CATEGORY
from .videoshop import inversion_outputs


def _in_words(inversion: Inversion) -> str:
    """What an inversion holds, and how much memory it takes."""
    states = inversion.trajectory
    kept = "no trajectory" if states is None else f"{len(states)} states in {str(states.dtype).removeprefix('torch.')}"
    shape = " x ".join(map(str, inversion.latent.shape))
    return f"{in_words(file_bytes(inversion))}: a latent of {shape}, {len(inversion.sigmas) - 1} steps, {kept}"


class SaveInversion(io.ComfyNode):
    """An inversion to a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="RewindSaveInversion",
            display_name="Save Inversion",
            category=CATEGORY,
            description="Writes an inversion to models/inversions, as one safetensors file, so that its clip can be "
            "edited again without inverting it again: Load Inversion reads it. How much it takes is told before.",
            search_aliases=["save inverted noise", "cache inversion", "save trajectory"],
            inputs=[
                InversionType.Input("inversion", tooltip="From EDM Inversion with Noise Extrapolation."),
                INVERSIONS.prefix_input("clip"),
            ],
            outputs=[],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, inversion: Inversion, filename_prefix: str) -> io.NodeOutput:
        path, told = INVERSIONS.free_path(filename_prefix), _in_words(inversion)
        costs.tell(cls.hidden.unique_id, "Save Inversion", f"saving {path.name}, {told}", whole=True)
        save_inversion(path, inversion)
        costs.tell(cls.hidden.unique_id, "Save Inversion", f"saved {path.name}, {told}", whole=True)
        return io.NodeOutput()


class LoadInversion(io.ComfyNode):
    """An inversion from a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="RewindLoadInversion",
            display_name="Load Inversion",
            category=CATEGORY,
            description="Reads what Save Inversion wrote, and hands out what EDM Inversion with Noise Extrapolation "
            "does: one inversion serves many edits of its clip. Whether it was made with this MODEL is checked.",
            search_aliases=["load inverted noise", "cached inversion", "load trajectory"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL that made the inversion; a LoRA on it may differ."),
                io.Combo.Input(
                    "inversion_name",
                    options=INVERSIONS.names(),
                    tooltip="A file in models/inversions, for one clip and one model each. Press R to see new ones.",
                ),
            ],
            outputs=inversion_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, model: Any, inversion_name: str) -> str:
        return INVERSIONS.stamp(inversion_name)

    @classmethod
    def execute(cls, model: Any, inversion_name: str) -> io.NodeOutput:
        path = INVERSIONS.path_of(inversion_name)
        costs.tell(cls.hidden.unique_id, "Load Inversion", f"reading {in_words(path.stat().st_size)}")
        inversion = load_inversion(path)
        samples = sampling.state_of(model, inversion)
        costs.tell(cls.hidden.unique_id, "Load Inversion", _in_words(inversion))
        noise = InvertedNoise(inversion, model.get_model_object("model_sampling"))
        return io.NodeOutput({"samples": samples}, inversion.sigmas, noise, inversion)
