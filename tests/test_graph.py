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
