"""Workflows that users saved with an earlier version still load: node types, connections and values.

tests/fixtures/workflows/<version>/ holds the shipped graphs of each version as they were then (`make freeze`).
"""

from __future__ import annotations

import asyncio
import copy
import json
from pathlib import Path

import comfy_host
import freeze
import pytest
from graph import to_api
from saved import graphs, misfits

FIXTURES = comfy_host.ROOT / freeze.FIXTURES
SAVED = sorted(path.relative_to(FIXTURES) for path in FIXTURES.glob("*/*.json"))
MODELS = {
    ("ImageOnlyCheckpointLoader", "ckpt_name"): "checkpoints",
    ("CheckpointLoaderSimple", "ckpt_name"): "checkpoints",
    ("UNETLoader", "unet_name"): "diffusion_models",
    ("CLIPLoader", "clip_name"): "text_encoders",
    ("CLIPVisionLoader", "clip_name"): "clip_vision",
    ("VAELoader", "vae_name"): "vae",
}
UPLOADS = ("image_upload", "video_upload", "audio_upload")


def read(name: Path) -> dict:
    return json.loads((FIXTURES / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def info(host) -> dict:
    """What the page is told of the nodes: /object_info, without a server."""
    found = {}
    for name, cls in host.mappings.items():
        kinds = getattr(cls, "RETURN_TYPES", ())
        names = getattr(cls, "RETURN_NAMES", None) or [str(kind) for kind in kinds]
        found[name] = {"input": cls.INPUT_TYPES(), "output": list(kinds), "output_name": list(names)}
    return found


def give_files(host, prompt: dict, info: dict) -> None:
    """Put there what the user had: the clip, the picture and the models that the graph names."""
    import folder_paths

    for node in prompt.values():
        for part in ("required", "optional"):
            for name, (_, *rest) in info[node["class_type"]]["input"].get(part, {}).items():
                value, options = node["inputs"].get(name), rest[0] if rest else {}
                if not isinstance(value, str):
                    continue
                if kind := MODELS.get((node["class_type"], name)):
                    folder = Path(folder_paths.get_folder_paths(kind)[0])
                elif any(options.get(upload) for upload in UPLOADS):
                    folder = Path(folder_paths.get_input_directory())
                else:
                    continue
                folder.mkdir(parents=True, exist_ok=True)
                (folder / value).touch()
    folder_paths.filename_list_cache.clear()


def refused(prompt: dict) -> str:
    """Why the host would not run the prompt, as POST /prompt answers; empty if it would. Runs nothing."""
    import execution

    valid, error, outputs, node_errors = asyncio.run(execution.validate_prompt("saved", prompt, None))
    wanted = {number for number, node in prompt.items() if is_output(node["class_type"])}
    if valid and set(outputs) == wanted and not node_errors:
        return ""
    return json.dumps({"error": error, "nodes": node_errors, "outputs": sorted(wanted - set(outputs))}, default=str)


def is_output(kind: str) -> bool:
    import nodes

    return bool(getattr(nodes.NODE_CLASS_MAPPINGS[kind], "OUTPUT_NODE", False))


def test_every_version_has_its_workflows():
    versions = {path.parts[0] for path in SAVED}
    assert versions >= {freeze.version(), *freeze.released()}, "make freeze keeps the workflows of this version"


@pytest.mark.parametrize("name", SAVED, ids=str)
def test_a_saved_workflow_loads(host, info, name):
    workflow = read(name)
    assert misfits(workflow, info) == []
    prompt = to_api(workflow, info)
    give_files(host, prompt, info)
    assert refused(prompt) == ""
    saved = sum(len(node.get("widgets_values") or []) for graph in graphs(workflow) for node in graph["nodes"])
    assert saved > 10, "the graph holds no values to be lost"


@pytest.fixture
def old(host, info) -> tuple[dict, dict]:
    """A saved workflow that loads, and what the page is told: to break one of them."""
    workflow = read(next(path for path in SAVED if path.name == "videoshop.json"))
    kinds = {node["type"] for node in workflow["nodes"]} & set(info)
    return workflow, copy.deepcopy({kind: info[kind] for kind in kinds})


def test_a_renamed_node_is_seen(old):
    workflow, info = old
    info["RewindSVDDenoiser"] = info.pop("RewindSVDDenoise")
    assert misfits(workflow, info) == ["there is no node RewindSVDDenoise"]
    with pytest.raises(ValueError, match="RewindSVDDenoise"):
        to_api(workflow, info)


def test_a_renamed_input_and_another_type_are_seen(old):
    workflow, info = old
    required = info["RewindSVDDenoise"]["input"]["required"]
    required["conditioning"] = required.pop("positive")
    required["model"] = ("CLIP", {})
    found = misfits(workflow, info)
    assert "RewindSVDDenoise has no input positive, which is connected" in found
    assert "RewindSVDDenoise.model was MODEL, is CLIP" in found
    assert len(found) == 2


def test_outputs_in_another_order_are_seen(old):
    workflow, info = old
    for part in ("output", "output_name"):
        info["RewindVideoshopConditioning"][part].reverse()
    assert any(line.startswith("output 0 of RewindVideoshopConditioning was") for line in misfits(workflow, info))


def test_an_inserted_widget_and_a_value_out_of_range_are_seen(host, info, old):
    workflow, _ = old
    inversion = next(node for node in workflow["nodes"] if node["type"] == "RewindEDMInversion")
    inversion["widgets_values"][0] = 7.5  # the strength: 0..1
    prompt = to_api(workflow, info)
    give_files(host, prompt, info)
    assert "strength" in refused(prompt)
    rescale = next(node for node in workflow["nodes"] if node["type"] == "RewindLatentRescale")
    rescale["widgets_values"] = ["in front", *rescale["widgets_values"]]
    with pytest.raises(ValueError, match="too many"):
        to_api(workflow, info)
