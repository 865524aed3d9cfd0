"""What a node says of its costs before it starts is what it then takes."""

from __future__ import annotations

import re

import fine_tuning
import pytest
import tiny_models
import torch
from context_windows import windowed

STEPS = 4


@pytest.fixture(scope="module")
def model(host):
    return tiny_models.svd(host)


@pytest.fixture
def told(host, monkeypatch):
    """What nodes say while they run, in order; tests put other events between."""
    texts = []
    monkeypatch.setattr(host.module("nodes.host.costs"), "tell", lambda node_id, node, text, **_: texts.append(text))
    return texts


def invert(host, model, steps=STEPS, family="svd", **inputs):
    values = {
        "positive": tiny_models.conditioning(family),
        "latent": tiny_models.latent(family),
        "sigmas": tiny_models.sigmas(model, steps, "karras"),
        "strength": 1.0,
    }
    return host.run_node("RewindEDMInversion", model=model, **values | inputs)


def noting(model, events):
    """A clone that notes its calls among the events: how many sides each computes."""
    clone = model.clone()

    def note(apply_model, args):
        events.append(len(args["cond_or_uncond"]))
        return apply_model(args["input"], args["timestep"], **args["c"])

    clone.set_model_unet_function_wrapper(note)
    return clone


def number(text):
    """The most evaluations that a text speaks of."""
    return int(re.match(r"(?:\d+ to )?(\d+) network evaluations?", text)[1])


# --- evaluations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inputs",
    [{}, {"strength": 0.5}, {"refine": 2}, {"negative": tiny_models.conditioning("svd", 1), "cfg": 2.0}],
    ids=["plain", "half", "refined", "guided"],
)
def test_an_inversion_says_its_evaluations_before_the_first(host, model, told, inputs):
    invert(host, noting(model, told), **inputs)
    text, *calls = told
    assert all(isinstance(call, int) for call in calls)
    if "refine" in inputs:
        assert text.startswith("8 to 12 network evaluations; ") and 8 <= sum(calls) <= 12
    else:
        assert number(text) == sum(calls)


@pytest.mark.parametrize(
    "inputs",
    [
        {"first_guidance": 1.0, "last_guidance": 1.0},
        {"first_guidance": 1.0, "last_guidance": 3.0},
        {"first_guidance": 2.0, "last_guidance": 2.0, "guidance_from": 0.01, "guidance_to": 300.0},
    ],
    ids=["unguided", "guided", "in an interval"],
)
def test_the_way_back_says_its_evaluations_before_the_first(host, model, told, inputs):
    *_, inversion = invert(host, model)
    told.clear()
    conditions = {"positive": tiny_models.conditioning("svd", 1), "negative": tiny_models.conditioning("svd", 2)}
    host.run_node("RewindSVDDenoise", model=noting(model, told), inversion=inversion, **conditions, **inputs)
    text, *calls = told
    assert number(text) == sum(calls) and len(calls) >= STEPS


WINDOWS = {
    "static": ({}, {}, "in 4 windows"),
    "batched": ({"context_schedule": "batched", "context_length": 3}, {}, "in 2 windows"),
    "moving": ({"context_schedule": "standard_uniform"}, {}, r"in \d to \d windows"),
    "looped": ({"context_schedule": "looped_uniform", "closed_loop": True}, {}, "in 5 windows"),
    "in parts": ({}, {"frames_at_once": 4}, r"in 2 parts \(of at most 3 frames\) of 2 windows"),
    "too short": ({"context_length": 5}, {}, None),
}


@pytest.mark.parametrize(("settings", "inputs", "words"), WINDOWS.values(), ids=WINDOWS)
def test_evaluations_in_context_windows_are_told_there_and_back(host, model, told, settings, inputs, words):
    """As many times as there are windows, also where the host's schedule changes their number from step to step."""
    negative = tiny_models.conditioning("svd", 2)
    in_windows = windowed(host, noting(model, told), **{"context_length": 2} | settings)
    *_, inversion = invert(host, in_windows, negative=negative, cfg=2.0, **inputs)
    runs = [list(told)]
    told.clear()
    conditions = {"positive": tiny_models.conditioning("svd", 1), "negative": negative}
    # Guided at the first levels alone, where the number of windows may be another than at the others.
    between = {"first_guidance": 1.0, "last_guidance": 3.0, "guidance_from": float(inversion.sigmas[1])}
    host.run_node("RewindSVDDenoise", model=in_windows, inversion=inversion, **conditions, **between)
    runs.append(list(told))
    for text, *calls in runs:
        assert number(text) == sum(calls) and 2 in calls
        of_what = r" \(of \d latent frames\); at most about"
        assert "window" not in text if words is None else re.search(f" network evaluations {words}{of_what}", text)


def test_a_round_trip_says_its_evaluations_before_the_first(host, told):
    config, keys = host.module("demo.models").ImageToVideoConfig(), host.module("demo.keys")
    builders, parts = host.module("nodes.host.models"), keys.split_checkpoint(tiny_models.checkpoint(host))
    model, vae = builders.build_model(parts["unet"], config), builders.build_vae(parts["vae"], config)
    *_, inversion = invert(host, model)
    told.clear()
    host.run_node(
        "RewindRoundTripCheck",
        model=noting(model, told),
        positive=tiny_models.conditioning("svd"),
        inversion=inversion,
        vae=vae,
        clip=torch.rand(5, 64, 64, 3),
    )
    text, *calls = told
    assert number(text) == len(calls) == STEPS and "decoding two clips" in text


def test_a_fine_tuning_says_its_passes_before_the_first_step(host, svd, told, monkeypatch):
    module, passes = host.module("nodes.host.mixed_training"), []
    original = module.denoiser

    def counting(*args):
        denoise = original(*args)
        return lambda *inputs: (passes.append(1), denoise(*inputs))[1]

    monkeypatch.setattr(module, "denoiser", counting)
    for alpha, share in ((1.0, 1), (0.0, 1), (0.5, 2)):
        told.clear()
        passes.clear()
        svd.tune(host, alpha=alpha)
        assert len(told) == 1
        assert told[0].startswith(f"{share * fine_tuning.STEPS} passes of the network there and back; ")
        assert len(passes) == share * fine_tuning.STEPS and "memory_check is off" in told[0]


def test_a_fine_tuning_says_its_memory_and_refuses_by_the_same_number(host, svd, told, monkeypatch):
    import comfy.model_management as management

    svd.tune(host, memory_check=True)
    (text,) = told
    needed = re.search(r"at most about .* on cpu \((.*) of weights and (.*) to train", text)
    assert needed and needed[1] == host.module("pipelines.evaluation.memory").in_words(svd.model.model_size())
    mib = int(re.match(r"(\d+) MiB", needed[2])[1])
    for free, fits in ((mib + 2, True), (mib - 2, False)):
        monkeypatch.setattr(management, "get_free_memory", lambda *_, free=free: free * 2**20)
        if fits:
            svd.tune(host, memory_check=True)
        else:
            with pytest.raises(ValueError, match="beside the model"):
                svd.tune(host, memory_check=True)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_memory_is_what_the_host_itself_reckons_with(host, model, told, monkeypatch):
    """What it asks for when it loads the model: for one side, and with guidance for both."""
    import comfy.model_management as management

    asked, load = [], management.load_models_gpu

    def spy(models, memory_required=0, minimum_memory_required=None, **rest):
        asked.append((memory_required, minimum_memory_required))
        return load(models, memory_required, minimum_memory_required=minimum_memory_required, **rest)

    monkeypatch.setattr(management, "load_models_gpu", spy)
    words = host.module("pipelines.evaluation.memory").in_words
    weights = model.model_size()
    *_, inversion = invert(host, model)
    both, one = asked[-1]
    assert both == 2 * one > 0
    assert f"at most about {words(weights + one)} on cpu ({words(weights)} of weights and {words(one)}" in told[0]
    size = (STEPS + 1) * inversion.latent.numel() * 4
    assert told[0].endswith(f"; {words(size)} of main memory (the clip at {STEPS + 1} noise levels in float32)")
    told.clear()
    conditions = {"positive": tiny_models.conditioning("svd", 1), "negative": tiny_models.conditioning("svd", 2)}
    host.run_node("RewindSVDDenoise", model=model, inversion=inversion, **conditions, last_guidance=2.0)
    assert asked[-1] == (both, one) and f"and {words(both)} to compute" in told[0]


def test_context_windows_count_as_the_host_counts_them(host, model):
    """One window at a time is computed, and that is what is told."""
    in_windows = windowed(host, model, context_length=2)
    costs, sampling = host.module("nodes.host.costs"), host.module("nodes.host.sampling")
    samples, positive = tiny_models.latent("svd")["samples"], tiny_models.conditioning("svd")
    sizes = [costs.sampling_bytes(sampling.guider(m, positive), samples, False) for m in (model, in_windows)]
    assert sizes[1] == pytest.approx(sizes[0] * 2 / 5, rel=0.01)
    words = costs.sampling_in_words(sampling.guider(in_windows, positive), samples, False)
    assert words.startswith("at most about ")


def test_all_is_logged_and_its_brackets_are_left_out_on_the_page(host, model, monkeypatch, caplog):
    """A node of usual width has two lines of about fifty characters for it."""
    from server import PromptServer

    sent = []
    monkeypatch.setattr(PromptServer.instance, "send_progress_text", lambda text, node_id: sent.append((text, node_id)))
    with caplog.at_level("INFO"):
        invert(host, model)
    ((shown, node_id),) = sent
    assert node_id == "1"
    assert re.fullmatch(r"4 network evaluations; at most about \d+ [KM]iB on cpu; \d+ [KM]iB of main memory", shown)
    (logged,) = (r.getMessage() for r in caplog.records if r.getMessage().startswith("EDM Inversion: "))
    assert "to compute, as ComfyUI reckons)" in logged and "noise levels in float32)" in logged
    assert re.sub(r" \(.*?\)", "", logged) == f"EDM Inversion: {shown}"


@pytest.mark.parametrize("name", ["RewindSaveInversion", "RewindLoadInversion"])
def test_memory_of_a_stored_inversion_is_told_before_it_is_stored(host, model, told, monkeypatch, name):
    *_, inversion = invert(host, model, trajectory_dtype="float16")
    host.run_node("RewindSaveInversion", inversion=inversion, filename_prefix="told")
    module = host.module("nodes.inversions")
    for function in ("save_inversion", "load_inversion"):
        original = getattr(module, function)
        monkeypatch.setattr(module, function, lambda *a, f=original: (told.append("the file"), f(*a))[1])
    told.clear()
    import folder_paths

    folder_paths.filename_list_cache.clear()
    inputs = {
        "RewindSaveInversion": {"inversion": inversion, "filename_prefix": "told"},
        "RewindLoadInversion": {"model": model, "inversion_name": "told_00001_.safetensors"},
    }
    host.run_node(name, **inputs[name])
    before, work, after = told
    assert work == "the file" and re.search(r"\d+ KiB", before)
    assert re.search(r"a latent of 5 x 4 x 8 x 8, 4 steps, 5 states in float16", after)


def test_a_files_brackets_are_shown(host, model, monkeypatch):
    *_, inversion = invert(host, model)
    shown = []
    monkeypatch.setattr(host.module("nodes.host.costs"), "show_text", lambda node_id, text: shown.append(text))
    host.run_node("RewindSaveInversion", inversion=inversion, filename_prefix="clip (final)")
    assert shown[-1].startswith("saved clip (final)_00001_.safetensors, ")
