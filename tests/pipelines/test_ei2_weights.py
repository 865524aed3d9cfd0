"""The file of a one-shot tuning: what is in it, that it comes back as it was, and what is refused."""

from __future__ import annotations

import copy
import io
import json
import pickle
import re
from dataclasses import replace

import pytest
import safetensors.torch
import tiny_text_image as tiny
import tiny_text_video
import torch

from rewind.pipelines.ei2.inflation import InflationSettings, architecture, transformer_blocks
from rewind.pipelines.ei2.stam import TEMPORALS
from rewind.pipelines.ei2.weights import FORMAT, EI2Weights, load_weights, save_weights

SETTINGS = InflationSettings("sparse-causal", 3, "STAM", "frames + space")
CAPTION = "a réd circle, 「moves」"


@pytest.fixture(scope="module")
def network():
    return tiny.unet()


@pytest.fixture(scope="module")
def weights(network):
    """As a tuning leaves them."""
    generator, tensors = torch.Generator().manual_seed(3), {}
    for name, module in tiny.temporal(network, SETTINGS).items():
        tensors |= {f"{name}.temporal.{key}": tensor for key, tensor in module.folded().items()}
        for layer in ("attn1.to_q", "attn2.to_q"):
            shape = transformer_blocks(network)[name].get_submodule(layer).weight.shape
            tensors[f"{name}.{layer}.diff"] = torch.randn(shape, generator=generator)
    return EI2Weights(tensors, SETTINGS, architecture(network), CAPTION, {"steps": 4, "learning_rate": 3e-5})


def rewrite(source, target, change=None, **metadata):
    """A copy of a file with other metadata (None: without it) and other tensors."""
    with safetensors.safe_open(source, "pt") as file:
        about = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    about = {key: value for key, value in (about | metadata).items() if value is not None}
    safetensors.torch.save_file(tensors | (change or {}), target, metadata=about)
    return target


@pytest.fixture
def file(weights, tmp_path):
    save_weights(tmp_path / "ei2.safetensors", weights)
    return tmp_path / "ei2.safetensors"


# --- there and back ---------------------------------------------------------------------------------------------------


def test_weights_come_back_as_they_were(weights, tmp_path):
    path = tmp_path / "of a new folder" / "ei2.1.safetensors"
    save_weights(path, weights, torch.float32)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    back = load_weights(path)
    assert (back.settings, back.architecture, back.caption, back.about) == (
        SETTINGS,
        weights.architecture,
        CAPTION,
        weights.about,
    )
    assert back.tensors.keys() == weights.tensors.keys()
    assert all(torch.equal(tensor, back.tensors[key]) for key, tensor in weights.tensors.items())


def test_by_default_they_take_half_the_room_and_keep_half_precision(weights, file, tmp_path):
    back = load_weights(file)
    assert all(tensor.dtype == torch.float32 for tensor in back.tensors.values())
    assert all(torch.equal(back.tensors[key], tensor.half().float()) for key, tensor in weights.tensors.items())
    save_weights(tmp_path / "whole.safetensors", weights, torch.float32)
    assert file.stat().st_size < 0.7 * (tmp_path / "whole.safetensors").stat().st_size


def test_keys_in_the_file_are_the_hosts_names(file):
    keys = set(safetensors.torch.load_file(file))
    layers = ("temporal.to_q.weight", "temporal.to_k.weight", "temporal.to_v.weight", "temporal.to_out.weight")
    layers += ("attn1.to_q.diff", "attn2.to_q.diff")
    assert keys == {f"diffusion_model.{block}.{layer}" for block in tiny.BLOCKS for layer in layers}


def test_the_modules_of_a_file_are_those_that_were_tuned(network, file):
    tuned, modules = tiny.temporal(network, SETTINGS), load_weights(file).temporal(network)
    assert list(modules) == tiny.BLOCKS
    for name, module in modules.items():
        assert (module.kind, module.axes, module.heads) == ("STAM", "frames + space", 2)
        assert not module.training and not any(p.requires_grad for p in module.parameters())
        folded = tuned[name].folded()
        assert all(torch.equal(p, folded[key].half().float()) for key, p in module.state_dict().items())


def test_changes_of_the_queries_go_by_their_layers(weights):
    queries = weights.queries()
    assert set(queries) == {f"{block}.{layer}" for block in tiny.BLOCKS for layer in ("attn1.to_q", "attn2.to_q")}
    some = weights.queries(tiny.BLOCKS[1:2])
    assert set(some) == {f"{tiny.BLOCKS[1]}.attn1.to_q", f"{tiny.BLOCKS[1]}.attn2.to_q"}
    assert queries[f"{tiny.BLOCKS[1]}.attn2.to_q"] is weights.tensors[f"{tiny.BLOCKS[1]}.attn2.to_q.diff"]


def test_a_save_that_fails_leaves_the_file_that_was_there(weights, file, monkeypatch):
    before = file.read_bytes()

    def full(tensors, path, metadata):
        path.write_bytes(b"half a file")
        raise OSError("no space left")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        save_weights(file, weights)
    assert file.read_bytes() == before


# --- files that are none ----------------------------------------------------------------------------------------------


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="there are no EI² weights at .*nowhere.safetensors"):
        load_weights(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("kept", [0, 5, 200, -10])
def test_a_truncated_file_is_told(file, kept):
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match="ei2.safetensors is not a whole safetensors file"):
        load_weights(file)


class Malicious:
    """Unpickled, it makes a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


PICKLES = {
    "pickle": (lambda thing, path: path.write_bytes(pickle.dumps(thing)), lambda path: pickle.loads(path.read_bytes())),
    "torch": (torch.save, lambda path: torch.load(io.BytesIO(path.read_bytes()), weights_only=False)),
}


@pytest.mark.parametrize("kind", PICKLES)
def test_a_pickle_by_another_name_is_not_executed(tmp_path, kind):
    write, execute = PICKLES[kind]
    mark, path = tmp_path / "executed", tmp_path / "weights.safetensors"
    write({"weights": Malicious(mark)}, path)
    with pytest.raises(ValueError, match="weights.safetensors is not a whole safetensors file"):
        load_weights(path)
    assert not mark.exists()
    execute(path)["weights"].close()
    assert mark.exists(), "this is what would have happened"


def test_safetensors_of_something_else_are_told(tmp_path, file):
    other = tmp_path / "lora.safetensors"
    safetensors.torch.save_file({"lora_up.weight": torch.zeros(2, 2)}, other)
    for path in (other, rewrite(file, other, format="rewind ei2 weights 9")):
        with pytest.raises(ValueError, match="lora.safetensors holds no EI² weights: give a file that"):
            load_weights(path)


@pytest.mark.parametrize(
    "metadata",
    [
        {"settings": None},
        {"architecture": None},
        {"caption": None},
        {"about": "{"},
        {"settings": "[]"},
        {"settings": json.dumps({"attention": "FFAM", "window": 3})},
        {"settings": json.dumps({"attention": "dense"})},
        {"settings": json.dumps({"factor": "two"})},
    ],
)
def test_metadata_that_this_version_cannot_read_is_told(file, tmp_path, metadata):
    assert load_weights(rewrite(file, tmp_path / "same.safetensors", format=FORMAT)).settings == SETTINGS
    path = rewrite(file, tmp_path / "changed.safetensors", **metadata)
    with pytest.raises(ValueError, match="changed.safetensors was written by another version of Rewind"):
        load_weights(path)


# --- models that they do not fit --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"block_out_channels": (32, 64)}, "4 blocks of widths 32 to 64, context 64"),
        ({"cross_attention_dim": 32}, "4 blocks of widths 16 to 32, context 32"),
        ({"layers_per_block": 2}, "6 blocks of widths 16 to 32, context 64"),
    ],
)
def test_a_model_of_another_architecture_is_told(file, change, told):
    weights, other = load_weights(file), tiny.unet(**change)
    for use in (weights.check, weights.temporal):
        with pytest.raises(ValueError, match="are for 4 blocks of widths 16 to 32, context 64, the model has " + told):
            use(other)
    weights.check(tiny.unet(seed=1))  # another model of the same architecture


def test_a_model_of_another_kind_is_told(weights):
    with pytest.raises(ValueError, match="cannot be inflated"):
        weights.check(tiny_text_video.family("ModelScope").network)


BLOCK = tiny.BLOCKS[2]
DAMAGED = {  # what is taken out or put in, in one block, and what is told of it
    "a missing change": ({"attn2.to_q.diff": None}, "it is missing"),
    "a change of another shape": ({"attn1.to_q.diff": torch.zeros(16, 3)}, r"shape \(16, 3\), .* needs \(16, 16\)"),
    "a change of another rank": ({"attn1.to_q.diff": torch.zeros(256)}, r"has shape \(256,\)"),
    "a missing temporal tensor": ({"temporal.to_k.weight": None}, "it is missing"),
    "a temporal tensor of another shape": ({"temporal.to_v.weight": torch.zeros(3, 3)}, r"has shape \(3, 3\)"),
    "a bias that STAM has not": ({"temporal.to_out.bias": torch.zeros(16)}, r"modules \(STAM\) have such a tensor"),
    "an unknown layer": ({"attn1.to_k.diff": torch.zeros(16, 16)}, "neither the model nor its temporal modules"),
}


def changed(weights, change):
    """Weights with other tensors; None takes one out."""
    tensors = {key: t for key, t in (weights.tensors | change).items() if t is not None}
    return replace(weights, tensors=tensors)


def refused(weights, network, told):
    for use in (weights.check, weights.temporal):
        with pytest.raises(ValueError, match=f"these EI² weights are damaged at {told}"):
            use(network)


@pytest.mark.parametrize("case", DAMAGED)
def test_a_tensor_that_does_not_fit_is_named(network, weights, case):
    parts, told = DAMAGED[case]
    broken = changed(weights, {f"{BLOCK}.{part}": tensor for part, tensor in parts.items()})
    refused(broken, network, f"{re.escape(BLOCK)}.{next(iter(parts))}: .*{told}")


def test_the_first_of_several_is_named_as_blocks_are_passed_and_what_is_unknown_last(network, weights):
    missing = {f"{block}.attn1.to_q.diff": None for block in tiny.BLOCKS[:0:-1]}
    refused(changed(weights, {"a": torch.zeros(1)} | missing), network, f"{tiny.BLOCKS[1]}.attn1.to_q.diff: it is mis")
    refused(changed(weights, {"a": torch.zeros(1)}), network, "a: neither")


def test_a_block_without_its_temporal_module_is_not_passed_over(network, weights):
    gone = {key: None for key in weights.tensors if key.startswith(f"{BLOCK}.temporal.")}
    refused(changed(weights, gone), network, f"{BLOCK}.temporal.to_q.weight: it is missing")
    bare = {key: None for key in weights.tensors if ".temporal." in key}
    refused(changed(weights, bare), network, f"{tiny.BLOCKS[0]}.temporal.to_q.weight: it is missing")
    refused(replace(weights, tensors={}), network, f"{tiny.BLOCKS[0]}.attn1.to_q.diff: it is missing")


def test_without_a_temporal_module_the_changes_of_the_queries_or_nothing_at_all_will_do(network, weights):
    settings = replace(SETTINGS, temporal="none")
    bare = changed(weights, {key: None for key in weights.tensors if ".temporal." in key})
    for kept in (replace(bare, settings=settings), replace(weights, tensors={}, settings=settings)):
        kept.check(network)
        assert kept.temporal(network) == {}
    refused(replace(weights, settings=settings), network, r".*temporal.to_q.weight: .* modules \(none\) have such")
    lacking = changed(bare, {f"{BLOCK}.attn1.to_q.diff": None})
    refused(replace(lacking, settings=settings), network, f"{BLOCK}.attn1.to_q.diff: it is missing")


@pytest.mark.parametrize("kind", TEMPORALS)
def test_what_a_tuning_leaves_fits_with_every_temporal_module(network, weights, kind):
    settings, tensors = replace(SETTINGS, temporal=kind), {k: t for k, t in weights.tensors.items() if ".diff" in k}
    for name, module in tiny.temporal(network, settings).items():
        tensors |= {f"{name}.temporal.{key}": tensor for key, tensor in module.folded().items()}
    whole = replace(weights, tensors=tensors, settings=settings)
    whole.check(network)
    assert list(whole.temporal(network)) == tiny.BLOCKS
    for key in tensors:
        refused(changed(whole, {key: None}), network, f"{re.escape(key)}: it is missing")


def test_a_structure_without_weights_is_enough(weights, network):
    """The command checks a file before any model is loaded."""
    weights.check(copy.deepcopy(network).to("meta"))
