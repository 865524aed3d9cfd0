"""Every shipped workflow in the real page: opened from Templates, run, cancelled, saved, dropped back in."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from urllib.parse import urlencode

import comfy_host
import numpy as np
import pytest
from PIL import Image

FOLDER = comfy_host.ROOT / "workflows"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
CLIPS = {"RewindDemoClip", "RewindDemoTextEdit"}  # a workflow that starts from one of them needs no file of the user's


def read(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def all_nodes(workflow: dict) -> list[dict]:
    """The nodes of a saved workflow and of the subgraphs it defines."""
    inner = [node for graph in workflow.get("definitions", {}).get("subgraphs", []) for node in graph["nodes"]]
    return workflow["nodes"] + inner


def runs_as_it_is(name: str) -> bool:
    return any(node["type"] in CLIPS for node in read(name)["nodes"])


RUN = [
    pytest.param(name, marks=[] if name == "videoshop" else [pytest.mark.slow]) for name in NAMES if runs_as_it_is(name)
]
TUNING = {"RewindDreamixFineTune", "RewindEI2OneShotTune"}
SILENT = {"SaveLoRA"}  # writes a file and shows nothing
COSTS = "network evaluation|of main memory|frames at once;|frames through the VAE;"  # what nodes show of them


def wiring(workflow: dict) -> set[tuple]:
    """Each link as (from node, output's name, to node, input's name)."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    return {
        (start, nodes[start]["outputs"][output]["name"], end, nodes[end]["inputs"][entry]["name"])
        for _, start, output, end, entry, _ in workflow["links"]
    }


def settings(workflow: dict) -> dict[int, list]:
    return {node["id"]: list(node.get("widgets_values") or []) for node in workflow["nodes"]}


def mean_difference(picture: bytes, other: bytes) -> float:
    """Between two picture files of one size, in steps of 0 to 255: two decoders of a JPEG differ by less than one."""
    one, two = (np.asarray(Image.open(io.BytesIO(file)).convert("RGB"), dtype=float) for file in (picture, other))
    return float(abs(one - two).mean()) if one.shape == two.shape else 255.0


def test_there_are_workflows_to_test():
    assert "videoshop" in NAMES
    assert len(RUN) >= 3


@pytest.mark.parametrize("name", NAMES)
def test_opens_from_templates(page, name):
    thumbnail = page.open_template(name)
    assert mean_difference(thumbnail, (FOLDER / f"{name}.jpg").read_bytes()) < 2, "not the thumbnail of workflows/"
    nodes = page.nodes()
    assert sorted(node["type"] for node in nodes) == sorted(node["type"] for node in all_nodes(read(name)))
    assert [node["type"] for node in nodes if not node["known"]] == []
    assert page.overlaps() == []
    assert page.dialogs == []


def test_a_missing_node_is_seen(page):
    """The test above can fail: a node that the host does not have is not known to the page."""
    workflow = read("videoshop")
    workflow["nodes"][0]["type"] = "RewindNoSuchNode"
    page.drop("broken.json", json.dumps(workflow).encode(), "application/json")
    assert [node["type"] for node in page.nodes() if not node["known"]] == ["RewindNoSuchNode"]
    page.problems.clear()


def test_a_forgotten_mask_does_not_stay(page):
    """The page sometimes leaves its fading mask over the Run button for good; comfy_page.js takes it away."""
    mask = "p-blockui-mask p-overlay-mask-leave"
    page.js("name => document.body.append(Object.assign(document.createElement('div'), {className: name}))", mask)
    page.until("!document.querySelector('.p-blockui-mask')", timeout=20)


def can_tune(server, name: str) -> bool:
    """Whether this ComfyUI can run a workflow's fine-tuning, if it has one: 0.7.0 cannot copy a model."""
    tunes = any(node["type"] in TUNING for node in all_nodes(read(name)))
    return not tunes or "force_deepcopy" in (server.path / "comfy" / "model_patcher.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", RUN)
def test_runs_by_the_button(page, server, name):
    server.forget()
    page.open_file(FOLDER / f"{name}.json")
    run = page.run()
    assert dict(run["status"]["messages"])["execution_cached"]["nodes"] == [], "every node says what it costs"
    if not can_tune(server, name):
        message = json.dumps(run["status"]["messages"][-1])
        assert run["status"]["status_str"] == "error" and "needs a ComfyUI that can copy a model" in message
        page.problems.clear()
        page.reset()
        return
    assert run["status"]["status_str"] == "success", run["status"]["messages"][-1]
    samplers = [kind for kind, values in run["shown"]["progress"].items() if len(values) >= 3]
    assert samplers, f"no progress bar moved: {run['shown']['progress']}"
    assert any(len(run["shown"]["previews"].get(kind, [])) >= 2 for kind in samplers), "no preview picture changed"
    ends = [node for node in page.nodes() if node["output"] and node["type"] not in SILENT]
    assert ends
    page.js("arguments => rewindTest.frame(...arguments)", [0.4, 24])  # what is out of sight loads no picture
    for node in ends:
        page.until("id => rewindTest.hasResult(id)", node["id"])
    assert page.js("rewindTest.cutTexts()") == []
    page.js("rewindTest.unframe()")
    assert page.overlaps() == []


@pytest.fixture
def ran(page, server) -> Iterator[dict]:
    """videoshop.json opened and run with few steps: its history entry."""
    page.open_file(FOLDER / "videoshop.json")
    page.js("rewindTest.set('BasicScheduler', 'steps', 3)")
    run = page.run()
    assert run["status"]["status_str"] == "success", run["status"]["messages"][-1]
    yield run


def test_a_png_and_a_video_open_the_graph_that_made_them(page, server, ran):
    made = [entry for output in ran["outputs"].values() for entry in output.get("images", [])]
    graph = page.saved()
    for suffix, kind in ((".png", "image/png"), (".mp4", "video/mp4")):
        entry = next(entry for entry in made if entry["filename"].endswith(suffix))
        place = urlencode({key: entry[key] for key in ("filename", "subfolder", "type")})
        page.drop(f"dropped{suffix}", server.get_bytes(f"/view?{place}"), kind)
        opened = page.saved()
        assert wiring(opened) == wiring(graph)
        # A page as old as 0.7.0's saves what a node SHOWS, its costs, behind its values; opened, they are left out.
        shown = {
            number: [v for v in values if not re.search(COSTS, str(v))] for number, values in settings(graph).items()
        }
        assert settings(opened) == shown
        assert 3 in next(node["widgets_values"] for node in opened["nodes"] if node["type"] == "BasicScheduler")


def test_cancel(page, server):
    """Cancel in the middle of the inversion: it stops there, and the next run goes through."""
    page.open_file(FOLDER / "videoshop.json")
    page.js("rewindTest.set('BasicScheduler', 'steps', 400)")
    before = set(server.get("/history"))
    page.press_run()
    page.until("rewindTest.shown.progress.RewindEDMInversion?.length >= 2", timeout=300)
    page.press_cancel()
    stopped = page.finish(before)
    assert any(kind == "execution_interrupted" for kind, _ in stopped["status"]["messages"])
    assert max(stopped["shown"]["progress"]["RewindEDMInversion"]) < 0.5
    assert not any(node["pictures"] for node in page.nodes() if node["type"] == "PreviewImage")
    page.js("rewindTest.set('BasicScheduler', 'steps', 2)")
    assert page.run()["status"]["status_str"] == "success"


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_dropped_back_in_it_is_unchanged(page, name):
    page.open_file(FOLDER / f"{name}.json")
    shipped, saved = read(name), page.saved()
    assert wiring(saved) == wiring(shipped)
    for number, values in settings(shipped).items():
        # A newer host's page adds the values of widgets that the graph does not know yet.
        assert settings(saved)[number][: len(values)] == values
    page.drop(f"{name}.json", json.dumps(saved).encode(), "application/json")
    again = page.saved()
    for graph in (saved, again):
        graph["extra"].pop("ds", None)  # where one looks, and how closely
        for node in graph["nodes"]:
            if node["type"] == "PreviewAny":  # its "values" are what it shows
                del node["widgets_values"]
    assert again == saved
