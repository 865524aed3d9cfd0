"""A server on which a user's graph for large models runs: with the files that it loads, all of them tiny."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import comfy_host
import comfy_page
import native_models
import tiny_checkpoint
import tiny_encoders
from comfy_host import Server
from graph import to_api
from shipped import FOLDER, read
from torch import Tensor

STAND_INS = {"CLIPLoader": "TinyTextEncoder", "CLIPVisionLoader": "TinyImageEncoder"}


def _install(custom_nodes: Path) -> None:
    comfy_host.copy_pack(custom_nodes)
    for pack in (tiny_encoders, tiny_checkpoint):
        shutil.copy(pack.__file__, custom_nodes)


@contextmanager
def serving(base: Path, names: Iterable[str], weights: dict[str, dict[str, Tensor]]) -> Iterator[Server]:
    """A server in the folder `base` for the named workflows. weights: of the model's file, by the loader's type."""
    comfy_page.give_files(base, [FOLDER / f"{name}.json" for name in names])
    for node in (node for name in names for node in read(name)["nodes"] if node["type"] in weights):
        folder = comfy_page.MODEL_FOLDERS.get(node["type"], "checkpoints")
        native_models.write(weights[node["type"]], base / "models" / folder / node["widgets_values"][0])
    server = Server(Path(os.environ["REWIND_HOST"]), base, install=_install)
    try:
        yield server
    finally:
        server.stop()


def small(server: Server, name: str, sizes: dict[str, int]) -> dict:
    """A workflow in API form with stand-ins for its encoders. sizes: what its widgets of these names hold instead."""
    prompt = to_api(read(name), server.object_info())
    for node in prompt.values():
        if node["class_type"] in STAND_INS:
            node |= {"class_type": STAND_INS[node["class_type"]], "inputs": {}}
        node["inputs"] |= {key: value for key, value in sizes.items() if isinstance(node["inputs"].get(key), int)}
    return prompt
