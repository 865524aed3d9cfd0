"""The one-node entry, and the workflows that use it, on the real server."""

from __future__ import annotations

import json

import comfy_host
import pytest
import torch
from graph import WIDGETS, flatten, link_ends, to_api
from results import frames, node_of

FOLDER = comfy_host.ROOT / "subgraphs"
PARTS = {"Dreamix Edit": 13, "EI2 Edit": 12, "Videoshop Edit": 9}  # of each blueprint
# What stands in the place of the mask and the colour, and the scaling of a clip of the user's own.
INPAINTED = {
    ("ImageCompositeMasked Edited first frame", "source"),
    ("ImageCompositeMasked Edited first frame", "mask"),
    ("ImageFromBatch First frame", "image"),
    ("ImageFromBatch ", "image"),
    ("ImageColorToMask Mask: what is yellow", "image"),
    ("GrowMask ", "mask"),
    ("PreviewImage Source", "images"),
}


def read(name: str) -> dict:
    return json.loads((comfy_host.ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))


def blueprint(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def test_the_host_lists_the_blueprints(server):
    listed = {
        entry["name"]: number
        for number, entry in server.get("/global_subgraphs").items()
        if entry["info"]["node_pack"].endswith(comfy_host.PACK_NAME)
    }
    assert sorted(listed) == sorted(file.stem for file in FOLDER.glob("*.json")) == sorted(PARTS)
    for name, number in listed.items():
        data = server.get(f"/global_subgraphs/{number}")["data"]
        assert data == (FOLDER / f"{name}.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PARTS)
def test_the_blueprint_knows_its_nodes(server, name):
    prompt = to_api(blueprint(name), server.object_info())
    assert len(prompt) == PARTS[name] and all(number.startswith("1:") for number in prompt)


@pytest.mark.parametrize("name", PARTS)
def test_its_nodes_list_every_input(server, name):
    """In the page's own order, sockets first: an older page counts on it when it adds a blueprint to a graph."""
    info = server.object_info()
    (subgraph,) = blueprint(name)["definitions"]["subgraphs"]
    for node in subgraph["nodes"]:
        described = info[node["type"]]["input"]
        kinds = {
            name: kind for part in ("required", "optional") for name, (kind, *_) in described.get(part, {}).items()
        }
        widgets = [name for name, kind in kinds.items() if isinstance(kind, list) or kind in WIDGETS]
        assert [entry["name"] for entry in node["inputs"]] == [n for n in kinds if n not in widgets] + widgets
        assert [entry["widget"]["name"] for entry in node["inputs"] if "widget" in entry] == widgets


def test_one_node_gives_the_same_as_its_parts(server, trained):
    results = []
    for name in ("videoshop", "videoshop_edit"):
        prompt = to_api(read(name), server.object_info())
        results.append(frames(server, server.prompt(prompt), node_of(prompt, "PreviewImage")))
    assert results[0].shape == (8, 96, 96, 3)
    assert torch.equal(*results)


def test_it_works_at_the_clips_own_size(server, trained):
    """A clip of another size, longer than `frames`, and an edited frame larger than the clip."""
    prompt = to_api(read("videoshop_edit"), server.object_info())
    edit = next(number for number, node in prompt.items() if node["class_type"] == "ImageFromBatch")
    conditioning = prompt[node_of(prompt, "RewindVideoshopConditioning")]["inputs"]
    scale = {"upscale_method": "bilinear", "crop": "center"}
    for name, inputs, key, (width, height) in (
        ("clip", prompt[edit]["inputs"], "image", (128, 64)),
        ("frame", conditioning, "edited_frame", (256, 128)),
    ):
        entry = {"image": inputs[key], "width": width, "height": height, **scale}
        prompt[name] = {"class_type": "ImageScale", "inputs": entry, "_meta": {"title": name}}
        inputs[key] = [name, 0]
    prompt[edit]["inputs"]["length"] = 5
    prompt[node_of(prompt, "BasicScheduler")]["inputs"]["steps"] = 3
    result = frames(server, server.prompt(prompt), node_of(prompt, "PreviewImage"))
    assert result.shape == (5, 64, 128, 3)


def test_the_settings_on_the_node_reach_their_parts(server):
    workflow = read("videoshop_edit")
    (node,) = [node for node in workflow["nodes"] if node.get("title") == "Videoshop Edit"]
    node["widgets_values"] = [0.5, 3.0, 2, 11, 77, 6]
    prompt = to_api(workflow, server.object_info())
    inputs = {kind: prompt[node_of(prompt, kind)]["inputs"] for kind in {n["class_type"] for n in prompt.values()}}
    inversion = inputs["RewindEDMInversion"]
    assert (inversion["strength"], inversion["refine"], inversion["seed"]) == (0.5, 2, 77)
    assert inputs["RewindVideoshopConditioning"]["seed"] == 77
    assert inputs["RewindSVDDenoise"]["last_guidance"] == 3.0
    assert (inputs["BasicScheduler"]["steps"], inputs["ImageFromBatch"]["length"]) == (11, 6)


@pytest.mark.parametrize("name", ["videoshop_edit", "videoshop_first_frame", "videoshop_first_frame_inpaint"])
def test_its_settings_are_those_of_videoshop(server, name):
    """All but the sizes: those inside, which the page shows when the subgraph is opened, and those on the node."""
    info = server.object_info()
    parts = {node["class_type"]: node["inputs"] for node in to_api(read("videoshop"), info).values()}
    workflow = read(name)
    inside = [node for node in flatten(workflow)["nodes"] if ":" in str(node["id"])]
    assert len(inside) == 9
    without = [{key: value for key, value in node.items() if key != "promoted"} for node in inside]
    for nodes in (inside, without):
        api = to_api({"nodes": nodes, "links": flatten(workflow)["links"]}, info)
        for node in api.values():
            if node["class_type"] == "GetImageSize":
                continue
            theirs = parts[node["class_type"]]
            values = {key: value for key, value in node["inputs"].items() if not isinstance(value, list)}
            differ = {key for key, value in values.items() if theirs[key] != value}
            assert differ <= {"width", "height", "length"}, node["class_type"]


@pytest.fixture(scope="module")
def first_frame(server, trained):
    """videoshop_first_frame.json run as it was saved: its prompt, and the frames that it shows by title."""
    prompt = to_api(read("videoshop_first_frame"), server.object_info())
    history = server.prompt(prompt)
    titles = ("Source", "Edited first frame", "Edited clip")
    return prompt, {title: frames(server, history, node_of(prompt, "PreviewImage", title)) for title in titles}


@pytest.fixture
def truth(host, first_frame):
    """The true edit of the clip in the graph."""
    clip = first_frame[0][node_of(first_frame[0], "RewindDemoClip")]["inputs"]
    return host.module("demo.clip").example(clip["seed"], "recolour")


def test_core_nodes_edit_the_first_frame(host, first_frame, truth):
    """The recolouring whose answer is known, but for the soft edge; nothing else of the frame changes."""
    metrics = host.module("pipelines.evaluation.metrics")
    shown = {title: pictures.movedim(-1, 1) for title, pictures in first_frame[1].items()}
    assert torch.allclose(shown["Source"], truth.source, atol=1.5 / 255)
    edited, frame, target = shown["Edited first frame"], truth.source[:1], truth.target[:1]
    transfer = metrics.colour_transfer(edited, frame, target, truth.target_mask[:1])
    assert abs(float(transfer) - 1) < 0.03
    assert metrics.psnr(edited, target) >= 30
    outside = (truth.region[:1, None] == 0).expand_as(frame)
    assert torch.allclose(edited[outside], frame[outside], atol=1.5 / 255)


def test_an_edit_made_in_the_graph_shows_the_known_answer(host, trained, first_frame, truth):
    if not trained:
        pytest.skip("the embedded model's weights are not there: with random ones the frames mean nothing")
    metrics = host.module("pipelines.evaluation.metrics")
    result, source, target = first_frame[1]["Edited clip"].movedim(-1, 1), truth.source, truth.target
    assert metrics.psnr(result, target, truth.region) >= metrics.psnr(source, target, truth.region) + 7
    assert metrics.psnr(result, source, 1 - truth.region) >= 40
    transfer = metrics.colour_transfer(result, source, target, truth.target_mask)
    assert float(transfer.mean()) >= 0.95 and float(transfer[-1]) >= 0.9


def test_the_graph_that_inpaints_has_the_same_wiring(server):
    ours, theirs = (link_ends(read(f"videoshop_first_frame{name}")) for name in ("", "_inpaint"))
    assert {end for end, start in ours.items() if theirs.get(end) != start} == INPAINTED
    assert theirs["ImageCompositeMasked Edited first frame", "mask"] == ("a loader", "MASK")
    assert theirs["ImageCompositeMasked Edited first frame", "source"] == ("VAEDecode Inpainted", "IMAGE")


def test_the_graph_that_inpaints_lacks_only_files(server):
    """The host refuses it for the files that are the user's own, and for nothing else."""
    with pytest.raises(ValueError, match="400") as refusal:
        server.submit(to_api(read("videoshop_first_frame_inpaint"), server.object_info()))
    answer = json.loads(str(refusal.value).split(" 400 ", 1)[1])
    reasons = {
        (node["class_type"], error["type"]) for node in answer["node_errors"].values() for error in node["errors"]
    }
    assert reasons == {
        ("CheckpointLoaderSimple", "value_not_in_list"),
        ("ImageOnlyCheckpointLoader", "value_not_in_list"),
        ("LoadImage", "custom_validation_failed"),
        ("LoadVideo", "custom_validation_failed"),
    }
