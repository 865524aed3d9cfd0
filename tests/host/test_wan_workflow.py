"""The first-frame edit with Wan image-to-video: wired as Videoshop's own under a mask, and run on tiny models."""

from __future__ import annotations

import native_models
import pytest
import tiny_models
import tiny_server
import torch
from graph import flatten, to_api
from masks import outside
from results import frames, node_of, saved_latent
from shipped import note, read, refusals, settings

NAME, OWN = "videoshop_wan_i2v", "videoshop_masked_sampler"
LOADERS = {"UNETLoader", "CLIPLoader", "CLIPVisionLoader", "VAELoader", "LoadVideo", "LoadImage", "GetVideoComponents"}
LOADERS |= {"RewindDemoImageToVideo", "RewindDemoClip"}
CONDITIONING = {"RewindVideoshopConditioning", "ImageFromBatch"}  # and the subgraph that takes their place
RESULT = {"PreviewImage", "CreateVideo", "SaveVideo"}
SIZES = {"width": 96, "height": 96, "length": 5, "steps": 8}


def wiring(workflow: dict) -> dict[tuple, tuple]:
    """Where each input between conditioning and result comes from: (node type, input) -> (node type, output)."""
    subgraphs = {graph["id"] for graph in workflow.get("definitions", {}).get("subgraphs", [])}
    nodes = {node["id"]: node for node in workflow["nodes"]}
    kinds = {number: node["type"] for number, node in nodes.items()}
    found = {}
    for _, start, output, end, entry, kind in workflow["links"]:
        if kinds[end] in LOADERS | CONDITIONING | RESULT | subgraphs:
            continue
        begin, name = kinds[start], nodes[start]["outputs"][output]["name"]
        if begin == "RewindDemoClip" and name == "edited_frame":  # brought to its size in the conditioning here
            begin = "conditioning"
        elif begin == "ImageFromBatch":
            begin, name = "conditioning", "clip"
        elif begin in CONDITIONING | subgraphs:
            begin = "conditioning"
        elif begin in LOADERS:
            begin, name = "loader", kind
        found[kinds[end], nodes[end]["inputs"][entry]["name"]] = (begin, name)
    return found


def test_only_the_loaders_and_the_conditioning_differ():
    own, wan = wiring(read(OWN)), wiring(read(NAME))
    assert own == wan and len(own) > 20


def test_what_the_nodes_hold_is_the_same(server):
    info = server.object_info()
    both = []
    for name in (OWN, NAME):
        flat = flatten(read(name))
        found = settings(flat["nodes"], flat["links"], info)
        both.append(
            {key: value for key, value in found.items() if key[0].startswith("Rewind") or key[0] == "CFGGuider"}
        )
    own, wan = both
    shared = own.keys() & wan.keys()
    assert {kind for kind, *_ in shared} == {"RewindEDMInversion", "RewindEditMask", "CFGGuider"}
    assert all(own[key] == wan[key] for key in shared)
    assert {kind for kind, *_ in own.keys() ^ wan.keys()} == {"RewindVideoshopConditioning", "RewindDemoClip"}


def test_source_and_edit_differ_by_the_first_frame_alone(server):
    """WanImageToVideo twice, alike but for the picture and what the image encoder sees of it."""
    prompt = to_api(read(NAME), server.object_info())
    source, edited = (
        prompt[node_of(prompt, "WanImageToVideo", title)]["inputs"]
        for title in ("Source first frame, to rewind", "Edited first frame, to play again")
    )
    assert source.keys() == edited.keys()
    assert {name for name in source if source[name] != edited[name]} == {"start_image", "clip_vision_output"}


def test_the_graph_lacks_only_files(server):
    """The host refuses it for the files that are the user's own, and for nothing else."""
    assert refusals(server, NAME) == {
        ("UNETLoader", "value_not_in_list"),
        ("CLIPLoader", "value_not_in_list"),
        ("CLIPVisionLoader", "value_not_in_list"),
        ("VAELoader", "value_not_in_list"),
        ("LoadVideo", "custom_validation_failed"),
        ("LoadImage", "custom_validation_failed"),
    }


@pytest.fixture(scope="module")
def wan(host, tmp_path_factory):
    """A server with what a user of the graph has, tiny: (server, the graph in API form at a small size)."""
    weights = {
        "UNETLoader": native_models.random_weights(host, "wan21_i2v"),
        "VAELoader": tiny_models.wan_vae_weights(),
    }
    with tiny_server.serving(tmp_path_factory.mktemp("wan"), [NAME], weights) as server:
        prompt = tiny_server.small(server, NAME, SIZES)
        prompt[node_of(prompt, "ImageFromBatch", "First frame")]["inputs"]["length"] = 1
        yield server, prompt


def test_it_runs_and_outside_the_mask_it_is_the_source_to_the_bit(host, wan):
    server, prompt = wan
    prompt = dict(prompt)
    source = [node_of(prompt, "VAEEncode"), 0]
    result = prompt[node_of(prompt, "VAEDecode")]["inputs"]["samples"]
    for number, samples in (("901", source), ("902", result)):
        inputs = {"samples": samples, "filename_prefix": f"latents/{number}"}
        prompt[number] = {"class_type": "SaveLatent", "inputs": inputs, "_meta": {"title": "save"}}
    mask = [node_of(prompt, "RewindEditMask"), 0]
    prompt["903"] = {"class_type": "MaskPreview", "inputs": {"mask": mask}, "_meta": {"title": "mask"}}
    history = server.prompt(prompt)
    source, result = (saved_latent(server, history, number) for number in ("901", "902"))
    assert source.shape == (1, 16, 2, 12, 12)
    kept = outside(host, frames(server, history, "903")[..., 0], source.shape)
    assert torch.equal(result[kept], source[kept])
    assert float((result - source)[~kept].abs().mean()) > 1e-3
    (video,) = history["outputs"][node_of(prompt, "SaveVideo")]["images"]
    assert (server.base / "output" / video["subfolder"] / video["filename"]).stat().st_size > 0


def test_a_clip_of_another_length_is_told(wan):
    server, prompt = wan
    changed = {number: {**node, "inputs": dict(node["inputs"])} for number, node in prompt.items()}
    changed[node_of(changed, "ImageFromBatch", "Clip's length")]["inputs"]["length"] = 9
    for title in ("Source first frame, to rewind", "Edited first frame, to play again"):
        changed[node_of(changed, "WanImageToVideo", title)]["inputs"]["length"] = 33
    with pytest.raises(RuntimeError, match="96 x 96 pixels and 33 frames, the clip is 96 x 96 with 5 frames"):
        server.prompt(changed)


def test_the_note_names_the_files_that_the_loaders_hold():
    text = note(NAME)
    for node in read(NAME)["nodes"]:
        if node["type"] in {"UNETLoader", "CLIPLoader", "CLIPVisionLoader", "VAELoader"}:
            assert f"`{node['widgets_values'][0]}`" in text
