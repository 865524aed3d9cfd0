"""The step from a saved workflow to a prompt that the workflow tests stand on."""

from __future__ import annotations

import pytest
from graph import to_api

INFO = {
    "LoadImage": {"input": {"required": {"image": [["a.png", "b.png"], {"image_upload": True}]}}},
    "Sampler": {
        "input": {
            "required": {"seed": ["INT", {}], "image": ["IMAGE", {}], "mode": ["COMBO", {"options": ["x", "y"]}]},
            "optional": {"scale": ["FLOAT", {}], "steps": ["INT", {}]},
        }
    },
}


def workflow() -> dict:
    return {
        "nodes": [
            {"id": 7, "type": "LoadImage", "inputs": [], "widgets_values": ["b.png", "image"]},
            {"id": 3, "type": "MarkdownNote", "widgets_values": ["a word"]},
            {
                "id": 9,
                "type": "Sampler",
                "inputs": [{"name": "image", "link": 5}, {"name": "scale", "link": None, "widget": {"name": "scale"}}],
                "widgets_values": [42, "fixed", "y", 1.5, 20],
            },
        ],
        "links": [[5, 7, 0, 9, 0, "IMAGE"]],
    }


def test_widgets_and_links_find_their_inputs():
    prompt = to_api(workflow(), INFO)
    assert prompt["7"]["inputs"] == {"image": "b.png"}
    assert prompt["9"]["inputs"] == {"seed": 42, "image": ["7", 0], "mode": "y", "scale": 1.5, "steps": 20}
    assert set(prompt) == {"7", "9"}


def test_a_link_into_a_widget_wins_over_its_value():
    graph = workflow()
    graph["nodes"][2]["inputs"][1]["link"] = 6
    graph["links"].append([6, 7, 1, 9, 1, "FLOAT"])
    assert to_api(graph, INFO)["9"]["inputs"]["scale"] == ["7", 1]


@pytest.mark.parametrize(
    "values, message", [([42, "fixed"], "no value for mode"), ([42, "fixed", "y", 1.5, 20, 1], "too many")]
)
def test_values_that_do_not_fit_the_node_are_an_error(values, message):
    graph = workflow()
    graph["nodes"][2]["widgets_values"] = values
    with pytest.raises(ValueError, match=message):
        to_api(graph, INFO)


def test_an_optional_widget_of_a_newer_host_takes_its_default():
    graph = workflow()
    graph["nodes"][2]["widgets_values"] = [42, "fixed", "y", 1.5]
    assert "steps" not in to_api(graph, INFO)["9"]["inputs"]


def test_a_bypassed_node_is_an_error():
    graph = workflow()
    graph["nodes"][0]["mode"] = 4
    with pytest.raises(ValueError, match="bypassed"):
        to_api(graph, INFO)


def nested() -> dict:
    """A loader, a subgraph that holds a sampler and a subgraph with another, and a sampler behind it.

    Its inputs: an image, a scale for both samplers, and a seed for the inner one alone.
    """

    def sampler(number: int, *links: tuple[str, int | None]) -> dict:
        entries = [{"name": name, "link": link} for name, link in links]
        entries = [
            entry if entry["name"] == "image" else entry | {"widget": {"name": entry["name"]}} for entry in entries
        ]
        return {"id": number, "type": "Sampler", "inputs": entries, "widgets_values": [42, "fixed", "y", 1.5, 20]}

    def link(number: int, start: int, output: int, end: int, slot: int, kind: str) -> dict:
        names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
        return dict(zip(names, (number, start, output, end, slot, kind)))

    inner = {
        "id": "inner",
        "name": "Inner",
        "inputs": [{"name": "picture"}, {"name": "size"}, {"name": "number"}],
        "nodes": [sampler(1, ("image", 1), ("scale", 2), ("seed", 3))],
        "links": [
            link(1, -10, 0, 1, 0, "IMAGE"),
            link(2, -10, 1, 1, 1, "FLOAT"),
            link(3, -10, 2, 1, 2, "INT"),
            link(4, 1, 0, -20, 0, "IMAGE"),
        ],
    }
    outer = {
        "id": "outer",
        "name": "Outer",
        "inputs": [{"name": "image"}, {"name": "scale"}, {"name": "seed"}],
        "nodes": [
            sampler(1, ("image", 1), ("scale", 2)),
            {
                "id": 2,
                "type": "inner",
                "inputs": [
                    {"name": "picture", "link": 3},
                    {"name": "size", "link": 4, "widget": {"name": "size"}},
                    {"name": "number", "link": 5, "widget": {"name": "number"}},
                ],
                "widgets_values": [0.1, 7],
            },
        ],
        "links": [
            link(1, -10, 0, 1, 0, "IMAGE"),
            link(2, -10, 1, 1, 1, "FLOAT"),
            link(3, 1, 0, 2, 0, "IMAGE"),
            link(4, -10, 1, 2, 1, "FLOAT"),
            link(5, -10, 2, 2, 2, "INT"),
            link(6, 2, 0, -20, 0, "IMAGE"),
        ],
    }
    node = {
        "id": 5,
        "type": "outer",
        "inputs": [
            {"name": "image", "link": 1},
            {"name": "scale", "link": None, "widget": {"name": "scale"}},
            {"name": "seed", "link": None, "widget": {"name": "seed"}},
        ],
        "widgets_values": [2.5, 99],
    }
    return {
        "nodes": [node, {"id": 7, "type": "LoadImage", "widgets_values": ["b.png", "image"]}, sampler(9, ("image", 2))],
        "links": [[1, 7, 0, 5, 0, "IMAGE"], [2, 5, 0, 9, 0, "IMAGE"]],
        "definitions": {"subgraphs": [inner, outer]},
    }


def test_subgraphs_are_expanded():
    prompt = to_api(nested(), INFO)
    assert set(prompt) == {"7", "9", "5:1", "5:2:1"}
    assert prompt["5:1"]["inputs"] == {"seed": 42, "image": ["7", 0], "mode": "y", "scale": 2.5, "steps": 20}
    assert prompt["5:2:1"]["inputs"] == {"seed": 99, "image": ["5:1", 0], "mode": "y", "scale": 2.5, "steps": 20}
    assert prompt["9"]["inputs"]["image"] == ["5:2:1", 0]


def test_inputs_that_nothing_is_connected_to_need_not_be_saved():
    """Newer pages leave out the inputs that are widgets."""
    graph = nested()
    del graph["nodes"][0]["inputs"][1:]
    assert to_api(graph, INFO) == to_api(nested(), INFO)


def test_a_link_into_a_subgraph_wins_over_the_value_on_its_node():
    graph = nested()
    graph["nodes"][0]["inputs"][1]["link"] = 3
    graph["links"].append([3, 7, 1, 5, 1, "FLOAT"])
    prompt = to_api(graph, INFO)
    assert prompt["5:1"]["inputs"]["scale"] == prompt["5:2:1"]["inputs"]["scale"] == ["7", 1]
    assert prompt["5:2:1"]["inputs"]["seed"] == 99


@pytest.mark.parametrize("values", [[], [2.5], [2.5, None]])
def test_a_subgraph_needs_a_value_for_each_widget(values):
    graph = nested()
    graph["nodes"][0]["widgets_values"] = values
    with pytest.raises(ValueError, match="no value for"):
        to_api(graph, INFO)


@pytest.mark.parametrize(
    "order, values, expected",
    [
        ([["-1", "seed"], ["-1", "scale"]], [98, 3.5], {"scale": (3.5, 3.5), "seed": (42, 98)}),
        ([["1", "scale"], ["1", "seed"], ["-1", "seed"]], [3.5, 12, 98], {"scale": (3.5, 3.5), "seed": (12, 98)}),
        ([["-1", "scale"], ["1", "steps"], ["-1", "seed"], ["1", "$$preview"]], [1.0, 5, 8, "x"], {"steps": (5, 20)}),
        ([["-1", "scale"], ["1", "steps"], ["-1", "seed"]], [1.0, None, 8], {"steps": (20, 20)}),
    ],
)
def test_promoted_widgets_come_in_their_own_order(order, values, expected):
    graph = nested()
    graph["nodes"][0] |= {"properties": {"proxyWidgets": order}, "widgets_values": values}
    prompt = to_api(graph, INFO)
    found = {name: (prompt["5:1"]["inputs"][name], prompt["5:2:1"]["inputs"][name]) for name in expected}
    assert found == expected


def test_what_is_not_connected_outside_is_not_connected_inside():
    graph = nested()
    graph["nodes"][0]["inputs"][0]["link"] = None
    graph["links"].pop(0)
    assert "image" not in to_api(graph, INFO)["5:1"]["inputs"]


def test_a_bypassed_subgraph_is_an_error():
    graph = nested()
    graph["nodes"][0]["mode"] = 4
    with pytest.raises(ValueError, match="bypassed"):
        to_api(graph, INFO)


def test_expanding_leaves_the_workflow_as_it_was():
    graph, again = nested(), nested()
    to_api(graph, INFO)
    assert graph == again
