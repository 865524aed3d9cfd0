"""The real page expands subgraphs as the tests' own step to a prompt does, and offers the one-node entry."""

from __future__ import annotations

import json

import comfy_host
import pytest
from graph import to_api

WORKFLOWS = sorted((comfy_host.ROOT / "workflows").glob("*.json"))
# What the page adds by itself: inputs of a newer host, and a widget that holds the words which PreviewAny shows.
ADDED = {
    "CreateVideo": {"bit_depth"},
    "LoadVideo": {"video-preview"},
    "SaveVideo": {"format.codec"},
    "PreviewAny": {"preview", "previewMode"},
}
BLUEPRINT = comfy_host.ROOT / "subgraphs" / "Videoshop Edit.json"


def prompt_of(page) -> dict:
    """What the page would post to /prompt."""
    return page.js("async () => JSON.parse(JSON.stringify((await app.graphToPrompt()).output))")


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_the_page_queues_what_the_other_tests_run(page, server, file):
    workflow = json.loads(file.read_text(encoding="utf-8"))
    page.drop(file.name, file.read_bytes(), "application/json")
    ours, theirs = to_api(workflow, server.object_info()), prompt_of(page)
    assert {number: node["class_type"] for number, node in ours.items()} == {
        number: node["class_type"] for number, node in theirs.items()
    }
    for number, node in ours.items():
        inputs = theirs[number]["inputs"]
        assert node["inputs"].items() <= inputs.items()
        added = {name: inputs[name] for name in inputs.keys() - node["inputs"].keys()}
        assert added.keys() <= ADDED.get(node["class_type"], set())
    page.problems.clear()  # it rightly asks for the files of a graph that is for the user's own


def plain(prompt: dict) -> list[tuple]:
    """A prompt without its numbers: type and values of each node, in order."""
    return [
        (node["class_type"], {name: value for name, value in node["inputs"].items() if not isinstance(value, list)})
        for _, node in sorted(prompt.items(), key=lambda item: int(item[0].split(":")[-1]))
    ]


def test_the_one_node_entry_comes_from_the_search(page, server):
    """From the host's list of blueprints."""
    page.add(BLUEPRINT.stem)
    nodes = page.nodes()
    assert nodes[0]["title"] == BLUEPRINT.stem and len(nodes) == 10 and all(node["known"] for node in nodes)
    blueprint, info = json.loads(BLUEPRINT.read_text(encoding="utf-8")), server.object_info()
    assert plain(prompt_of(page)) == plain(to_api(blueprint, info))
    # Other values on the node reach the parts, and only those that they are for.
    values = [0.5, 3.0, 2, 11, 77, 6]
    page.js("values => app.graph._nodes[0].widgets.forEach((widget, i) => { widget.value = values[i] })", values)
    blueprint["nodes"][0]["widgets_values"] = values
    assert plain(prompt_of(page)) == plain(to_api(blueprint, info))
