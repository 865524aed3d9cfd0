"""What a custom node could change in its host without being asked: everything its modules and classes hold."""

from __future__ import annotations

import inspect
import logging
import sys
import types
from pathlib import Path
from typing import Any

# What a host grows by when any pack loads. All else must stay as it was.
REGISTRIES = {
    "nodes.NODE_CLASS_MAPPINGS",
    "nodes.NODE_DISPLAY_NAME_MAPPINGS",
    "nodes.LOADED_MODULE_DIRS",
    "nodes.EXTENSION_WEB_DIRS",
    "folder_paths.folder_names_and_paths",
    "folder_paths.filename_list_cache",  # what a folder held when a list of its files was last asked for
    "api_server.routes.internal.internal_routes.folder_names_and_paths",  # the same one
}
WATCHED_LIBRARIES = ("torch", "torch.nn", "torch.nn.functional", "torch.nn.modules.module", "torch.nn.modules.linear")


def snapshot(host: Path) -> dict[str, Any]:
    """name -> identity: each attribute of the host's modules and classes, and the contents of its lists and dicts."""
    import torch

    state: dict[str, Any] = {
        "torch default dtype": torch.get_default_dtype(),
        "torch grad enabled": torch.is_grad_enabled(),
        "torch threads": torch.get_num_threads(),
        "torch deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "matmul precision": torch.get_float32_matmul_precision(),
        "logging": (logging.getLogger().level, len(logging.getLogger().handlers)),
        "excepthook": id(sys.excepthook),
        "path": tuple(sys.path),
    }
    inside = f"{host}/"
    for module_name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if not (file.startswith(inside) or module_name in WATCHED_LIBRARIES):
            continue
        for name, value in list(vars(module).items()):
            if name.startswith("__") or isinstance(value, types.ModuleType):
                continue
            state.update(_describe(f"{module_name}.{name}", value))
            if inspect.isclass(value) and value.__module__ == module_name:
                for member, held in list(vars(value).items()):
                    if not member.startswith("__") or callable(held):
                        state.update(_describe(f"{module_name}.{name}.{member}", held))
    return state


def _describe(name: str, value: Any) -> dict[str, Any]:
    described: dict[str, Any] = {name: id(value)}
    if isinstance(value, (int, float, str, bool, type(None), tuple)):
        described[name] = repr(value)
    elif name in REGISTRIES:
        described |= {f"{name}[{key!r}]": id(held) for key, held in value.items()}
    elif isinstance(value, dict):
        described[f"{name} (contents)"] = [(repr(key), id(held)) for key, held in list(value.items())]
    elif isinstance(value, (list, set)):
        described[f"{name} (contents)"] = [id(held) for held in value]
    return described


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names whose value is another one afterwards; names that are new count only inside what was there before."""
    changed = [name for name, value in before.items() if after.get(name, "gone") != value]
    owners = {name.rsplit(".", 1)[0] for name in before}
    registered = tuple(f"{name}[" for name in REGISTRIES)
    added = [n for n in after.keys() - before.keys() if n.rsplit(".", 1)[0] in owners and not n.startswith(registered)]
    return sorted(changed + added)
