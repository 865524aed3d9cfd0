"""What a node says of its costs before it starts is what it then takes."""

from __future__ import annotations

import re

import fine_tuning
import one_shot
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


def guider_of(host, model, guider):
    """A GUIDER of Wan, by the host's node of that name, and how many sides its network call computes at most."""
    texts = [tiny_models.conditioning("wan", seed) for seed in range(3)]
    sides = {"positive": texts[0], "negative": texts[1]}
    return {
        "BasicGuider": lambda: (*host.run_node("BasicGuider", model=model, conditioning=texts[0]), 1),
        "CFGGuider at 1": lambda: (*host.run_node("CFGGuider", model=model, cfg=1.0, **sides), 1),
        "CFGGuider": lambda: (*host.run_node("CFGGuider", model=model, cfg=2.0, **sides), 2),
        "DualCFGGuider": lambda: (*_dual(host, model, texts), 3),
    }[guider]()


def _dual(host, model, texts):
    conditions = {"cond1": texts[0], "cond2": texts[1], "negative": texts[2]}
    return host.run_node(
        "DualCFGGuider", model=model, cfg_conds=2.0, cfg_cond2_negative=2.0, style="regular", **conditions
    )


@pytest.mark.parametrize("node", ["RewindEDMInversionSampler", "RewindMaskedSampler"])
@pytest.mark.parametrize("guider", ["BasicGuider", "CFGGuider at 1", "CFGGuider", "DualCFGGuider"])
@pytest.mark.parametrize("in_windows", [False, True])
def test_a_sampler_says_its_evaluations_before_the_first(host, told, node, guider, in_windows):
    """On a model of video, whose way back is by no node of this pack's."""
    model = tiny_models.wan(host)
    chosen = windowed(host, model, context_length=2, dim=2) if in_windows else model  # of its three latents
    latent, levels = tiny_models.latent("wan"), tiny_models.sigmas(model, STEPS, "simple")
    made, most = guider_of(host, noting(chosen, told), guider)
    if node == "RewindMaskedSampler":
        values = {"positive": tiny_models.conditioning("wan"), "latent": latent, "sigmas": levels, "strength": 1.0}
        start, _, _, inversion = host.run_node("RewindEDMInversion", model=model, **values)
        inputs = {"inversion": inversion, "mask": torch.ones(1, 64, 64)}
    else:
        start, inputs = latent, {}
    told.clear()
    (sampler,) = host.run_node(node, **inputs)
    assert not told, "a SAMPLER costs nothing before it is used"
    (noise,) = host.run_node(
        "RandomNoise" if start is latent else "DisableNoise", **({"noise_seed": 1} if start is latent else {})
    )
    host.run_node("SamplerCustomAdvanced", noise=noise, guider=made, sampler=sampler, sigmas=levels, latent_image=start)
    text, *calls = told
    assert number(text) == sum(calls) == STEPS * most * (2 if in_windows else 1)
    assert (" in 2 windows " in text) == in_windows and "; at most about " in text
    assert ("to 12 network" in text or "to 24 network" in text) == (guider == "DualCFGGuider")


def test_a_guidance_that_may_change_from_step_to_step_is_told_as_a_range(host, model, told):
    """By a guider of its own, whose cfg need not be a number, or by what is wrapped around the plain one."""
    import comfy.patcher_extension
    import comfy.samplers

    class Scheduled(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options, seed=None):
            conds = (self.conds[name] for name in ("negative", "positive"))
            args = (self.inner_model, x, timestep, *conds, self.cfg[0])
            return comfy.samplers.sampling_function(*args, model_options=model_options, seed=seed)

    def override(executor, *args):
        executor.class_obj.cfg = 3.0 if float(args[1].max()) > 1 else 1.0
        return executor(*args)

    wrapped, sides = noting(model, told), [tiny_models.conditioning("svd", seed) for seed in (0, 1)]
    wrapped.add_wrapper(comfy.patcher_extension.WrappersMP.PREDICT_NOISE, override)
    (sampler,) = host.run_node("RewindEDMInversionSampler")
    (noise,) = host.run_node("RandomNoise", noise_seed=1)
    for guider, cfg in ((Scheduled(noting(model, told)), [2.0]), (comfy.samplers.CFGGuider(wrapped), 1.0)):
        told.clear()
        guider.set_conds(*sides)
        guider.set_cfg(cfg)
        inputs = {"noise": noise, "guider": guider, "sampler": sampler, "latent_image": tiny_models.latent("svd")}
        host.run_node("SamplerCustomAdvanced", sigmas=tiny_models.sigmas(model, STEPS, "karras"), **inputs)
        text, *calls = told
        assert text.startswith(f"{STEPS} to {2 * STEPS} network evaluations; ") and STEPS < sum(calls) <= 2 * STEPS


def test_a_samplers_refinement_is_told(host, model, told):
    (sampler,) = host.run_node("RewindEDMInversionSampler", refine=2)
    (guider,) = host.run_node("BasicGuider", model=noting(model, told), conditioning=tiny_models.conditioning("svd"))
    (noise,) = host.run_node("RandomNoise", noise_seed=1)
    inputs = {"noise": noise, "guider": guider, "sampler": sampler, "latent_image": tiny_models.latent("svd")}
    host.run_node("SamplerCustomAdvanced", sigmas=tiny_models.sigmas(model, STEPS, "karras"), **inputs)
    text, *calls = told
    assert text.startswith("8 to 12 network evaluations; ") and 8 <= sum(calls) <= 12


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
    assert number(text) == len(calls) == STEPS
    size = 5 * int(vae.memory_used_decode(inversion.latent.shape, vae.vae_dtype))
    words = host.module("pipelines.evaluation.memory").in_words(size)
    assert f"); {words} to decode (two clips, " in text


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


@pytest.mark.parametrize("in_windows", [False, True])
def test_the_probe_says_its_evaluations_before_the_first(host, told, in_windows):
    model = one_shot.sd15()
    noted = noting(model, told)
    noted = windowed(host, noted, context_length=2) if in_windows else noted
    inputs = {"weights": one_shot.random_weights(host, model), "samples": {"samples": one_shot.noisy()}}
    host.run_node(one_shot.PROBE, model=noted, conditioning=one_shot.prompt(model), **inputs)
    text, *calls = told
    assert number(text) == sum(calls) == (10 if in_windows else 5) and "; at most about " in text


@pytest.mark.parametrize("learned", [False, True])
def test_an_edit_mask_says_its_pairs_of_frames_before_the_first(host, told, monkeypatch, learned):
    """Learned flow is a network's evaluation each; other flow is none."""
    import comfy.model_patcher

    module = host.module("nodes.masks")

    def flow(frame, other):
        told.append(1)
        return torch.zeros(2, 64, 96)

    monkeypatch.setattr(module, "_flow", lambda optical_flow: flow)
    cpu, clip = torch.device("cpu"), torch.rand(5, 64, 96, 3)
    network = comfy.model_patcher.ModelPatcher(torch.nn.Linear(1, 1), load_device=cpu, offload_device=cpu)
    inputs = {"optical_flow": network} if learned else {}
    host.run_node("RewindEditMask", clip=clip, edited_frame=1 - clip[:1], **inputs)
    text, *calls = told
    costs, words = host.module("pipelines.videoshop.costs"), host.module("pipelines.evaluation.memory").in_words
    weights = network.model_size() if learned else 0
    size = words(costs.flow_bytes(64, 96, learned) + costs.mask_bytes(5, 64, 96) + weights)
    assert len(calls) == 4
    pairs = "4 network evaluations" if learned else "the motion of 4 pairs of frames"
    assert text == f"{pairs}; at most about {size} of main memory"


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


def test_videoshop_conditioning_says_what_goes_through_the_vae(host, told, monkeypatch):
    """As many frames as it then gets, and for each what the host asks for when it loads the VAE."""
    import comfy.model_management as management

    config, keys = host.module("demo.models").ImageToVideoConfig(), host.module("demo.keys")
    builders, parts = host.module("nodes.host.models"), keys.split_checkpoint(tiny_models.checkpoint(host))
    vae, vision = builders.build_vae(parts["vae"], config), builders.build_clip_vision(parts["image_encoder"], config)
    asked, load, encode = [], management.load_models_gpu, vae.encode

    def spy(models, memory_required=0, **rest):
        asked.append(memory_required)
        return load(models, memory_required, **rest)

    def counting(images):
        asked.clear()
        monkeypatch.setattr(management, "load_models_gpu", spy)
        found = encode(images)
        monkeypatch.setattr(management, "load_models_gpu", load)
        told.append((len(images), int(asked[0])))
        return found

    monkeypatch.setattr(vae, "encode", counting)
    clip = torch.rand(5, 64, 64, 3)
    sizes = {"width": 64, "height": 64}
    host.run_node("RewindVideoshopConditioning", clip_vision=vision, vae=vae, clip=clip, edited_frame=clip[:1], **sizes)
    text, *calls = told
    frames, sizes = sum(count for count, _ in calls), {size for _, size in calls}
    assert frames == 8 and len(sizes) == 1
    size, words = sizes.pop(), host.module("pipelines.evaluation.memory").in_words
    assert text.startswith(f"{frames} frames through the VAE (")
    assert f"; about {words(size)} a frame, at most {words(5 * size)} on cpu (" in text


def test_videoshop_conditioning_refuses_a_vae_of_whole_clips(host, told):
    clip = torch.rand(5, 64, 64, 3)
    with pytest.raises(ValueError, match="this VAE takes a clip as a whole"):
        inputs = {"clip": clip, "edited_frame": clip[:1], "vae": tiny_models.wan_vae(), "clip_vision": None}
        host.run_node("RewindVideoshopConditioning", width=64, height=64, **inputs)
    assert not told
