"""The nodes' words in each language: nothing missing, nothing stale, nothing forgotten in English.

English is made from the schemas: `REWIND_UPDATE_LOCALES=1` writes `locales/en` anew. Where an English text changes,
every translation of it is stale until somebody has looked at it; `REWIND_TRANSLATED="ko ja"` then says for which
languages that is done (it stamps what is there into `golden/translated_from.json`). Both work with the command of
one host: `REWIND_HOST=... pytest tests/host/test_locales.py`.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import comfy_host
import node_texts
import pytest

FOLDER = comfy_host.ROOT / "locales"
STAMPS = Path(__file__).parent / "golden" / "translated_from.json"
SCRIPTS = {"ko": r"[가-힣]", "ja": r"[ぁ-んァ-ヶ]", "zh": r"[一-鿿]"}  # letters that a sentence in it must have
FOREIGN = {"ko": r"[ぁ-んァ-ヶ]", "ja": r"[가-힣]", "zh": r"[가-힣ぁ-んァ-ヶ]"}  # and those it cannot have
SENTENCE = 25  # an English text longer than this is a sentence, and no name that may stay as it is
NO_TEXT = ("{", "}", "@", "|", "$")  # what the page's translation library takes for its own syntax
each_language = pytest.mark.parametrize("language", node_texts.LANGUAGES)


@pytest.fixture(scope="module")
def schemas(host) -> dict[str, dict]:
    """The English files as the schemas give them."""
    return node_texts.english(host.own_nodes())


@pytest.fixture(scope="module")
def english(schemas) -> dict[str, str]:
    return node_texts.all_texts(schemas)


def translated(language: str) -> dict[str, str]:
    return node_texts.all_texts(node_texts.read(FOLDER, language))


def wrong_keys(english: dict[str, str], texts: dict[str, str]) -> dict[str, list[str]]:
    """What is not translated, and what is translated and no longer there."""
    return {"missing": sorted(english.keys() - texts.keys()), "stale": sorted(texts.keys() - english.keys())}


def changed_since(english: dict[str, str], stamps: dict[str, str]) -> list[str]:
    """The texts whose English is not the one that the translation was made from."""
    return sorted(path for path, text in english.items() if stamps.get(path) != node_texts.stamp(text))


def forgotten(english: dict[str, str], texts: dict[str, str], language: str) -> list[str]:
    """Sentences that are still English, and texts with letters of another language."""
    found = []
    for path, text in texts.items():
        sentence = len(english.get(path, "")) > SENTENCE and not path.endswith(".name")
        if sentence and (text == english[path] or not re.search(SCRIPTS[language], text)):
            found.append(path)
        elif re.search(FOREIGN[language], text):
            found.append(path)
    return found


def short_name(name: str) -> str:
    """A node's name without the paper's English term in parentheses."""
    return re.split(r" ?[(（]", name)[0]


def lost(english: dict[str, str], texts: dict[str, str]) -> list[str]:
    """Facts of an English text that its translation lacks: numbers, "options", names of our nodes and inputs."""
    names = {path: text for path, text in english.items() if path.endswith(".display_name")}
    places = {text: path for path, text in english.items() if path.endswith(".name")}
    found = []
    for path, text in english.items():
        if path.endswith((".name", ".display_name")):
            continue
        there = texts.get(path, "")
        facts = {number: {number} for number in re.findall(r"\d+(?:\.\d+)?", text)}
        facts |= {f'"{word}"': {f'"{word}"'} for word in re.findall(r'"(\w+)"', text)}
        facts |= {
            name: {short_name(texts.get(where, name))} for where, name in names.items() if short_name(name) in text
        }
        words = re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", text)
        facts |= {word: {word, texts.get(places.get(word, ""), word)} for word in words}
        found += [f"{path}: {fact}" for fact, forms in facts.items() if not any(form in there for form in forms)]
    return found


def test_english_is_what_the_schemas_say(schemas):
    if os.environ.get("REWIND_UPDATE_LOCALES"):
        for name, content in schemas.items():
            node_texts.write(FOLDER / node_texts.SOURCE / name, content)
    files = node_texts.read(FOLDER, node_texts.SOURCE)
    for name in node_texts.FILES:
        assert files[name] == schemas[name], "a text changed; if that is meant: REWIND_UPDATE_LOCALES=1 make test"


def test_the_languages_are_these():
    assert {folder.name for folder in FOLDER.iterdir()} == {node_texts.SOURCE, *node_texts.LANGUAGES}


@each_language
def test_no_text_is_missing_or_stale(english, language):
    assert wrong_keys(english, translated(language)) == {"missing": [], "stale": []}


@each_language
def test_no_translation_is_older_than_its_english(english, language):
    stamps = json.loads(STAMPS.read_text(encoding="utf-8")) if STAMPS.is_file() else {}
    if language in os.environ.get("REWIND_TRANSLATED", "").split():
        stamps[language] = {path: node_texts.stamp(text) for path, text in sorted(english.items())}
        node_texts.write(STAMPS, stamps)
    texts = translated(language)
    changed = changed_since(english, stamps.get(language, {}))
    listed = "\n".join(f"{path}\n  now {english[path]}\n  {language}  {texts.get(path)}" for path in changed)
    assert changed == [], f"look at these, then REWIND_TRANSLATED={language}:\n{listed}"


@each_language
def test_no_translation_was_forgotten(english, language):
    texts = translated(language)
    assert forgotten(english, texts, language) == []
    assert [path for path, text in texts.items() if text.strip() != text or not text] == []


@each_language
def test_translations_hold_what_the_english_says(english, language):
    assert lost(english, translated(language)) == []


@pytest.mark.parametrize("language", (node_texts.SOURCE, *node_texts.LANGUAGES))
def test_no_text_is_syntax_to_the_page(language):
    """The page compiles some of them as messages, in which these have a meaning."""
    assert [path for path, text in translated(language).items() if any(sign in text for sign in NO_TEXT)] == []


@each_language
def test_names_in_one_node_differ(language):
    """Two inputs, or two outputs, of one node cannot be told apart by one name."""
    nodes = node_texts.read(FOLDER, language)["nodeDefs.json"]
    for node, texts in nodes.items():
        for part in ("inputs", "outputs"):
            names = [entry["name"] for entry in texts[part].values()]
            assert len(set(names)) == len(names), (node, part)
    assert len({texts["display_name"] for texts in nodes.values()}) == len(nodes)


def test_the_checks_can_fail():
    english = {"N.display_name": "Some Node", "N.inputs.a.tooltip": 'Above 1.5 "random" is Some Node of first_guess.'}
    korean = {
        "N.display_name": "어떤 노드 (Some Node)",
        "N.inputs.a.tooltip": '1.5 위에서 "random" 어떤 노드 first_guess',
    }
    stamps = {path: node_texts.stamp(text) for path, text in english.items()}
    assert wrong_keys(english, korean) == {"missing": [], "stale": []}
    assert changed_since(english, stamps) == forgotten(english, korean, "ko") == lost(english, korean) == []

    path = "N.inputs.a.tooltip"
    assert wrong_keys(english, {"N.display_name": "", "N.old": ""}) == {"missing": [path], "stale": ["N.old"]}
    assert changed_since({**english, path: "Above 1.6"}, stamps) == [path]
    assert forgotten(english, {path: english[path]}, "ko") == [path]
    assert forgotten(english, {path: "漢字だけではない"}, "zh") == [path]
    assert len(lost(english, korean | {path: "아무 말이나"})) == 4


def test_the_server_hands_them_out(server):
    answer = server.get("/i18n")
    for language in (node_texts.SOURCE, *node_texts.LANGUAGES):
        files = node_texts.read(FOLDER, language)
        assert answer[language]["nodeDefs"] == files["nodeDefs.json"]
        assert answer[language]["nodeCategories"] == files["main.json"]["nodeCategories"]
