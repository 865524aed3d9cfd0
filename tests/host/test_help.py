"""A node's help page, its schema, its tooltips and the workflows tell the same."""

from __future__ import annotations

import importlib.util
import io
import re
from dataclasses import dataclass, field
from pathlib import Path

import comfy_host
import pytest
from PIL import Image

FOLDER = comfy_host.ROOT / "web" / "docs"
WORKFLOWS = comfy_host.ROOT / "workflows"
SECTIONS = ["Inputs", "Outputs", "Connects to", "Workflows", "Paper"]
LARGEST_PICTURE = 60_000  # bytes
SHORTEST_ADVICE = 15  # characters
IMAGES = {".jpg", ".png", ".gif", ".webp"}


@dataclass
class Page:
    """A help page taken apart."""

    title: str
    sections: dict[str, str]
    pictures: list[str]
    links: list[str]
    inputs: dict[str, tuple[str, str]] = field(default_factory=dict)  # name: (default or type, advice)
    outputs: dict[str, tuple[str, str]] = field(default_factory=dict)  # name: (type, what it is)


def rows(section: str) -> dict[str, tuple[str, str]]:
    """The rows of a section's table by the name in the first column; ValueError for a name that is there twice."""
    found: dict[str, tuple[str, str]] = {}
    for name, second, third in re.findall(r"^\| `([^`]+)` \| ([^|]*) \| ([^|]*) \|$", section, re.MULTILINE):
        if name in found:
            raise ValueError(f"{name} is there twice")
        found[name] = (second, third)
    if len(found) + 2 * bool(found) != sum(line.startswith("|") for line in section.splitlines()):
        raise ValueError("a row of the table is not `| `name` | ... | ... |`")
    return found


def read_page(text: str) -> Page:
    """Take a page's Markdown apart."""
    start, *parts = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)
    sections = dict(zip(parts[::2], parts[1::2]))
    images, links = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text), re.findall(r"(?<!!)\[[^\]]+\]\(([^)]+)\)", text)
    page = Page(re.match(r"# (.+)\n", start)[1], sections, images, links)
    page.inputs, page.outputs = rows(sections["Inputs"]), rows(sections["Outputs"])
    return page


def shown(value: object) -> str:
    """A default as a page writes it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def expected_inputs(info: dict) -> dict[str, str]:
    """Every input by its name, with what stands in the second column: the widget's default, or the socket's type."""
    found = {}
    for part in ("required", "optional"):
        for name, (kind, *rest) in info["input"].get(part, {}).items():
            options = rest[0] if rest else {}
            found[name] = shown(options["default"]) if "default" in options else kind
    return found


def options_of(info: dict, name: str) -> dict:
    (spec,) = [part[name] for part in info["input"].values() if name in part]
    return spec[1] if len(spec) > 1 else {}


def mistakes(page: Page, info: dict) -> list[str]:
    """Everything in which a page and the node's schema differ."""
    found = [f"the title is {page.title}"] if page.title != info["display_name"] else []
    if list(page.sections) != SECTIONS:
        found.append(f"the sections are {', '.join(page.sections)}")
    inputs = expected_inputs(info)
    outputs = dict(zip(info["output_name"], info["output"]))
    for kind, there, wanted in (("input", page.inputs, inputs), ("output", page.outputs, outputs)):
        found += [f"no {kind} {name} on the page" for name in wanted.keys() - there.keys()]
        found += [f"no {kind} {name} on the node" for name in there.keys() - wanted.keys()]
        for name in wanted.keys() & there.keys():
            if there[name][0] != wanted[name]:
                found.append(f"{name} is {wanted[name]}, the page says {there[name][0]}")
            if len(there[name][1]) < SHORTEST_ADVICE:
                found.append(f"no word on {name}")
    if not inputs and "None" not in page.sections["Inputs"]:
        found.append("it does not say that there are no inputs")
    for name in inputs.keys() & page.inputs.keys():
        options, advice = options_of(info, name), page.inputs[name][1]
        found += [
            f"{name}: no word on {choice}" for choice in options.get("options", []) if f"`{choice}`" not in advice
        ]
        if bool(options.get("advanced")) != advice.startswith("(advanced) "):
            found.append(f"{name}: (advanced) is there and should not be, or the other way round")
    return found


@pytest.fixture(scope="module")
def infos(host) -> dict[str, dict]:
    return {name: cls.GET_NODE_INFO_V1() for name, cls in host.own_nodes().items()}


@pytest.fixture(scope="module")
def pages() -> dict[str, Page]:
    return {file.stem: read_page(file.read_text(encoding="utf-8")) for file in FOLDER.glob("*.md")}


def test_every_node_has_a_page_and_every_page_a_node(infos, pages):
    assert sorted(pages) == sorted(infos)


def test_pages_and_schemas_tell_the_same(infos, pages):
    wrong = {name: mistakes(page, infos[name]) for name, page in pages.items()}
    assert {name: found for name, found in wrong.items() if found} == {}


def test_every_output_has_a_tooltip(infos):
    """The inputs' are held in test_loading.py."""
    for name, info in infos.items():
        tooltips = info["output_tooltips"] or []
        assert len(tooltips) == len(info["output"]) and all(tooltips), name


def test_pages_name_workflows_that_hold_the_node(pages):
    for name, page in pages.items():
        workflows = re.findall(r"`(\w+)`", page.sections["Workflows"])
        assert workflows, name
        for workflow in workflows:
            assert f'"{name}"' in (WORKFLOWS / f"{workflow}.json").read_text(encoding="utf-8"), (name, workflow)


def test_pages_name_the_paper(pages):
    for name, page in pages.items():
        paper = page.sections["Paper"]
        assert paper.strip().startswith("None: ") or re.search(r"arXiv \d{4}\.\d{5}", paper), name
        for shown_number, number in re.findall(r"\[arXiv (\S+?)\]\(https://arxiv\.org/abs/([^)]+)\)", paper):
            assert shown_number == number, name


def test_pages_show_pictures_that_exist(pages):
    """One at least; none that is too large for a page or that no page shows."""
    for name, page in pages.items():
        assert page.pictures, name
        for picture in page.pictures:
            file = FOLDER / picture
            assert file.stat().st_size < LARGEST_PICTURE, picture
            assert Image.open(file).width >= 400, picture
    shown_somewhere = {Path(picture) for page in pages.values() for picture in page.pictures}
    assert shown_somewhere == {file.relative_to(FOLDER) for file in FOLDER.rglob("*") if file.suffix in IMAGES}


def test_one_command_draws_every_picture(pages):
    spec = importlib.util.spec_from_file_location("help_pictures", comfy_host.ROOT / "docs" / "help_pictures.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    drawn = {(script.FOLDER / name).relative_to(FOLDER).as_posix() for name in script.PICTURES}
    assert drawn == {picture for page in pages.values() for picture in page.pictures}
    assert script.LIMIT <= LARGEST_PICTURE


def test_links_lead_out(pages):
    """The page in ComfyUI shows pictures relative to the folder, but opens links as they are."""
    for name, page in pages.items():
        assert [link for link in page.links if not link.startswith("https://")] == [], name


def test_the_server_hands_out_pages_and_pictures(server, pages):
    """At the addresses which the page in the browser asks for: the extension's folder, then the node's id."""
    root = f"/extensions/{comfy_host.PACK_NAME}/docs"
    for name, page in pages.items():
        assert server.get_bytes(f"{root}/{name}.md") == (FOLDER / f"{name}.md").read_bytes()
        for picture in page.pictures:
            Image.open(io.BytesIO(server.get_bytes(f"{root}/{picture}"))).verify()


def test_the_checks_can_fail(infos):
    """Each kind of mistake on a page is seen."""
    name = "RewindLatentNormalize"
    text = (FOLDER / f"{name}.md").read_text(encoding="utf-8")

    def seen(old: str, new: str) -> str:
        assert old in text
        return " ".join(mistakes(read_page(text.replace(old, new)), infos[name]))

    assert seen("# Latent Normalize", "# Latent Normalise") == "the title is Latent Normalise"
    assert "no input kind on the page" in seen("| `kind` |", "| `kinds` |")
    assert "no input kinds on the node" in seen("| `kind` |", "| `kinds` |")
    assert "no output normalized on the page" in seen("| `normalized` |", "| `normalised` |")
    assert "strength is 1, the page says 0.5" in seen("| `strength` | 1 |", "| `strength` | 0.5 |")
    assert "kind: no word on channel" in seen("`channel`", "channel")
    assert "the sections are" in seen("## Paper", "## Papers")
    assert "(advanced)" in seen("| MODEL | ", "| MODEL | (advanced) ")
    with pytest.raises(ValueError, match="twice"):
        seen("| `kind` |", "| `model` |")
    with pytest.raises(ValueError, match="a row"):
        seen("| `kind` |", "| kind |")
