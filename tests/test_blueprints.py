"""The subgraph blueprints: one node a wing, and the workflows that use it."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from comfy_host import ROOT
from graph import INPUT, link_ends

BLUEPRINTS = sorted((ROOT / "subgraphs").glob("*.json"))
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
OUTPUT = -20  # the node id under which the links inside a subgraph know its outputs


def read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def definitions(workflow: dict) -> list[dict]:
    return workflow.get("definitions", {}).get("subgraphs", [])


def links_by_both_ends(graph: dict) -> tuple[dict, dict, dict]:
    """The links of a graph or subgraph: as its list has them, as the inputs name them, as the outputs do."""
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot")
    links = [link if isinstance(link, dict) else dict(zip(names, link)) for link in graph["links"]]
    listed = {link["id"]: tuple(link[name] for name in names[1:]) for link in links}
    ends, starts = {}, {}
    for node in graph["nodes"]:
        for slot, socket in enumerate(node["inputs"]):
            if socket["link"] is not None:
                ends[socket["link"]] = (node["id"], slot)
        for slot, socket in enumerate(node["outputs"]):
            starts |= dict.fromkeys(socket["links"] or [], (node["id"], slot))
    if "inputNode" in graph:
        for slot, socket in enumerate(graph["inputs"]):
            starts |= dict.fromkeys(socket["linkIds"], (INPUT, slot))
        for slot, socket in enumerate(graph["outputs"]):
            ends |= dict.fromkeys(socket["linkIds"], (OUTPUT, slot))
    return listed, ends, starts


@pytest.mark.parametrize("file", [*BLUEPRINTS, *WORKFLOWS], ids=lambda file: file.stem)
def test_every_link_is_the_same_at_both_ends(file):
    workflow = read(file)
    for graph in (workflow, *definitions(workflow)):
        listed, ends, starts = links_by_both_ends(graph)
        assert ends == {number: link[2:] for number, link in listed.items()}
        assert starts == {number: link[:2] for number, link in listed.items()}
        numbers = [node["id"] for node in graph["nodes"]]
        assert len(numbers) == len(set(numbers)) and len(listed) == len(graph["links"])


@pytest.mark.parametrize("file", BLUEPRINTS, ids=lambda file: file.stem)
def test_a_blueprint_is_one_node(file):
    """As the page wants it: it takes the file's name for the node's, and shows the description in the node library."""
    blueprint = read(file)
    (node,), (subgraph,) = blueprint["nodes"], definitions(blueprint)
    assert node["type"] == subgraph["id"] and blueprint["links"] == []
    assert node["title"] == subgraph["name"] == file.stem
    assert subgraph["category"].startswith("Rewind/")
    assert subgraph["description"].endswith(".")


def subgraph_nodes() -> list:
    """(file, node, definition) of every subgraph node of the blueprints and the workflows."""
    found = []
    for file in (*BLUEPRINTS, *WORKFLOWS):
        workflow = read(file)
        kinds = {subgraph["id"]: subgraph for subgraph in definitions(workflow)}
        found += [(file, node, kinds[node["type"]]) for node in workflow["nodes"] if node["type"] in kinds]
    return found


@pytest.mark.parametrize("file, node, subgraph", subgraph_nodes(), ids=lambda value: getattr(value, "stem", ""))
def test_the_node_has_the_inputs_and_outputs_of_its_subgraph(file, node, subgraph):
    for side in ("inputs", "outputs"):
        assert [(s["name"], s["type"]) for s in node[side]] == [(s["name"], s["type"]) for s in subgraph[side]]
    widgets = [socket for socket in node["inputs"] if "widget" in socket]
    assert len(widgets) == len(node["widgets_values"]) and None not in node["widgets_values"]
    inside = {entry["link"] for inner in subgraph["nodes"] for entry in inner["inputs"] if "widget" in entry}
    promoted = {entry["name"] for entry in subgraph["inputs"] if inside & set(entry["linkIds"])}
    assert {socket["name"] for socket in widgets} == promoted


@pytest.mark.parametrize("file", BLUEPRINTS, ids=lambda file: file.stem)
def test_the_workflows_use_the_blueprint_as_it_is(file):
    (subgraph,) = definitions(read(file))
    users = [workflow for workflow in map(read, WORKFLOWS) if subgraph["id"] in {n["type"] for n in workflow["nodes"]}]
    assert users, "a blueprint that no workflow shows"
    for workflow in users:
        assert definitions(workflow) == [subgraph]


def test_every_wing_has_a_blueprint():
    """A wing is a folder with a pipeline.py. A blueprint's category says whose it is: Rewind/EI² is that of ei2."""
    wings = {file.parent.name for file in (ROOT / "pipelines").glob("*/pipeline.py")}
    owners = {definitions(read(file))[0]["category"].split("/")[1] for file in BLUEPRINTS}
    assert wings <= {unicodedata.normalize("NFKC", owner).lower() for owner in owners}
    assert "videoshop" in wings


def test_videoshop_edit_is_wired_like_videoshop():
    """Behind the loaders, and but for the clip's size, which it finds out itself."""
    ours, theirs = (link_ends(read(ROOT / "workflows" / f"{name}.json")) for name in ("videoshop_edit", "videoshop"))
    size = {end: start for end, start in ours.items() if "GetImageSize " in (end[0], start[0])}
    assert {entry for _, entry in size} == {"image", "width", "height"}
    assert ours.items() - size.items() == theirs.items()
