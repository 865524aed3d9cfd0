"""The real page in Korean, Japanese and Chinese: Rewind's nodes carry the words of `locales/`."""

from __future__ import annotations

from collections.abc import Iterator

import comfy_host
import comfy_page
import node_texts
import pytest

NAMES = """id => {
  const node = app.graph.getNodeById(id);
  const name = (entry) => entry.localized_name ?? entry.label ?? entry.name;
  return {
    title: node.title,
    inputs: Object.fromEntries(node.inputs.map((input) => [input.name, name(input)])),
    widgets: Object.fromEntries((node.widgets ?? []).map((widget) => [widget.name, widget.label ?? widget.name])),
    outputs: node.outputs.map(name),
    category: node.constructor.nodeData.category,
  };
}"""


@pytest.fixture
def speaking(request, window, server) -> Iterator[tuple[str, comfy_page.ComfyPage]]:
    """A second page of the same server, whose user has chosen another language."""
    language = request.param
    server.post("/settings/Comfy.Locale", language)
    page = comfy_page.ComfyPage(window.page.context.browser, server)
    yield language, page
    page.page.context.close()
    server.post("/settings/Comfy.Locale", node_texts.SOURCE)


@pytest.mark.parametrize("speaking", node_texts.LANGUAGES, indirect=True)
def test_nodes_are_named_and_explained_in_it(speaking, info):
    language, page = speaking
    files = node_texts.read(comfy_host.ROOT / "locales", language)
    texts, categories = files["nodeDefs.json"], files["main.json"]["nodeCategories"]
    wrong = []
    for node_id, node in info.items():
        page.js("rewindTest.clear()")
        number = page.js("type => rewindTest.put(type, [320, 160])", node_id)
        page.until("id => rewindTest.drawn(id)", number)
        shown, words = page.js(NAMES, number), texts[node_id]
        inputs = {name: entry["name"] for name, entry in words["inputs"].items()}
        pairs = [(shown["title"], words["display_name"])]
        pairs += [(name, inputs.get(key)) for key, name in (shown["inputs"] | shown["widgets"]).items()]
        pairs += list(zip(shown["outputs"], [entry["name"] for entry in words["outputs"].values()], strict=True))
        pairs.append((shown["category"], "/".join(categories[part] for part in node["category"].split("/"))))
        wrong += [(node_id, *pair) for pair in pairs if pair[0] != pair[1]]
    assert wrong == []

    number = page.js("type => { rewindTest.clear(); return rewindTest.put(type, [320, 160]) }", "RewindSVDDenoise")
    page.until("id => rewindTest.drawn(id)", number)
    places = page.js("id => rewindTest.places(id)", number)
    for name, entry in texts["RewindSVDDenoise"]["inputs"].items():
        assert page.shows_tooltip(places["inputs"][name], entry["tooltip"]), (name, page.tooltip())
    assert page.shows_tooltip(places["outputs"]["0"], texts["RewindSVDDenoise"]["outputs"]["0"]["tooltip"])
    assert page.shows_tooltip(places["title"], texts["RewindSVDDenoise"]["description"])
