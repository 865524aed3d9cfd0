"""Save Inversion and Load Inversion: one inversion for many edits, on disk; and what is refused."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import comfy_host
import pytest
import tiny_models
import torch

SAVE, LOAD = "RewindSaveInversion", "RewindLoadInversion"
SHIPPED = Path("demo", "inversions", "rewind_demo_inversion.safetensors")
STEPS = 4


@pytest.fixture(scope="module")
def model(host):
    return tiny_models.svd(host)


def invert(host, model, family="svd", **inputs):
    """The outputs of EDM Inversion on a tiny model."""
    scheduler = {"svd": "karras", "sd15": "karras"}.get(family, "simple")
    values = {
        "positive": tiny_models.conditioning(family),
        "latent": tiny_models.latent(family),
        "sigmas": tiny_models.sigmas(model, STEPS, scheduler),
        "strength": 1.0,
        "seed": 2**63 + 5,
    }
    return host.run_node("RewindEDMInversion", model=model, **values | inputs)


@pytest.fixture(scope="module")
def inversion(host, model):
    return invert(host, model)[3]


@pytest.fixture
def folder(host):
    """models/inversions of the host, empty at first."""
    import folder_paths

    folder = Path(folder_paths.get_folder_paths("inversions")[0])
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.rglob("*.*"):
        file.unlink()
    return folder


def names(host):
    """What the node offers beside the shipped file, as a page that is loaded anew sees it."""
    import folder_paths

    folder_paths.filename_list_cache.clear()
    kind, options = host.mappings[LOAD].INPUT_TYPES()["required"]["inversion_name"]
    offered = kind if isinstance(kind, list) else options["options"]
    return [name for name in offered if name != SHIPPED.name]


def load(host, model, name):
    names(host)
    return host.run_node(LOAD, model=model, inversion_name=name)


def denoised(host, model, inversion, seed=0, **inputs):
    conditions = {"positive": tiny_models.conditioning("svd", seed), "negative": tiny_models.conditioning("svd", 9)}
    return host.run_node("RewindSVDDenoise", model=model, inversion=inversion, **conditions | inputs)[0]["samples"]


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_edits_with_a_loaded_inversion_are_those_without_the_file(host, model, folder, dtype):
    (latent,) = host.run_node(
        "RewindLatentNormalize", model=model, latent=tiny_models.latent("svd"), kind="channel", strength=1.0
    )
    samples, sigmas, noise, inversion = invert(host, model, latent=latent, refine=1, trajectory_dtype=dtype)
    assert str(inversion.trajectory.dtype) == f"torch.{dtype}"
    host.run_node(SAVE, inversion=inversion, filename_prefix="clips/boat")
    assert names(host) == [os.path.join("clips", "boat_00001_.safetensors")]
    loaded = load(host, model, os.path.join("clips", "boat_00001_.safetensors"))
    assert torch.equal(loaded[0]["samples"], samples["samples"]) and torch.equal(loaded[1], sigmas)
    assert loaded[0].keys() == {"samples"}
    empty = {"samples": torch.zeros_like(samples["samples"])}
    assert torch.equal(loaded[2].generate_noise(empty), noise.generate_noise(empty))
    assert loaded[2].seed == noise.seed == 2**63 + 5
    back = loaded[3]
    assert torch.equal(back.trajectory, inversion.trajectory) and back.trajectory.dtype == inversion.trajectory.dtype
    assert back.settings == inversion.settings and back.residuals == inversion.residuals
    for seed in (1, 2):  # two edits
        wanted, edit = (denoised(host, model, value, seed, last_guidance=2.0) for value in (inversion, back))
        assert torch.equal(edit, wanted)
    for node, inputs in (("RewindTrajectoryPlot", {}),):
        plots = [host.run_node(node, inversion=value, **inputs) for value in (inversion, back)]
        assert torch.equal(plots[0][0], plots[1][0]) and plots[0][1:] == plots[1][1:]


def test_the_precision_changes_the_trajectory_alone(host, model, inversion):
    half = invert(host, model, trajectory_dtype="float16")[3]
    assert torch.equal(half.latent, inversion.latent) and torch.equal(half.source, inversion.source)
    assert torch.equal(half.trajectory, inversion.trajectory.half())
    assert torch.equal(inversion.trajectory[-1], inversion.latent)


def test_noise_levels_that_the_precision_cannot_hold_are_refused_before_any_work(host, model):
    counting, calls = tiny_models.counted(model)
    latent = {"samples": 1e5 * tiny_models.latent("svd")["samples"]}
    with pytest.raises(ValueError, match="which float16 may not hold"):
        invert(host, counting, latent=latent, trajectory_dtype="float16")
    assert calls == []


@pytest.mark.parametrize("family", ["sd15", "wan"])
def test_other_families_go_on_from_the_loaded_noise(host, folder, family):
    model = getattr(tiny_models, family)(host)
    outputs = invert(host, model, family)
    host.run_node(SAVE, inversion=outputs[3], filename_prefix="clip")
    loaded = load(host, model, "clip_00001_.safetensors")
    assert loaded[3].settings["path"] == outputs[3].settings["path"]
    (guider,) = host.run_node("BasicGuider", model=model, conditioning=tiny_models.conditioning(family, 3))
    (sampler,) = host.run_node("KSamplerSelect", sampler_name="euler")
    empty = {"samples": torch.zeros_like(outputs[0]["samples"])}
    results = [
        host.run_node(
            "SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=empty
        )[0]["samples"]
        for _, sigmas, noise, _ in (outputs, loaded)
    ]
    assert torch.equal(*results) and results[0].std() > 0.01


def test_files_are_numbered_and_none_is_overwritten(host, inversion, folder):
    host.run_node(SAVE, inversion=inversion, filename_prefix="clip")
    first = (folder / "clip_00001_.safetensors").read_bytes()
    host.run_node(SAVE, inversion=inversion, filename_prefix="clip")
    assert sorted(names(host)) == ["clip_00001_.safetensors", "clip_00002_.safetensors"]
    assert first == (folder / "clip_00001_.safetensors").read_bytes()


def test_a_changed_file_is_read_again(host, model, inversion, folder):
    host.run_node(SAVE, inversion=inversion, filename_prefix="clip")
    names(host)
    cls, file = host.mappings[LOAD], folder / "clip_00001_.safetensors"
    before = cls.fingerprint_inputs(model=None, inversion_name=file.name)  # as the host asks: links are not followed
    assert before == cls.fingerprint_inputs(model=None, inversion_name=file.name)
    os.utime(file, ns=(1, 1))
    assert before != cls.fingerprint_inputs(model=None, inversion_name=file.name)


# --- the file that comes with the pack --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_the_demo_clip(host, trained):
    """MODEL and inversion of Rewind Demo Clip with every setting at its default, the trajectory in half precision."""
    if not trained:
        pytest.skip("the embedded model's weights are not there")
    model, clip_vision, vae = host.run_node("RewindDemoImageToVideo")
    video, edited, *_ = host.run_node("RewindDemoClip")
    clip = {"clip": video.get_components().images, "edited_frame": edited, "width": 96, "height": 96}
    positive, *_, latent, _ = host.run_node("RewindVideoshopConditioning", clip_vision=clip_vision, vae=vae, **clip)
    sigmas = tiny_models.sigmas(model, 25, "karras")
    inputs = {"positive": positive, "latent": latent, "sigmas": sigmas, "trajectory_dtype": "float16"}
    return model, host.run_node("RewindEDMInversion", model=model, **inputs)[3]


def test_the_shipped_inversion_is_that_of_the_demo_clip(host, of_the_demo_clip):
    """Made anew by REWIND_UPDATE_INVERSION=1 where the embedded model or a default changed."""
    model, inversion = of_the_demo_clip
    if os.environ.get("REWIND_UPDATE_INVERSION"):
        storage = host.module("pipelines.videoshop.inversion_file")
        for root in (comfy_host.ROOT, host.pack):
            storage.save_inversion(root / SHIPPED, inversion)
    latent, sigmas, noise, shipped = load(host, model, SHIPPED.name)
    assert torch.equal(sigmas, inversion.sigmas) and shipped.settings == inversion.settings
    for name in ("latent", "source", "trajectory"):
        ours, wanted = (getattr(value, name).float() for value in (shipped, inversion))
        assert float((ours - wanted).norm() / wanted.norm()) < 1e-3, name
    assert shipped.trajectory.dtype == torch.float16
    assert (comfy_host.ROOT / SHIPPED).stat().st_size < 250_000


def test_nothing_is_saved_beside_the_shipped_file(host, inversion, folder):
    host.run_node(SAVE, inversion=inversion, filename_prefix="rewind_demo_inversion")
    assert names(host) == ["rewind_demo_inversion_00001_.safetensors"]
    assert (folder / "rewind_demo_inversion_00001_.safetensors").is_file()
    assert [file.name for file in (host.pack / SHIPPED).parent.iterdir()] == [SHIPPED.name]


# --- files and names that are none ------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("rewind_was_fooled",))


SPOILT = {
    "truncated": (lambda good: good[: len(good) // 2], "bad.safetensors is not a whole safetensors file"),
    "a pickle": (lambda good: pickle.dumps(Bomb()), "bad.safetensors is not a whole safetensors file"),
    "empty": (lambda good: b"", "bad.safetensors is not a whole safetensors file"),
    "another version": (lambda good: good.replace(b"inversion 1", b"inversion 2"), "holds no inversion of this"),
    "other words": (lambda good: good.replace(b"evaluations", b"evaluationz"), "bad.safetensors is damaged"),
    "NaN": (lambda good: good[:-256] + b"\xff" * 256, "bad.safetensors is damaged"),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILT.values(), ids=SPOILT)
def test_broken_files_are_refused(host, model, inversion, folder, tmp_path, monkeypatch, spoil, message):
    monkeypatch.chdir(tmp_path)
    host.run_node(SAVE, inversion=inversion, filename_prefix="good")
    good = (folder / "good_00001_.safetensors").read_bytes()
    (folder / "bad.safetensors").write_bytes(spoil(good))
    with pytest.raises(ValueError, match=message):
        load(host, model, "bad.safetensors")
    assert not any(tmp_path.iterdir()), "nothing in a file is executed"


@pytest.mark.parametrize("name", ["../secret.safetensors", "clips/../../secret.safetensors", "absolute", "none", ""])
def test_no_name_leads_out_of_the_folder(host, model, inversion, folder, name):
    host.run_node(SAVE, inversion=inversion, filename_prefix="secret")
    secret = (folder / "secret_00001_.safetensors").rename(folder.parent / "secret.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no inversion named"):
        load(host, model, str(secret) if name == "absolute" else name)
    secret.unlink()


@pytest.mark.parametrize("prefix", ["../x", "clips/../../x", "absolute", "", "  ", "."])
def test_nothing_is_saved_outside_the_folder(host, inversion, folder, tmp_path, prefix):
    before = set(folder.parent.rglob("*"))
    prefix = str(tmp_path / "x") if prefix == "absolute" else prefix
    with pytest.raises(ValueError, match="filename_prefix"):
        host.run_node(SAVE, inversion=inversion, filename_prefix=prefix)
    assert set(folder.parent.rglob("*")) == before and not any(tmp_path.iterdir())


# --- models, sizes and schedules that do not fit ----------------------------------------------------------------------


def changed(host, factor):
    """Another model of the same architecture: the same one with other weights."""
    other = tiny_models.svd(host)
    for parameter in other.model.diffusion_model.parameters():
        parameter.data = parameter.data * factor
    return other


def test_another_model_is_refused_when_loaded_and_when_used(host, model, inversion, folder):
    host.run_node(SAVE, inversion=inversion, filename_prefix="clip")
    for other, message in (
        (changed(host, 1.05), "this inversion was made with other weights of the same architecture"),
        (tiny_models.sd15(host), "connect the MODEL that made the inversion|another kind of model"),
        (tiny_models.wan(host), "connect the MODEL that made the inversion"),
    ):
        with pytest.raises(ValueError, match=message):
            load(host, other, "clip_00001_.safetensors")
    counting, calls = tiny_models.counted(changed(host, 1.05))
    with pytest.raises(ValueError, match="other weights of the same architecture"):
        denoised(host, counting, inversion)
    assert calls == []


def test_the_same_weights_in_another_precision_are_taken(host, model, inversion, folder):
    host.run_node(SAVE, inversion=inversion, filename_prefix="clip")
    for dtype in (torch.bfloat16, torch.float16):
        half = changed(host, 1.0)
        half.model.to(dtype)
        assert load(host, half, "clip_00001_.safetensors")[3].evaluations == STEPS


def test_a_lora_on_the_model_makes_no_other_model(host, model, inversion, folder):
    """Not even while the host holds it in place of the weights."""
    host.run_node(SAVE, inversion=inversion, filename_prefix="clip")
    weights = model.model_state_dict("diffusion_model.")
    patched = model.clone()
    patched.add_patches({name: (torch.ones_like(w),) for name, w in weights.items() if w.ndim > 1}, 0.1)
    before = weights["diffusion_model.out.2.weight"].clone()
    again = invert(host, patched)[3]
    assert not torch.equal(again.latent, inversion.latent), "the patches count in sampling"
    in_place = patched.model_state_dict("diffusion_model.")["diffusion_model.out.2.weight"]
    assert not torch.equal(in_place, before), "and lie in the weights now"
    assert torch.equal(again.model.weights, inversion.model.weights)
    load(host, patched, "clip_00001_.safetensors")
    denoised(host, patched, inversion)


def test_another_size_and_another_schedule_are_refused(host, model, inversion, folder):
    from dataclasses import replace

    storage = host.module("pipelines.videoshop.inversion_file")
    large = tiny_models.latent("svd")["samples"].repeat(1, 1, 2, 2)
    wide = replace(inversion, latent=large, trajectory=None, source=None, original=None)
    storage.save_inversion(folder / "wide.safetensors", wide)
    loaded = load(host, model, "wide.safetensors")[3]
    with pytest.raises(ValueError, match="positive was made for 64 x 64 pixels, the clip is 128 x 128"):
        denoised(host, model, loaded)
    with pytest.raises(ValueError, match="connect an empty latent of that size"):
        load(host, model, "wide.safetensors")[2].generate_noise({"samples": torch.zeros(5, 4, 8, 8)})
    hot = replace(inversion, sigmas=inversion.sigmas * 10)
    storage.save_inversion(folder / "hot.safetensors", hot)
    with pytest.raises(ValueError, match="this model's noise levels end at 700"):
        load(host, model, "hot.safetensors")
