"""EI²'s weights on disk through its nodes: what is written, found, shown and refused."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path

import fine_tuning
import one_shot
import pytest
import tiny_models
import torch
from one_shot import denoised, noisy, patch, random_weights

SAVE, LOAD = "RewindEI2SaveWeights", "RewindEI2LoadWeights"


@pytest.fixture(scope="module")
def sd15(host):
    return one_shot.sd15()


@pytest.fixture(scope="module")
def weights(host, sd15):
    return random_weights(host, sd15, axes="frames + space", factor=3)


@pytest.fixture
def folder(host):
    """models/ei2 of the host, without a file before and after; the host does not expect that folders vanish."""
    import folder_paths

    folder = Path(folder_paths.get_folder_paths("ei2")[0])
    folder.mkdir(parents=True, exist_ok=True)
    empty(folder)
    yield folder
    empty(folder)


def empty(folder):
    for file in folder.rglob("*.*"):
        file.unlink()


@pytest.fixture
def shipped(host, weights):
    """The folder of what comes with Rewind, with one file more: name.safetensors."""
    folder = host.pack / "demo" / "ei2"
    host.module("pipelines.ei2.weights").save_weights(folder / "name.safetensors", replace(weights, caption="theirs"))
    yield folder
    (folder / "name.safetensors").unlink()


@pytest.fixture
def shown(host, monkeypatch):
    """What nodes show on themselves, in turn."""
    from server import PromptServer

    texts = []
    monkeypatch.setattr(PromptServer.instance, "send_progress_text", lambda text, node: texts.append((node, text)))
    return texts


def all_listed(host):
    return host.mappings[LOAD].INPUT_TYPES()["required"]["weights_name"][1]["options"]


def listed(host):
    """Of the host's own folder: what comes with Rewind is left out."""
    theirs = {file.name for file in (host.pack / "demo" / "ei2").glob("*")}
    return [name for name in all_listed(host) if name not in theirs]


def load(host, name):
    return host.run_node(LOAD, weights_name=name)[0]


def test_weights_come_back_from_disk(host, sd15, weights, folder):
    """In half precision, with all that was said of them; every save has a number of its own."""
    assert listed(host) == []
    for prefix in ("cat", "cat", os.path.join("clips", "cat")):
        host.run_node(SAVE, weights=weights, filename_prefix=prefix)
    names = ["cat_00001_.safetensors", "cat_00002_.safetensors", os.path.join("clips", "cat_00001_.safetensors")]
    assert sorted(listed(host)) == sorted(names) and all((folder / name).exists() for name in names)
    for name in names:
        back = load(host, name)
        assert replace(back, tensors={}) == replace(weights, tensors={})
        assert fine_tuning.equal(back.tensors, {key: t.half().float() for key, t in weights.tensors.items()})
    x = noisy()
    a, b = (denoised(host, patch(host, sd15, weights=w), x) for w in (weights, back))
    torch.testing.assert_close(a, b, rtol=0, atol=5e-3)


def test_a_caption_is_kept_with_the_weights(host, weights, folder):
    """Instead of theirs, where it says something; the weights that were given stay as they are."""
    for given in ({"caption": " a réd cat "}, {"caption": " "}, {}):
        host.run_node(SAVE, weights=weights, filename_prefix="x", **given)
    captions = [load(host, name).caption for name in sorted(listed(host))]
    assert captions == ["a réd cat", "a clip", "a clip"]
    assert weights.caption == "a clip"
    assert list(host.mappings[SAVE].INPUT_TYPES()["optional"]) == ["caption"], "an older graph has none"


def test_the_nodes_show_what_they_wrote_and_read(host, weights, folder, shown):
    about = {"steps": 40, "learning_rate": 3e-05, "frames": 8}
    host.run_node(SAVE, weights=replace(weights, about=about), filename_prefix="x", caption="a red cat")
    (name,) = listed(host)
    load(host, name)
    host.run_node(SAVE, weights=replace(weights, caption="", about={}), filename_prefix="y")
    load(host, "y_00001_.safetensors")
    model = "for 7 blocks of widths 32 to 64, context 32"
    assert [text for _, text in shown] == [
        f"saved {name}",
        f'"a red cat"\nSTAM and FFAM by 3, 40 steps, learning rate 3e-05, 8 frames\n{model}',
        "saved y_00001_.safetensors",
        f"a clip without a caption\nSTAM and FFAM by 3\n{model}",
    ]


def test_what_comes_with_rewind_is_listed_and_the_users_own_come_first(host, weights, folder, shipped):
    assert "name.safetensors" in all_listed(host) and load(host, "name.safetensors").caption == "theirs"
    theirs = sorted(shipped.iterdir())
    host.run_node(SAVE, weights=weights, filename_prefix="name")
    assert sorted(shipped.iterdir()) == theirs and listed(host) == ["name_00001_.safetensors"]
    first = host.mappings[LOAD].fingerprint_inputs(weights_name="name.safetensors")
    (folder / "name_00001_.safetensors").rename(folder / "name.safetensors")
    assert load(host, "name.safetensors").caption == "a clip"
    assert host.mappings[LOAD].fingerprint_inputs(weights_name="name.safetensors") != first
    assert all_listed(host).count("name.safetensors") == 1


def test_a_folder_that_the_user_names_comes_before_ours(host, tmp_path):
    """As extra_model_paths.yaml names it, before the pack is loaded; ours is registered once, and last."""
    import importlib

    import folder_paths

    files, ours = host.module("nodes.host.files"), str(host.pack / "demo" / "ei2")
    before = folder_paths.folder_names_and_paths.pop("ei2")
    try:
        assert before[0][-1] == ours and before[0].count(ours) == 1
        folder_paths.add_model_folder_path("ei2", str(tmp_path))
        for _ in range(2):
            importlib.reload(files)
            assert folder_paths.get_folder_paths("ei2") == [str(tmp_path), ours]
    finally:
        folder_paths.folder_names_and_paths["ei2"] = before


def test_the_hosts_lora_loader_reads_the_changes_of_the_queries(host, sd15, weights, folder):
    import folder_paths

    host.run_node(SAVE, weights=weights, filename_prefix="as_lora")
    loras = Path(folder_paths.get_folder_paths("loras")[0])
    loras.mkdir(parents=True, exist_ok=True)
    (folder / "as_lora_00001_.safetensors").rename(loras / "as_lora.safetensors")
    (loaded,) = host.run_node("LoraLoaderModelOnly", model=sd15, lora_name="as_lora.safetensors", strength_model=1.0)
    assert loaded.patches.keys() == patch(host, sd15, weights=weights).patches.keys()
    ours, x = patch(host, sd15, weights=load_half(weights), attention="own frame"), noisy()
    ours.model_options["transformer_options"]["patches"]["middle_patch"].clear()  # only the queries' changes are left
    assert torch.equal(denoised(host, loaded, x), denoised(host, ours, x))


def load_half(weights):
    return replace(weights, tensors={key: t.half().float() for key, t in weights.tensors.items()})


def test_a_file_that_changed_is_read_again(host, weights, folder):
    """By the fingerprint that tells the host whether what it kept is still right."""
    host.run_node(SAVE, weights=weights, filename_prefix="x")
    node, (name,) = host.mappings[LOAD], listed(host)
    first = node.fingerprint_inputs(weights_name=name)
    assert node.fingerprint_inputs(weights_name=name) == first
    os.utime(folder / name, ns=(1, 1))
    assert node.fingerprint_inputs(weights_name=name) != first


# --- what is refused -------------------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("rewind_was_fooled",))


def _truncated(good, file):
    file.write_bytes(good[: len(good) // 2])


def _pickle(good, file):
    file.write_bytes(pickle.dumps(Bomb()))


def _something_else(good, file):
    tiny_models.save_weights({"diffusion_model.x.lora_up.weight": torch.zeros(2, 2)}, file)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (_truncated, "bad.safetensors is not a whole safetensors file"),
        (_pickle, "bad.safetensors is not a whole safetensors file"),
        (_something_else, "bad.safetensors holds no EI² weights"),
        (lambda good, file: file.write_bytes(b""), "bad.safetensors is not a whole safetensors file"),
        (lambda good, file: file.write_bytes(good.replace(b'\\"factor\\"', b'\\"factxr\\"')), "another version"),
    ],
    ids=["truncated", "a pickle", "another file", "empty", "another version"],
)
def test_broken_files_are_refused(host, weights, folder, tmp_path, monkeypatch, spoil, message):
    monkeypatch.chdir(tmp_path)
    host.run_node(SAVE, weights=weights, filename_prefix="good")
    good = (folder / "good_00001_.safetensors").read_bytes()
    spoil(good, folder / "bad.safetensors")
    with pytest.raises(ValueError, match=message):
        load(host, "bad.safetensors")
    assert not any(tmp_path.iterdir()), "nothing in a file is executed"


@pytest.mark.parametrize("name", ["../secret.safetensors", "clips/../../secret.safetensors", "absolute", "none", ""])
def test_no_name_leads_out_of_the_folder(host, weights, folder, name):
    host.run_node(SAVE, weights=weights, filename_prefix="secret")
    secret = (folder / "secret_00001_.safetensors").rename(folder.parent / "secret.safetensors")
    with pytest.raises(FileNotFoundError, match="no EI² weights named"):
        load(host, str(secret) if name == "absolute" else name)
    secret.unlink()


@pytest.mark.parametrize("prefix", ["../x", "clips/../../x", "absolute", "", "  ", "."])
def test_nothing_is_saved_outside_the_folder(host, weights, folder, tmp_path, prefix):
    before = set(folder.parent.rglob("*"))
    prefix = str(tmp_path / "x") if prefix == "absolute" else prefix
    with pytest.raises(ValueError, match="filename_prefix"):
        host.run_node(SAVE, weights=weights, filename_prefix=prefix)
    assert set(folder.parent.rglob("*")) == before and not any(tmp_path.iterdir())
