"""Which layers of a video model mix its frames, and how Dreamix masks them (arXiv 2302.01329).

The paper trains on single frames "by replacing the temporal attention layers by trivial fixed masks ensuring the model
only pays attention within each frame, and also by masking the residual temporal convolution blocks" (quoted in a public
review). Here every frame goes in as a clip of its own, so temporal attention sees one frame, and what else the mask
means is one of two functions:

    identity   the sentence above: attention to the own frame still passes its value and output projections (a softmax
               over one frame is 1), temporal convolutions add nothing
    bypass     the temporal path is left out whole, as the host's image-only switch does on SVD's architecture

Two kinds of networks can be tuned: those with temporal layers of their own (Stable Video Diffusion's UNet in the
host's and in diffusers' classes, diffusers' UNet3DConditionModel), and video transformers that attend to space and time
at once (Wan), where a clip of one frame is all the mask there is and both words mean the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

MASKS = ("identity", "bypass")
# Parts of modules' names: the host's, then diffusers' for SVD's architecture and for UNet3DConditionModel.
TEMPORAL = ("time_stack", "temporal_transformer_blocks", "temporal_res_block", "temp_attentions", "temp_convs")
TEMPORAL += ("transformer_in",)


def is_temporal(name: str) -> bool:
    """Whether a layer of this name, with dots, mixes frames and does nothing else."""
    return any(part in TEMPORAL for part in name.split("."))


def architecture(network: nn.Module) -> str:
    """ "separate" for a UNet with temporal layers of its own, "joint" for a transformer over space and time.

    Raises ValueError for everything else: image models have no temporal layers, and what is unknown is not guessed at.
    """
    modules = dict(network.named_modules())
    if any(is_temporal(name) for name in modules):
        return "separate"
    patches = any("patch_embedding" in name and isinstance(module, nn.Conv3d) for name, module in modules.items())
    if patches and any(name.endswith(("self_attn", "attn1")) for name in modules):
        return "joint"
    raise ValueError(
        f"a {type(network).__name__} cannot be tuned on clips: it has no temporal layers, or none that are known. Use "
        "a video model of Stable Video Diffusion's architecture, a ModelScope-like UNet, or Wan"
    )


def _spatial_only(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """What an AlphaBlender gives where it takes the spatial path alone."""
    return kwargs["x_spatial"] if "x_spatial" in kwargs else args[0]


def _input_only(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """What a residual layer gives where its residual is 0, in the form of its own output."""
    given = args[0] if args else kwargs["hidden_states"]
    return (given,) if isinstance(output, tuple) else given


@contextmanager
def masked(network: nn.Module, mask: str = "identity") -> Iterator[None]:
    """Inside, clips of ONE frame pass the network with its temporal path masked; outside it is as it was.

    The mask holds for the backward pass too where that runs inside (layers that are recomputed see it again).
    Raises ValueError for another mask.
    """
    if mask not in MASKS:
        raise ValueError(f'the mask is "{mask}"; it must be one of {", ".join(MASKS)}')
    handles = []
    for name, module in network.named_modules():
        parent = network.get_submodule(name.rpartition(".")[0])
        last = name.rpartition(".")[2]
        if last == "time_mixer":
            in_attention = hasattr(parent, "transformer_blocks")
            hook = None if in_attention and mask == "identity" else _spatial_only
        elif name.split(".")[-2:-1] == ["temp_convs"]:
            hook = _input_only
        elif mask == "bypass" and (name.split(".")[-2:-1] == ["temp_attentions"] or last == "transformer_in"):
            hook = _input_only
        else:
            hook = None
        if hook is not None:
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
