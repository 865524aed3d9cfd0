"""The picture of each workflow's graph, `docs/workflows/`, its thumbnail under Templates, `workflows/*.jpg`, and each
Rewind node as it stands in a graph, `docs/nodes/`.

    .venv/bin/python docs/workflow_pictures.py [WORKFLOW ...]

Each graph is opened in the real page of the first ComfyUI that `make test` would use, in headless Chromium, and run
there if it runs on the embedded models. Run it again after the weights, a default or a graph changed; it takes some
minutes on a CPU. It starts itself again in that ComfyUI's environment.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comfy_page import ComfyPage
    from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS, FOLDER, NODES = ROOT / "workflows", ROOT / "docs" / "workflows", ROOT / "docs" / "nodes"
SCALE, MARGIN = 0.8, 24  # of the graph in its picture; pixels around it
SURROUNDINGS = 60  # pixels around a node in its own picture: where its wires come from and go to
LIMIT = 250_000  # bytes of a picture
CARD, TILES = 512, 4  # pixels of a thumbnail, which Templates shows as a square; result frames in a row of it
DARK = (30, 30, 30)
DEMOS = {"RewindDemoClip", "RewindDemoTextEdit"}  # a graph that begins with one of them needs no file of the user's
PLAIN = {"Comfy.Minimap.Visible": False, "Comfy.Graph.CanvasInfo": False, "Comfy.Graph.CanvasMenu": False}


def homes() -> dict[str, Path]:
    """The workflow that each Rewind node's picture is taken from: the first that has it on its canvas."""
    found: dict[str, Path] = {}
    for file in sorted(WORKFLOWS.glob("*.json")):
        for node in json.loads(file.read_text(encoding="utf-8"))["nodes"]:
            if node["type"].startswith("Rewind"):
                found.setdefault(node["type"], file)
    return found


def graph_picture(page: ComfyPage) -> tuple[Image.Image, Image.Image, dict[str, Image.Image]]:
    """The whole open graph and nothing else of the page; the same without its note; each kind of node in it."""
    from PIL import Image

    page.page.set_viewport_size({"width": 1400, "height": 900})
    width, height, beside = page.js("arguments => rewindTest.frame(...arguments)", [SCALE, MARGIN])
    page.page.set_viewport_size({"width": width, "height": height})
    page.page.wait_for_timeout(1500)  # the page lays its canvas and the texts over it out again
    page.js("arguments => rewindTest.frame(...arguments)", [SCALE, MARGIN])
    page.page.wait_for_timeout(1500)
    graph = Image.open(io.BytesIO(page.page.screenshot())).convert("RGB")
    nodes = {}
    for kind, left, top, right, bottom in page.js("rewindTest.boxes()"):
        around = (left - SURROUNDINGS, top - MARGIN, right + SURROUNDINGS, bottom + MARGIN)
        inside = (max(0, around[0]), max(0, around[1]), min(graph.width, around[2]), min(graph.height, around[3]))
        nodes.setdefault(kind, graph.crop(inside))
    page.js("rewindTest.unframe()")
    page.page.set_viewport_size({"width": 1400, "height": 900})
    return graph, graph.crop((beside, 0, graph.width, graph.height)), nodes


def save_small(picture: Image.Image, file: Path) -> None:
    """As PNG of as many colours as the limit allows."""
    from PIL.Image import Quantize

    for colours in (256, 128, 64):
        picture.quantize(colours, method=Quantize.MAXCOVERAGE, kmeans=2, dither=0).save(file, optimize=True)
        if file.stat().st_size <= LIMIT:
            return
    raise ValueError(f"{file} is {file.stat().st_size} bytes; the limit is {LIMIT}")


def result_frames(page: ComfyPage) -> list[Image.Image]:
    """The pictures on the graph's end that lies farthest to the right, the result: up to two rows of a thumbnail."""
    from PIL import Image

    shown = [node for node in page.nodes() if node["files"]]
    last = max(shown, key=lambda node: (node["output"], node["left"]), default={"files": []})
    frames = [Image.open(io.BytesIO(page.page.request.get(file).body())).convert("RGB") for file in last["files"]]
    return frames[: 2 * TILES]


def thumbnail(graph: Image.Image, frames: list[Image.Image]) -> Image.Image:
    """A square: the graph above, the result's frames below, each as large as fits."""
    from PIL import Image, ImageOps

    card = Image.new("RGB", (CARD, CARD), DARK)
    columns = min(TILES, len(frames)) or 1
    rows = -(-len(frames) // columns)
    tile = CARD // max(columns, 2)
    left = CARD - rows * tile
    top = ImageOps.contain(graph, (CARD, left))
    card.paste(top, ((CARD - top.width) // 2, (left - top.height) // 2))
    indent = (CARD - columns * tile) // 2
    for number, frame in enumerate(frames):
        picture = ImageOps.pad(frame, (tile - 4, tile - 4), color=DARK)
        card.paste(picture, (indent + number % columns * tile + 2, left + number // columns * tile + 2))
    return card


def draw(names: list[str]) -> None:
    """Make the pictures of these workflows, all if there are none."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    import comfy_host
    import comfy_page

    files, home = [file for file in sorted(WORKFLOWS.glob("*.json")) if not names or file.stem in names], homes()
    FOLDER.mkdir(exist_ok=True)
    NODES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, comfy_page.browser() as browser:
        base = Path(temporary)
        comfy_page.prepare_user(base, **PLAIN)
        comfy_page.give_files(base, files)
        server = comfy_host.Server(
            Path(os.environ["REWIND_HOST"]), base, install=lambda folder: comfy_host.copy_pack(folder, "rewind")
        )
        try:
            page = comfy_page.ComfyPage(browser, server)
            for file in files:
                page.reset()
                server.forget()
                page.open_file(file)
                if any(node["type"] in DEMOS for node in json.loads(file.read_text(encoding="utf-8"))["nodes"]):
                    status = page.run()["status"]
                    if status["status_str"] != "success":
                        raise RuntimeError(f"{file.name}: {status['messages'][-1]}")
                page.page.wait_for_timeout(2000)  # pictures and films arrive after the run
                graph, plain, nodes = graph_picture(page)
                save_small(graph, FOLDER / f"{file.stem}.png")
                for kind, picture in nodes.items():
                    if home.get(kind) == file:
                        save_small(picture, NODES / f"{kind}.png")
                thumbnail(plain, result_frames(page)).save(file.with_suffix(".jpg"), quality=88, optimize=True)
                size, overlaps = f"{graph.width} x {graph.height}", page.overlaps()
                print(f"{file.stem}: {size}, nodes over one another: {overlaps or 'none'}", flush=True)
        finally:
            server.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted(file.stem for file in WORKFLOWS.glob("*.json"))
    parser.add_argument("workflows", nargs="*", metavar="WORKFLOW", choices=[[], *known])
    names = parser.parse_args().workflows
    if os.environ.get("REWIND_HOST"):
        draw(names)
        return 0
    sys.path.insert(0, str(ROOT / "tests"))
    import run

    return run.in_a_host(__file__, *names)


if __name__ == "__main__":
    sys.exit(main())
