"""EI²'s modules on a MODEL by the host's hooks: replaced self-attention, the middle patch, weight patches."""

from __future__ import annotations

import re
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor, nn

from ...pipelines.ei2.inflation import Inflation, InflationSettings, chosen_blocks, transformer_blocks
from ...pipelines.ei2.weights import PREFIX, EI2Weights

DIFFS = "rewind_ei2"  # the attachment that names our weight patches
Key = tuple[str, int, int]  # of a block in the host's patches: ("input", 1, 0)


def network_blocks(model: Any) -> list[str]:
    """The names of the blocks of a MODEL's UNet. ValueError for a model that EI² does not take."""
    return list(transformer_blocks(model.model.diffusion_model))


def block_key(name: str) -> Key:
    """ "input_blocks.1.1.transformer_blocks.0" as ("input", 1, 0)."""
    part, *numbers = name.partition("_")[0], *map(int, re.findall(r"\d+", name))
    return (part, 0 if part == "middle" else numbers[0], numbers[-1])


def clip_frames(batch: int, extra: dict[str, Any]) -> int:
    """Frames of each clip in a batch of tokens: the host puts its conditions' clips in a row."""
    return batch // max(1, len(extra.get("cond_or_uncond", [0])))


class _Shared:
    """What a copy of a MODEL shares with it. Older hosts copy all options deeply, tensors and all, with every clone."""

    def __deepcopy__(self, memo: dict) -> _Shared:
        return self


class FrameAttention(_Shared):
    """A replacement of a block's self-attention by an inflation's."""

    def __init__(self, inflation: Inflation):
        self.inflation = inflation

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
            precision = extra.get("attn_precision")
            return optimized_attention(q, k, v, heads, attn_precision=precision, transformer_options=extra)

        grid = tuple(extra["activations_shape"][-2:])
        frames = clip_frames(len(q), extra)
        return self.inflation.attention(q, k, v, frames, grid, extra["n_heads"], attend)


class TemporalPatch(_Shared):
    """A middle patch: an inflation's temporal modules. modules: the same ones, as the host loads and unloads them."""

    def __init__(self, inflation: Inflation, modules: Any | None = None):
        self.inflation, self.modules = inflation, modules
        self.names = {block_key(name): name for name in inflation.blocks}

    def models(self) -> list[Any]:
        """What the host loads beside the model."""
        return [] if self.modules is None else [self.modules]

    def __call__(self, x: Tensor, extra: dict[str, Any]) -> Tensor:
        block = extra.get("block")
        name = None if block is None else self.names.get((*block, extra.get("block_index", 0)))
        residual = None if name is None else self.inflation.residual(name, x, clip_frames(len(x), extra))
        return x if residual is None else x + residual


def put_on(options: dict[str, Any], inflation: Inflation, modules: Any | None = None) -> None:
    """Put an inflation into a MODEL's transformer options, which are changed; ours that is there already is replaced.

    Raises ValueError where another pack has replaced the self-attention of a block.
    """
    take_off(options)
    replaced = options.setdefault("patches_replace", {})
    attentions = replaced["attn1"] = dict(replaced.get("attn1", {}))
    if inflation.settings.attention != "own frame":
        attention = FrameAttention(inflation)
        for name in inflation.blocks:
            key = block_key(name)
            other = attentions.get(key, attentions.get(key[:2]))
            if other is not None and not isinstance(other, FrameAttention):
                raise ValueError(
                    f"the self-attention of {name} is replaced already (by {other.__module__}), and only one patch can "
                    'do that: take the other off, choose other blocks here, or the attention "own frame"'
                )
            # Not by the transformer's index: the host would pass over what others (PAG) set for the block as a whole.
            attentions[key[:2]] = attention
    if inflation.temporal:
        patches = options.setdefault("patches", {})
        patches["middle_patch"] = [*patches.get("middle_patch", []), TemporalPatch(inflation, modules)]


def take_off(options: dict[str, Any]) -> None:
    """Take ours out of a MODEL's transformer options, which are changed."""
    attentions = options.get("patches_replace", {}).get("attn1", {})
    for key in [key for key, patch in attentions.items() if isinstance(patch, FrameAttention)]:
        del attentions[key]
    patches = options.get("patches", {})
    if "middle_patch" in patches:
        patches["middle_patch"] = [p for p in patches["middle_patch"] if not isinstance(p, TemporalPatch)]


def _compute_dtype(model: Any) -> torch.dtype:
    return model.model.manual_cast_dtype or model.model.get_dtype()


def _castable(layer: nn.Linear) -> nn.Linear:
    """A layer of the host's, which it may leave on another device than that on which it is used."""
    made = comfy.ops.manual_cast.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    made.weight, made.bias = layer.weight, layer.bias
    return made


def _modules(model: Any, weights: EI2Weights, chosen: list[str]) -> tuple[dict[str, Any], Any]:
    """The temporal modules of some blocks, and what the host loads them as."""
    modules = weights.temporal(model.model.diffusion_model)
    modules = {name: module for name, module in modules.items() if name in chosen}
    for module in modules.values():
        for name, layer in list(module.named_children()):
            setattr(module, name, _castable(layer))
    whole = nn.ModuleList(modules.values()).to(_compute_dtype(model))
    offload = comfy.model_management.unet_offload_device()
    patcher = comfy.model_patcher.ModelPatcher(whole.to(offload), load_device=model.load_device, offload_device=offload)
    return modules, patcher


def _take_off_diffs(model: Any) -> None:
    """Remove our weight patches from a MODEL of our own."""
    ours = {id(diff) for diff in model.get_attachment(DIFFS) or ()}
    if not ours:
        return
    for key, patches in list(model.patches.items()):
        kept = [p for p in patches if not (isinstance(p[1], tuple) and p[1][0] == "diff" and id(p[1][1][0]) in ours)]
        if kept:
            model.patches[key] = kept
        else:
            del model.patches[key]
    model.remove_attachments(DIFFS)
    model.add_patches({})  # gives the weights a new identity, by which the host knows that they changed


def inflate(
    model: Any,
    settings: InflationSettings,
    weights: EI2Weights | None = None,
    strength: float = 1.0,
    place: str = "all",
    observer: Any = None,
) -> Any:
    """A MODEL with EI²'s modules on, instead of any that were on it; the MODEL itself is not changed.

    settings: what goes into the blocks; the temporal part counts only with weights, which must have been tuned with
    it. strength: 0..1; 0 takes everything of ours off. place: one of `inflation.PLACES`. observer: of `Inflation`.
    Raises ValueError for a model that EI² does not take, weights that do not fit it, or a block that another pack has.
    """
    names = network_blocks(model)
    chosen = chosen_blocks(names, place)
    if weights is not None:
        weights.check(model.model.diffusion_model)
    inflated = model.clone()
    _take_off_diffs(inflated)
    options = inflated.model_options["transformer_options"]
    take_off(options)
    if strength == 0:
        return inflated
    modules, patcher = ({}, None) if weights is None else _modules(inflated, weights, chosen)
    put_on(options, Inflation(settings, chosen, modules, strength, observer), patcher)
    if weights is not None:
        diffs = {f"{PREFIX}{name}.weight": ("diff", (diff,)) for name, diff in weights.queries(chosen).items()}
        inflated.add_patches(diffs, strength)
        inflated.set_attachments(DIFFS, [patch[1][0] for patch in diffs.values()])
    return inflated
