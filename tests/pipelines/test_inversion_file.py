"""The file of an inversion: that it comes back bit for bit, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from rewind.pipelines.denoiser import EDM, FLOW, V
from rewind.pipelines.fingerprint import fingerprint
from rewind.pipelines.videoshop.inversion import Inversion
from rewind.pipelines.videoshop.inversion_file import FORMAT, file_bytes, load_inversion, save_inversion
from rewind.pipelines.videoshop.latents import normalise

MODEL = fingerprint("Net", {f"{i}.weight": torch.randn(4, 9) for i in range(3)})
SETTINGS = {"guess_above": "random", "refine": 2, "damping": 0.5, "seed": 2**63, "cfg": 1.0, "path": V}


def made(shape=(3, 4, 2, 6), dtype=torch.float32, **changes) -> Inversion:
    """As a node leaves it."""
    generator = torch.Generator().manual_seed(1)
    source = torch.randn(shape, generator=generator)
    clean, normalisation = normalise(source, "frame")
    sigmas = torch.tensor([15.6, 3.9, 0.1, 0.0], dtype=torch.float64)
    states = torch.stack([clean + float(s) * torch.randn(shape, generator=generator) for s in sigmas.flip(0)])
    inversion = Inversion(
        latent=states[-1].clone(),
        sigmas=sigmas,
        normalisation=normalisation,
        trajectory=states.to(dtype),
        residuals=(0.25, 1e-5),
        evaluations=9,
        settings=SETTINGS,
        source=source,
        augmentation_noise=torch.randn(3, 8 * shape[-2], 8 * shape[-1], generator=generator),
        original=source / 0.18215,
        model=MODEL,
    )
    return replace(inversion, **changes)


def same(a: Inversion, b: Inversion) -> bool:
    """Whether two are equal, bit for bit."""
    tensors = ("latent", "sigmas", "trajectory", "source", "augmentation_noise", "original")
    for name in tensors:
        x, y = getattr(a, name), getattr(b, name)
        if (x is None) != (y is None) or (x is not None and (x.dtype != y.dtype or not torch.equal(x, y))):
            return False
    n, m = a.normalisation, b.normalisation
    if (n is None) != (m is None) or (n is not None and not torch.equal(n.apply(a.latent), m.apply(a.latent))):
        return False
    return (a.residuals, a.evaluations, a.settings) == (b.residuals, b.evaluations, b.settings)


@pytest.fixture
def file(tmp_path):
    save_inversion(tmp_path / "clip.safetensors", made())
    return tmp_path / "clip.safetensors"


def rewrite(file, change=lambda tensors: tensors, **about):
    """Other tensors and other words in a file; a word None is left out."""
    with safetensors.safe_open(file, "pt") as opened:
        words = opened.metadata()
        tensors = {key: opened.get_tensor(key).clone() for key in opened.keys()}
    told = json.loads(words["about"]) | about
    told = {key: value for key, value in told.items() if value != "left out"}
    safetensors.torch.save_file(change(tensors), file, metadata=words | {"about": json.dumps(told)})


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_inversion_comes_back_bit_for_bit(tmp_path, dtype):
    inversion = made(dtype=dtype)
    save_inversion(tmp_path / "new" / "clip.1.safetensors", inversion)
    back = load_inversion(tmp_path / "new" / "clip.1.safetensors")
    assert same(inversion, back)
    assert back.trajectory.dtype == dtype
    back.model.check(MODEL, "it")
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["clip.1.safetensors"]


@pytest.mark.parametrize(
    "changes",
    [
        {"trajectory": None, "source": None, "augmentation_noise": None, "normalisation": None, "model": None},
        {"settings": {"path": FLOW}, "residuals": ()},
        {"settings": {"path": EDM(0.5), "guidance_interval": (0.0, float("inf")), "denormalise": True}},
    ],
    ids=["what must be", "flow", "EDM"],
)
def test_what_an_inversion_lacks_it_lacks_afterwards(tmp_path, changes):
    inversion = made(**changes)
    save_inversion(tmp_path / "clip.safetensors", inversion)
    back = load_inversion(tmp_path / "clip.safetensors")
    assert same(inversion, back) and (back.model is None) == (inversion.model is None)


def test_a_clip_with_an_axis_for_the_batch_comes_back(tmp_path):
    inversion = made(shape=(1, 16, 3, 2, 6), augmentation_noise=None)
    save_inversion(tmp_path / "clip.safetensors", inversion)
    assert same(inversion, load_inversion(tmp_path / "clip.safetensors"))


def test_its_size_is_told_before(file):
    inversion = made()
    assert 0 < file.stat().st_size - file_bytes(inversion) < 4096, "what is more is the words"
    assert file_bytes(inversion) - file_bytes(made(dtype=torch.float16)) == inversion.trajectory.numel() * 2


def test_a_loaded_one_is_not_tied_to_its_file(file):
    back = load_inversion(file)
    with open(file, "r+b") as opened:
        opened.truncate(10)
    assert same(back, made())


def test_values_that_are_no_numbers_are_not_saved_over_a_good_file(file):
    before = file.read_bytes()
    with pytest.raises(ValueError, match="its latent is not made of finite numbers"):
        save_inversion(file, made(latent=made().latent * torch.nan))
    assert file.read_bytes() == before


def test_a_save_that_fails_leaves_the_file_that_was_there(file, monkeypatch):
    before = file.read_bytes()

    def full(tensors, path, metadata):
        path.write_bytes(b"half a file")
        raise OSError("no space left")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        save_inversion(file, made())
    assert file.read_bytes() == before and [entry.name for entry in file.parent.iterdir()] == [file.name]


# --- files that are none ----------------------------------------------------------------------------------------------


def test_a_missing_file_and_a_folder_are_told(tmp_path):
    for path in (tmp_path / "nowhere.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no inversion at"):
            load_inversion(path)


@pytest.mark.parametrize("kept", [0, 5, 200, -10])
def test_a_truncated_file_is_told(file, kept):
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match="clip.safetensors is not a whole safetensors file"):
        load_inversion(file)


class Malicious:
    """Unpickled, it makes a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_a_pickle_is_not_executed(file):
    mark = file.parent / "mark"
    file.write_bytes(pickle.dumps(Malicious(mark)))
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_inversion(file)
    assert not mark.exists()


def header(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        header(b"[" * 100_000),
        header(b'{"latent":{"dtype":"F32","shape":[4],"data_offsets":[0,1000000000]}}'),
        header(b'{"latent":{"dtype":"F32","shape":[18446744073709551615,2],"data_offsets":[0,8]}}') + bytes(8),
        header(b'{"latent":{"dtype":"X9","shape":[2],"data_offsets":[0,8]}}') + bytes(8),
        (2**62).to_bytes(8, "little") + b"{}",
    ],
    ids=["nested", "beyond the end", "overflow", "no type", "endless header"],
)
def test_a_header_that_lies_is_told(file, content):
    file.write_bytes(content)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_inversion(file)


def test_other_safetensors_are_told(file):
    for metadata in (None, {"format": "pt"}, {"format": "rewind inversion 999", "about": "{}"}):
        safetensors.torch.save_file({"latent": torch.ones(2, 4, 2, 2)}, file, metadata=metadata)
        with pytest.raises(ValueError, match="holds no inversion of this version: invert the clip again"):
            load_inversion(file)


@pytest.mark.parametrize("about", ["", "nothing", "[1]", "3", "[" * 100_000, "{}", '{"model": null}'])
def test_words_that_are_none_are_told(file, about):
    safetensors.torch.save_file({"latent": torch.ones(2, 4, 2, 2)}, file, metadata={"format": FORMAT, "about": about})
    with pytest.raises(ValueError, match="clip.safetensors is damaged"):
        load_inversion(file)


def put(**tensors):
    return lambda held: held | tensors


WRONG = {
    "no latent": (lambda held: {k: t for k, t in held.items() if k != "latent"}, {}, "latent"),
    "a flat latent": (put(latent=torch.ones(8)), {}, r"shape \(8,\)"),
    "whole numbers": (put(latent=torch.ones(3, 4, 2, 6, dtype=torch.int64)), {}, "its latent is not made of finite"),
    "bytes": (put(source=torch.ones(3, 4, 2, 6, dtype=torch.uint8)), {}, "its source is not made of finite"),
    "NaN": (put(trajectory=torch.full((4, 3, 4, 2, 6), torch.nan)), {}, "its trajectory is not made of finite"),
    "an infinite level": (put(sigmas=torch.tensor([torch.inf, 1, 0.1, 0])), {}, "its sigmas is not made of finite"),
    "rising levels": (put(sigmas=torch.tensor([0.0, 1, 2, 3])), {}, "its noise levels do not fall to 0"),
    "levels above 0": (put(sigmas=torch.tensor([4.0, 3, 2, 1])), {}, "its noise levels do not fall to 0"),
    "one level": (put(sigmas=torch.tensor([0.0])), {}, "its noise levels do not fall to 0"),
    "another number of levels": (put(sigmas=torch.tensor([1.0, 0])), {}, "for 2 levels of a latent"),
    "another source": (put(source=torch.ones(3, 4, 2, 2)), {}, "its source is of another size"),
    "another original": (put(original=torch.ones(3, 4, 2, 2)), {}, "its source is of another size"),
    "another noise": (put(augmentation_noise=torch.ones(3, 8, 8)), {}, "its augmentation noise is of another size"),
    "an unknown tensor": (put(evil=torch.ones(1)), {}, "tensors that are no part of an inversion"),
    "a scale of 0": (put(**{"normalisation.scale": torch.zeros(3, 1, 1, 1)}), {}, "cannot be undone"),
    "another scale": (
        put(**{"normalisation.scale": torch.ones(9, 1, 1, 1), "normalisation.shift": torch.ones(9, 1, 1, 1)}),
        {},
        "the normalisation was made for",
    ),
    "no kind of it": (put(), {"normalisation": "evil"}, "of no known kind"),
    "no model": (put(), {"model": ["Net", "0"]}, "model's layers is not whole"),
    "a model of words": (put(), {"model": ["\x1b[31mred\n", "0" * 64]}, "says of its model is not whole"),
    "no weights": (lambda held: {k: t for k, t in held.items() if k != "model.weights"}, {}, "model is not whole"),
    "a float count": (put(), {"evaluations": 1.5}, "whole number"),
    "a true count": (put(), {"evaluations": True}, "whole number"),
    "no count": (put(), {"evaluations": "left out"}, "evaluations"),
    "words as residuals": (put(), {"residuals": ["a"]}, "a number in it is none"),
    "a list as settings": (put(), {"settings": [1]}, "damaged"),
    "settings in settings": (put(), {"settings": {"a": {"b": 1}}}, "a number in it is none"),
    "a seed of words": (put(), {"settings": {"seed": "a"}}, "whole number"),
    "a guidance of words": (put(), {"settings": {"cfg": "a"}}, "a number in it is none"),
    "an unknown path": (put(), {"settings": {"path": {"kind": "evil"}}}, "noise path"),
    "more in the path": (put(), {"settings": {"path": {"kind": "ve", "evil": 1}}}, "damaged"),
    "a path of nothing": (put(), {"settings": {"path": None}}, "damaged"),
    "no spread in the path": (put(), {"settings": {"path": {"kind": "ve", "sigma_data": 0}}}, "noise path"),
}


@pytest.mark.parametrize(("change", "about", "message"), WRONG.values(), ids=WRONG)
def test_parts_that_do_not_fit_are_told(file, change, about, message):
    rewrite(file, change, **about)
    with pytest.raises(ValueError, match=message) as caught:
        load_inversion(file)
    assert str(caught.value).startswith("clip.safetensors is damaged") and "invert the clip again" in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_an_untouched_rewrite_loads(file):
    """The test above can fail: writing a file anew is not what is refused."""
    rewrite(file)
    assert same(load_inversion(file), made())
