"""From a workflow as the page saves it (nodes, links, widget values) to what the page posts to /prompt."""

from __future__ import annotations

from typing import Any

NOTES = {"Note", "MarkdownNote"}
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"}


def to_api(workflow: dict, object_info: dict) -> dict[str, dict]:
    """The workflow in API form. `object_info` is the running host's own, so a node it does not know is an error."""
    if workflow.get("definitions", {}).get("subgraphs"):
        raise ValueError("subgraphs are not expanded here: keep the shipped graphs flat")
    origin = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        if node.get("mode", 0) != 0:
            raise ValueError(f"node {node['id']} ({node['type']}) is muted or bypassed")
        if node["type"] not in object_info:
            raise ValueError(f"the host has no node {node['type']}")
        inputs = _widget_inputs(node, object_info[node["type"]])
        for socket in node.get("inputs", []):
            if socket.get("link") is not None:
                inputs[socket["name"]] = origin[socket["link"]]
        prompt[str(node["id"])] = {
            "class_type": node["type"],
            "inputs": inputs,
            "_meta": {"title": node.get("title", node["type"])},
        }
    return prompt


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
