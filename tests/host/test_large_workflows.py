"""The graphs of Dreamix and EI² for a user's own large models: run on tiny ones, read by the host's own loaders.

That they are wired as those of the embedded models is tested beside these (test_dreamix_workflows, test_ei2_workflows).
"""

from __future__ import annotations

import native_models
import pytest
import tiny_checkpoint
import tiny_models
import tiny_server
import torch
from results import frames, node_of, saved_latent
from safetensors.torch import load_file
from shipped import tunes

pytestmark = pytest.mark.slow

DREAMIX, EI2 = "dreamix_edit_wan", "ei2_edit_sd15"
TUNE = {DREAMIX: "RewindDreamixFineTune", EI2: "RewindEI2OneShotTune"}
RESULT = {DREAMIX: "Second pass: decode", EI2: None}  # title of the VAEDecode that makes it
LENGTH, STEPS, TUNING = {DREAMIX: 5, EI2: 3}, 4, 2
SHAPES = {  # of the result's latent and of its frames; Dreamix's second pass enlarges by a half
    DREAMIX: ((1, 16, 2, 6, 12), (5, 48, 96, 3)),
    EI2: ((3, 4, 4, 8), (3, 32, 64, 3)),
}


@pytest.fixture(scope="module")
def large(host, tmp_path_factory):
    """A server with what a user of the graphs has, tiny."""
    weights = {
        "UNETLoader": native_models.random_weights(host, "wan21_t2v"),
        "VAELoader": tiny_models.wan_vae_weights(),
        "CheckpointLoaderSimple": tiny_checkpoint.weights(host),
    }
    with tiny_server.serving(tmp_path_factory.mktemp("large"), (DREAMIX, EI2), weights) as server:
        yield server


@pytest.fixture
def tuning(host) -> int:
    """Steps of it, on a host that can."""
    if not tunes(host):
        pytest.skip("this ComfyUI cannot copy a model to tune: what it says of that is tested")
    return TUNING


def small(server, name: str, tuning: int) -> dict:
    """A graph in API form at a small size. tuning: its steps."""
    prompt = tiny_server.small(server, name, {"width": 64, "height": 32, "length": LENGTH[name], "steps": STEPS})
    prompt[node_of(prompt, TUNE[name])]["inputs"]["steps"] = tuning
    return prompt


def check_run(server, name: str, tuning: int) -> None:
    """Run a graph at a small size and look at its result."""
    prompt = small(server, name, tuning)
    samples = prompt[node_of(prompt, "VAEDecode", RESULT[name])]["inputs"]["samples"]
    inputs = {"samples": samples, "filename_prefix": "latents/result"}
    prompt["901"] = {"class_type": "SaveLatent", "inputs": inputs, "_meta": {"title": "save"}}
    history = server.prompt(prompt)
    latent = saved_latent(server, history, "901")
    shown = frames(server, history, node_of(prompt, "PreviewImage", "Edited clip"))
    assert (latent.shape, shown.shape) == SHAPES[name]
    assert torch.isfinite(latent).all()
    assert all(float(frame.std()) > 0.01 for frame in shown)
    (video,) = history["outputs"][node_of(prompt, "SaveVideo")]["images"]
    assert (server.base / "output" / video["subfolder"] / video["filename"]).stat().st_size > 0


@pytest.mark.parametrize("name", [DREAMIX, EI2])
def test_without_tuning_it_runs_on_every_host(large, name):
    check_run(large, name, tuning=0)


def test_dreamix_with_wan_runs_and_keeps_what_it_learnt(large, tuning):
    check_run(large, DREAMIX, tuning)
    (file,) = (large.base / "output" / "loras").glob(f"rewind_dreamix_{tuning}_steps_*.safetensors")
    lora = load_file(file)
    assert lora and all(torch.isfinite(value).all() for value in lora.values())


def test_ei2_with_sd15_runs_and_keeps_what_it_learnt(host, large, tuning):
    check_run(large, EI2, tuning)
    files = (large.base / "models" / "ei2").rglob("*.safetensors")
    kept = [host.module("pipelines.ei2.weights").load_weights(file) for file in files]
    (learnt,) = [one for one in kept if one.about["steps"] == tuning]
    assert learnt.tensors and all(torch.isfinite(value).all() for value in learnt.tensors.values())


@pytest.mark.parametrize("name", [DREAMIX, EI2])
def test_a_host_that_cannot_tune_says_so(host, large, name):
    if tunes(host):
        pytest.skip("this ComfyUI can copy a model")
    with pytest.raises(RuntimeError, match="needs a ComfyUI that can copy a model .*update ComfyUI"):
        large.prompt(small(large, name, TUNING))
