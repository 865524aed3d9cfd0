"""The host's node Context Windows (Manual), as tests set it."""

from __future__ import annotations

from typing import Any

import pytest

NODE = "ContextWindowsManual"
STATIC = {"context_length": 3, "context_overlap": 1, "dim": 0, "context_schedule": "standard_static"}


def known_inputs(host: Any) -> dict[str, Any]:
    """The inputs of the host's node, by name; the test is skipped on a host without it."""
    if NODE not in host.mappings:
        pytest.skip(f"ComfyUI {host.version} has no context windows node")
    known = host.mappings[NODE].INPUT_TYPES()
    return {**known["required"], **known.get("optional", {})}


def windowed(host: Any, model: Any, **settings: Any) -> Any:
    """A MODEL in static windows of three frames that share one. settings: of the node, in the place of those."""
    known_inputs(host)
    return host.run_node(NODE, model=model, **STATIC | settings)[0]
