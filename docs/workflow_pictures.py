"""The picture of each workflow's graph, `docs/workflows/`, and its thumbnail under Templates, `workflows/*.jpg`.

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
WORKFLOWS, FOLDER = ROOT / "workflows", ROOT / "docs" / "workflows"
SCALE, MARGIN = 0.8, 24  # of the graph in its picture; pixels around it
LIMIT = 250_000  # bytes of a picture
CARD, TILES = 512, 4  # pixels of a thumbnail, which Templates shows as a square; result frames in a row of it
DARK = (30, 30, 30)
PLAIN = {"Comfy.Minimap.Visible": False, "Comfy.Graph.CanvasInfo": False, "Comfy.Graph.CanvasMenu": False}


def graph_picture(page: ComfyPage) -> tuple[Image.Image, Image.Image]:
    """The whole open graph and nothing else of the page; the same without its note."""
    from PIL import Image

    page.page.set_viewport_size({"width": 1400, "height": 900})
    width, height, beside = page.js("arguments => rewindTest.frame(...arguments)", [SCALE, MARGIN])
    page.page.set_viewport_size({"width": width, "height": height})
    page.page.wait_for_timeout(1500)  # the page lays its canvas and the texts over it out again
    page.js("arguments => rewindTest.frame(...arguments)", [SCALE, MARGIN])
    page.page.wait_for_timeout(1500)
    graph = Image.open(io.BytesIO(page.page.screenshot())).convert("RGB")
    page.js("rewindTest.unframe()")
    page.page.set_viewport_size({"width": 1400, "height": 900})
    return graph, graph.crop((beside, 0, graph.width, graph.height))


def save_small(picture: Image.Image, file: Path) -> None:
    """As PNG of as many colours as the limit allows."""
    from PIL.Image import Quantize

    for colours in (256, 128, 64):
        picture.quantize(colours, method=Quantize.MAXCOVERAGE, kmeans=2, dither=0).save(file, optimize=True)
        if file.stat().st_size <= LIMIT:
            return
    raise ValueError(f"{file} is {file.stat().st_size} bytes; the limit is {LIMIT}")


def result_frames(page: ComfyPage) -> list[Image.Image]:
    """The pictures on the graph's nodes, those of the ends first: up to two rows of a thumbnail."""
    from PIL import Image

    nodes = sorted(page.nodes(), key=lambda node: not node["output"])
    shown = next((node["files"] for node in nodes if node["files"]), [])
    frames = [Image.open(io.BytesIO(page.page.request.get(file).body())).convert("RGB") for file in shown]
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

    files = [file for file in sorted(WORKFLOWS.glob("*.json")) if not names or file.stem in names]
    FOLDER.mkdir(exist_ok=True)
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
                page.open_file(file)
                if any(node["type"] == "RewindDemoClip" for node in json.loads(file.read_text())["nodes"]):
                    status = page.run()["status"]
                    if status["status_str"] != "success":
                        raise RuntimeError(f"{file.name}: {status['messages'][-1]}")
                page.page.wait_for_timeout(2000)  # pictures and films arrive after the run
                graph, nodes = graph_picture(page)
                save_small(graph, FOLDER / f"{file.stem}.png")
                thumbnail(nodes, result_frames(page)).save(file.with_suffix(".jpg"), quality=88, optimize=True)
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
