"""Node schemas that every supported host accepts, and what the nodes say of themselves in common.

One keyword that a host does not know makes its schema raise, which unloads the whole pack; so what is newer than the
oldest supported host is filtered by what the running one knows.
"""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from server import PromptServer

_KNOWN = set(io.Schema.__dataclass_fields__)

InversionType = io.Custom("REWIND_INVERSION")
EI2WeightsType = io.Custom("REWIND_EI2_WEIGHTS")
OpticalFlowType = io.Custom("OPTICAL_FLOW")  # the host's own, from 0.33's Load Optical Flow Model

# `advanced` is a keyword of inputs on newer hosts only; as an extra entry every host passes it on to the page.
ADVANCED = {"advanced": True}


def Schema(**fields: Any) -> io.Schema:
    """`io.Schema` without the keywords that the running host does not know (search_aliases on 0.7 for example)."""
    return io.Schema(**{name: value for name, value in fields.items() if name in _KNOWN})


def show_text(node_id: str | None, text: str) -> None:
    """Show a text on a node, as the host's GetImageSize does; it stays until the page is loaded again."""
    if node_id is not None:
        PromptServer.instance.send_progress_text(text, node_id)
