"""The words of the nodes as the page shows them: taken from the schemas, and from `locales/`.

A text is named by its path in the file, as the page looks it up: `RewindDemoClip.inputs.seed.tooltip`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

SOURCE = "en"  # made from the schemas
LANGUAGES = ("ko", "ja", "zh")  # the page's own codes; its zh is simplified Chinese, zh-TW falls back to English
FILES = ("nodeDefs.json", "main.json")
SEEDS = ("seed", "noise_seed")  # to which the page adds the widget "control after generate" unasked
Tree = dict[str, Any]


def _key(name: str) -> str:
    """A name as the page looks it up: a dot would be a step down."""
    return name.replace(".", "_")


def node_texts(cls: type) -> Tree:
    """What one node says: its name, what it does, its inputs and outputs."""
    info = cls.GET_NODE_INFO_V1()
    inputs: Tree = {}
    for part in ("required", "optional"):
        for name, (_, *rest) in info["input"].get(part, {}).items():
            options = rest[0] if rest else {}
            inputs[_key(name)] = {"name": name} | ({"tooltip": options["tooltip"]} if options.get("tooltip") else {})
            if options.get("control_after_generate", name in SEEDS):
                inputs["control_after_generate"] = {"name": "control after generate"}
    outputs = {
        str(i): {"name": name} | ({"tooltip": tooltip} if tooltip else {})
        for i, (name, tooltip) in enumerate(zip(info["output_name"], info["output_tooltips"], strict=True))
    }
    texts = {"display_name": info["display_name"], "description": info["description"]}
    return texts | {"inputs": inputs, "outputs": outputs}


def english(classes: dict[str, type]) -> dict[str, Tree]:
    """The English files, from the node classes: {file name: content}."""
    segments = sorted({part for cls in classes.values() for part in cls.GET_NODE_INFO_V1()["category"].split("/")})
    nodes = {_key(name): node_texts(cls) for name, cls in sorted(classes.items())}
    return {"nodeDefs.json": nodes, "main.json": {"nodeCategories": {part: part for part in segments}}}


def flat(tree: Tree, prefix: str = "") -> dict[str, str]:
    """All texts by their paths; empty parts (a node without inputs) vanish."""
    found: dict[str, str] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        found |= flat(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return found


def read(folder: Path, language: str) -> dict[str, Tree]:
    """The files of one language; one that is missing is empty."""
    files = {name: folder / language / name for name in FILES}
    return {name: json.loads(f.read_text(encoding="utf-8")) if f.is_file() else {} for name, f in files.items()}


def write(file: Path, content: Tree) -> None:
    """Write a file the way all of them are written."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def all_texts(files: dict[str, Tree]) -> dict[str, str]:
    """The texts of all files of one language."""
    return {path: text for content in files.values() for path, text in flat(content).items()}


def stamp(text: str) -> str:
    """A short mark by which a changed text is told."""
    return hashlib.sha256(text.encode()).hexdigest()[:10]
