"""The shipped workflows: run on the server as they were saved, and compared with each other."""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING, Any, NamedTuple

import comfy_host
import psutil
from graph import NOTES, flatten, to_api
from results import frames, node_of
from torch import Tensor

if TYPE_CHECKING:
    from comfy_host import Host, Server

FOLDER = comfy_host.ROOT / "workflows"
LONGEST = 90  # seconds of one core that a graph may take as it is shipped
# What only the graph for a user's own clip has: the clip brought to its size, and a film of the result.
OF_THE_USER = {"ImageFromBatch Clip's length", "ImageScale Clip's size", "CreateVideo ", "SaveVideo "}
Settings = dict[tuple[str, str, str], Any]  # by node, its title, and widget


def read(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def note(name: str) -> str:
    """What a workflow's one note says."""
    (text,) = [node["widgets_values"][0] for node in read(name)["nodes"] if node["type"] in NOTES]
    return text


def tunes(host: Host) -> bool:
    """Whether this host can copy a model, without which nothing is fine-tuned."""
    import comfy.model_patcher

    return "force_deepcopy" in inspect.signature(comfy.model_patcher.ModelPatcher.clone).parameters


class Ran(NamedTuple):
    """A graph that ran: its prompt in API form, the server's history, the pictures [T, H, W, 3] of one preview."""

    prompt: dict
    history: dict
    result: Tensor
    seconds: float  # of the processor


class Runs:
    """Graphs run as they were saved, each once, in a module's tests."""

    def __init__(self, server: Server):
        self.server, self.done = server, {}

    def __call__(self, name: str, title: str) -> Ran:
        """title: of the preview whose pictures are the result."""
        if name not in self.done:
            process = psutil.Process(self.server.process.pid)
            prompt = to_api(read(name), self.server.object_info())
            before = sum(process.cpu_times()[:2])
            history = self.server.prompt(prompt, timeout=900)
            seconds = sum(process.cpu_times()[:2]) - before
            result = frames(self.server, history, node_of(prompt, "PreviewImage", title))
            self.done[name] = Ran(prompt, history, result, seconds)
        return self.done[name]


def settings(nodes: list[dict], links: list, info: dict) -> Settings:
    """What the widgets of nodes hold, but for those that are connected."""
    named = {str(node["id"]): node.get("title", "") for node in nodes}
    found = {}
    for number, node in to_api({"nodes": nodes, "links": links}, info).items():
        for name, value in node["inputs"].items():
            if not isinstance(value, list):
                found[node["class_type"], named[number], name] = value
    return found


def inner_settings(workflow: dict, info: dict) -> tuple[Settings, Settings]:
    """Of the parts in a workflow's subgraph: with what its node holds for them, and what the page shows inside it."""
    flat = flatten(workflow)
    nodes = [node for node in flat["nodes"] if ":" in str(node["id"])]
    links = [link for link in flat["links"] if ":" in str(link[3]) and ":" in str(link[1])]
    inside = {link[0] for link in links}
    for node in nodes:  # what is connected from outside counts as a widget here
        for socket in node["inputs"]:
            socket["link"] = socket["link"] if socket["link"] in inside else None
    bare = [{key: value for key, value in node.items() if key != "promoted"} for node in nodes]
    return settings(nodes, links, info), settings(bare, links, info)


def behind_loaders(ends: dict[tuple, tuple]) -> dict[tuple, tuple]:
    """`graph.link_ends` of a graph for a user's own clip, as if the clip came as it is: without OF_THE_USER."""
    assert ends["ImageScale Clip's size", "image"] == ("ImageFromBatch Clip's length", "IMAGE")
    assert ends["ImageFromBatch Clip's length", "image"] == ("GetVideoComponents ", "images")
    assert {end for end, _ in ends} >= OF_THE_USER
    scaled, whole = ("ImageScale Clip's size", "IMAGE"), ("GetVideoComponents ", "images")
    kept = {end: start for end, start in ends.items() if end[0] not in OF_THE_USER}
    return {end: whole if start == scaled else start for end, start in kept.items()}


def refusals(server: Server, name: str) -> set[tuple[str, str]]:
    """For what the host refuses a workflow as it is: node types with their kinds of error. Fails if it takes it."""
    try:
        number = server.submit(to_api(read(name), server.object_info()))
    except ValueError as refusal:
        answer = json.loads(str(refusal).split(" 400 ", 1)[1])
        return {(node["class_type"], e["type"]) for node in answer["node_errors"].values() for e in node["errors"]}
    raise AssertionError(f"the host took {name} as prompt {number}")
