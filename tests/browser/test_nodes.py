"""Every node of Rewind in the real page: the search finds it, it can be added, it explains itself."""

from __future__ import annotations

import re

import comfy_host
import pytest

HELP = comfy_host.ROOT / "web" / "docs"


def put(page, node_id: str) -> str:
    """Put a fresh node on the empty canvas, with room for its tooltips; its number."""
    page.js("rewindTest.clear()")
    script = (
        "type => { const n = LiteGraph.createNode(type); n.pos = [320, 160]; app.graph.add(n); return String(n.id) }"
    )
    number = page.js(script, node_id)
    page.until("id => rewindTest.drawn(id)", number)
    return number


def test_the_page_starts_without_a_complaint_of_ours(window):
    assert window.startup_problems == []


def test_every_node_is_found_by_its_name_and_added(page, info):
    assert len(info) >= 10
    for node_id, node in info.items():
        page.js("rewindTest.clear()")
        page.add(node["display_name"])
        (added,) = page.nodes()
        assert (added["type"], added["title"], added["known"]) == (node_id, node["display_name"], True)


def test_every_node_is_found_by_its_aliases(page, info):
    aliases = [(alias, node["display_name"]) for node in info.values() for alias in node.get("search_aliases") or []]
    if not any("search_aliases" in node for node in info.values()):
        pytest.skip("this host knows no search aliases")
    assert len(aliases) >= len(info)
    missing = []
    for alias, name in aliases:
        page.search(alias)
        missing += [] if page.found(name) else [(alias, name)]
    assert missing == []
    page.search("no such thing at all")
    assert not page.found(aliases[0][1], timeout=1), "the search finds whatever it is asked for"


def test_every_socket_and_widget_shows_its_tooltip(page, info):
    """The mouse is brought over each socket and widget, and the page has to show the words of the schema."""
    wrong, shown = [], 0
    for node_id, node in info.items():
        places = page.js("id => rewindTest.places(id)", put(page, node_id))
        inputs = {name: spec for part in ("required", "optional") for name, spec in node["input"].get(part, {}).items()}
        # A box for long text lies over the canvas, and the page explains none of those, its own neither.
        inputs = {name: spec for name, spec in inputs.items() if not spec[1].get("multiline")}
        wanted = [(places["inputs"].get(name), spec[1].get("tooltip"), name) for name, spec in inputs.items()]
        wanted += [(places["outputs"][str(i)], tip, i) for i, tip in enumerate(node["output_tooltips"])]
        wanted.append((places["title"], node["description"], "title"))
        for place, words, name in wanted:
            if not place or not words or not page.shows_tooltip(place, words):
                wrong.append((node_id, name, words, page.tooltip()))
            shown += 1
    assert wrong == []
    assert shown > 5 * len(info)


@pytest.mark.parametrize("node_id", sorted(path.stem for path in HELP.glob("*.md")))
def test_the_help_page_opens(page, info, node_id):
    """Select the node, press its info button: headings and pictures are those of web/docs, not made from tooltips."""
    assert node_id in info
    source = (HELP / f"{node_id}.md").read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.+)$", source, flags=re.MULTILINE)
    page.open_help(put(page, node_id), headings[0])
    help_page = page.js("rewindTest.help()")
    assert help_page["headings"] == headings
    pictures = {picture["file"].rsplit("/", 1)[-1]: picture["loaded"] for picture in help_page["pictures"]}
    assert pictures == dict.fromkeys(re.findall(r"!\[[^]]*\]\((?:[^)]*/)?([^)/]+)\)", source), True)
