"""Whether a workflow that somebody saved still fits the nodes of today.

The host says itself whether it would run it (tests/host/test_saved_workflows.py). This tells what it does
not: that an input or an output that the user had connected is still there, by its name, in its place, with its type.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from graph import NOTES


def graphs(workflow: dict) -> Iterator[dict]:
    """The graph itself and those of its subgraphs."""
    yield workflow
    yield from workflow.get("definitions", {}).get("subgraphs", [])


def misfits(workflow: dict, object_info: dict) -> list[str]:
    """What of the workflow today's nodes no longer have, in words; empty if it loads as it was saved.

    `object_info` is the host's, as its page gets it.
    """
    subgraphs = {graph["id"]: graph for graph in list(graphs(workflow))[1:]}
    found = []
    for graph in graphs(workflow):
        for node in graph["nodes"]:
            kind = node["type"]
            if kind in NOTES:
                continue
            if kind in subgraphs:
                entries = {entry["name"]: entry["type"] for entry in subgraphs[kind]["inputs"]}
                outputs = [(entry["name"], entry["type"]) for entry in subgraphs[kind]["outputs"]]
            elif kind in object_info:
                entries, outputs = _inputs(object_info[kind]), _outputs(object_info[kind])
            else:
                found.append(f"there is no node {kind}")
                continue
            found += _input_misfits(node, entries) + _output_misfits(node, outputs)
    return found


def _inputs(info: dict) -> dict[str, Any]:
    """The node's inputs by name: their types; COMBO for a list of choices."""
    parts = [info["input"].get(part, {}) for part in ("required", "optional")]
    return {
        name: "COMBO" if isinstance(kind, (list, tuple)) else kind
        for part in parts
        for name, (kind, *_) in part.items()
    }


def _outputs(info: dict) -> list[tuple[str, str]]:
    kinds = ["COMBO" if isinstance(kind, (list, tuple)) else kind for kind in info["output"]]
    return list(zip(info["output_name"], kinds, strict=True))


def _input_misfits(node: dict, entries: dict[str, Any]) -> list[str]:
    found = []
    for socket in node.get("inputs", []):
        if socket.get("link") is None:
            continue
        name = socket["name"]
        if name not in entries:
            found.append(f"{node['type']} has no input {name}, which is connected")
        elif not _overlap(socket["type"], entries[name]):
            found.append(f"{node['type']}.{name} was {socket['type']}, is {entries[name]}")
    return found


def _output_misfits(node: dict, outputs: list[tuple[str, str]]) -> list[str]:
    found = []
    for index, socket in enumerate(node.get("outputs", [])):
        if not socket.get("links"):
            continue
        if index >= len(outputs):
            found.append(f"{node['type']} has no output {index} ({socket['name']}), which is connected")
        elif (socket["name"], socket["type"]) != outputs[index]:
            was, now = f"{socket['name']} ({socket['type']})", "{} ({})".format(*outputs[index])
            found.append(f"output {index} of {node['type']} was {was}, is {now}")
    return found


def _overlap(saved: str, now: str) -> bool:
    """Whether two types of input have one in common: the host writes alternatives as "FLOAT,INT", anything as "*"."""
    return "*" in (saved, now) or bool(set(str(saved).split(",")) & set(str(now).split(",")))
