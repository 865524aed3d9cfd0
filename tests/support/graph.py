"""From a workflow as the page saves it (nodes, links, widget values) to what the page posts to /prompt."""

from __future__ import annotations

import copy
from typing import Any

NOTES = {"Note", "MarkdownNote"}
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"}
LOADERS = {"RewindDemoImageToVideo", "RewindDemoClip", "ImageOnlyCheckpointLoader", "LoadVideo", "LoadImage"}
INPUT = -10  # the node id under which the links inside a subgraph know its inputs


def to_api(workflow: dict, object_info: dict) -> dict[str, dict]:
    """The workflow in API form. `object_info` is the running host's own, so a node it does not know is an error."""
    flat = flatten(workflow)
    origin = {link[0]: [str(link[1]), link[2]] for link in flat["links"]}
    prompt = {}
    for node in flat["nodes"]:
        if node["type"] in NOTES:
            continue
        _check_mode(node)
        if node["type"] not in object_info:
            raise ValueError(f"the host has no node {node['type']}")
        inputs = _widget_inputs(node, object_info[node["type"]]) | node.get("promoted", {})
        for socket in node.get("inputs", []):
            if socket.get("link") is not None:
                inputs[socket["name"]] = origin[socket["link"]]
        prompt[str(node["id"])] = {
            "class_type": node["type"],
            "inputs": inputs,
            "_meta": {"title": node.get("title", node["type"])},
        }
    return prompt


def link_ends(workflow: dict) -> dict[tuple, tuple]:
    """Each link's end (node type and title, input) and its start (node type, output name), without the loaders' ids."""
    flat = flatten(workflow)
    nodes = {node["id"]: node for node in flat["nodes"]}

    def label(node: dict) -> str:
        return "a loader" if node["type"] in LOADERS else f"{node['type']} {node.get('title', '')}"

    ends = {}
    for _, start, output, end, entry, kind in flat["links"]:
        source = nodes[start]
        name = kind if source["type"] in LOADERS else source["outputs"][output]["name"]
        ends[label(nodes[end]), nodes[end]["inputs"][entry]["name"]] = (label(source), name)
    return ends


def flatten(workflow: dict) -> dict:
    """The nodes and links of a workflow with its subgraphs expanded, as the page does when it queues.

    A node inside gets the id "outer:inner". What the subgraph's node holds for a widget inside is the entry "promoted"
    of that inner node, {widget: value}: it goes before the inner node's own value.
    """
    kinds = {subgraph["id"]: subgraph for subgraph in workflow.get("definitions", {}).get("subgraphs", [])}
    nodes, links = list(workflow["nodes"]), list(workflow["links"])
    while outer := next((node for node in nodes if node["type"] in kinds), None):
        nodes.remove(outer)
        inside, links = _expand(outer, kinds[outer["type"]], links)
        nodes += inside
    return {"nodes": nodes, "links": links}


def _expand(outer: dict, subgraph: dict, links: list[list]) -> tuple[list[dict], list[list]]:
    """The nodes of one subgraph, and all links of the graph with those inside it in the place of its node's own."""
    _check_mode(outer)
    nodes = {node["id"]: copy.deepcopy(node) for node in subgraph["nodes"]}
    for (number, name), value in _promoted(outer, subgraph).items():
        nodes[number].setdefault("promoted", {})[name] = value
    starts = {link[0]: link[1:3] for link in links}
    sockets = {socket["name"]: socket.get("link") for socket in outer["inputs"]}

    def start(link: dict) -> list | None:
        """Node and output at which a link inside begins; None where nothing is connected outside."""
        if link["origin_id"] == INPUT:
            return starts.get(sockets.get(subgraph["inputs"][link["origin_slot"]]["name"]))
        return [f"{outer['id']}:{link['origin_id']}", link["origin_slot"]]

    made, leaving = [], {}
    for link in subgraph["links"]:
        if link["target_id"] not in nodes:  # an output of the subgraph
            leaving[link["target_slot"]] = start(link)
            continue
        entries = nodes[link["target_id"]]["inputs"]
        (slot,) = [slot for slot, entry in enumerate(entries) if entry.get("link") == link["id"]]
        source, number = start(link), f"{outer['id']}:{link['id']}"
        entries[slot]["link"] = number if source else None
        if source:
            made.append([number, *source, f"{outer['id']}:{link['target_id']}", slot, link["type"]])
    for number, begin, output, end, *rest in links:
        if begin == outer["id"]:
            begin, output = leaving[output]
        if end != outer["id"]:
            made.append([number, begin, output, end, *rest])
    return [node | {"id": f"{outer['id']}:{number}"} for number, node in nodes.items()], made


def _promoted(outer: dict, subgraph: dict) -> dict[tuple[int, str], Any]:
    """What a subgraph's node holds for the widgets inside, by inner node and widget.

    Its values are a bare list in the order of `proxyWidgets`, pairs of inner node and widget ("-1": an input of the
    subgraph); newer pages save no such list, and the order is that of the inputs that feed widgets.
    """
    fed: dict[str, list[tuple[int, str]]] = {entry["name"]: [] for entry in subgraph["inputs"]}
    for link in subgraph["links"]:
        if link["origin_id"] == INPUT:
            name = subgraph["inputs"][link["origin_slot"]]["name"]
            (end,) = [node for node in subgraph["nodes"] if node["id"] == link["target_id"]]
            (entry,) = [entry for entry in end["inputs"] if entry.get("link") == link["id"]]
            fed[name] += [(end["id"], entry["name"])] if "widget" in entry else []
    inputs = [name for name, ends in fed.items() if ends]
    order = outer.get("properties", {}).get("proxyWidgets")
    if order is None:
        order = [("-1", name) for name in inputs]
    found = {}
    for (number, name), value in zip(order, outer.get("widgets_values") or []):
        if value is None or name.startswith("$$"):  # the inner node's own value stands; a picture on the outer node
            continue
        widget = (int(number), name)
        targets = fed[name] if number == "-1" else next((ends for ends in fed.values() if widget in ends), [widget])
        found |= dict.fromkeys(targets, value)
    for name, value in outer.get("promoted", {}).items():  # this subgraph is itself inside one
        found |= dict.fromkeys(fed[name], value)
    linked = {socket["name"] for socket in outer["inputs"] if socket.get("link") is not None}
    for name in inputs:
        if name not in linked and not found.keys() >= set(fed[name]):
            raise ValueError(f"node {outer['id']} ({subgraph['name']}) has no value for {name}")
    return found


def _check_mode(node: dict) -> None:
    if node.get("mode", 0) != 0:
        raise ValueError(f"node {node['id']} ({node['type']}) is muted or bypassed")


def _widget_inputs(node: dict, info: dict) -> dict[str, Any]:
    """The node's widget values by name; the page saves them as a bare list in the order of the inputs."""
    values = iter(node.get("widgets_values") or [])
    found = {}
    for part in ("required", "optional"):
        for name, (kind, *rest) in info["input"].get(part, {}).items():
            options = rest[0] if rest else {}
            if not (isinstance(kind, list) or kind in WIDGETS) or options.get("forceInput"):
                continue
            try:
                found[name] = next(values)
            except StopIteration:
                if part == "optional":  # a newer host's input: its own default applies
                    continue
                if not node["type"].startswith("Rewind") and "default" in options:
                    found[name] = options["default"]  # newer hosts append to the required ones of their nodes too
                    continue
                raise ValueError(f"node {node['id']} ({node['type']}) has no value for {name}") from None
            # The page puts a widget of its own behind a seed ("randomize", "fixed" ...).
            if options.get("control_after_generate") or (kind == "INT" and name in {"seed", "noise_seed"}):
                next(values, None)
            # ... and an upload button behind a file.
            if any(options.get(f"{what}_upload") for what in ("image", "video", "audio")):
                next(values, None)
    if left := list(values):
        raise ValueError(f"node {node['id']} ({node['type']}) has {len(left)} widget values too many: {left}")
    return found
