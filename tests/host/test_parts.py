"""Clips longer than the model: in parts, and in the host's context windows, there and back."""

from __future__ import annotations

import json
from types import SimpleNamespace

import comfy_host
import context_windows
import pytest
import tiny_models
import torch
from graph import to_api
from results import frames, node_of

STEPS, AT_ONCE = 4, 3
SPANS = [(0, 3), (2, 5), (4, 7)]
FRAMES = 7


@pytest.fixture(scope="module")
def model(host):
    return tiny_models.svd(host)


@pytest.fixture(scope="module")
def conditions():
    return {"source": tiny_models.conditioning("svd"), "edited": tiny_models.conditioning("svd", seed=1)}


@pytest.fixture(scope="module")
def source():
    clip = torch.cat([tiny_models.latent("svd", seed)["samples"] for seed in (0, 3)])[:FRAMES]
    return {"samples": clip}


def invert(host, model, latent, conditions, **inputs):
    sigmas = tiny_models.sigmas(model, STEPS, "karras")
    values = {"strength": 1.0, "frames_at_once": AT_ONCE} | inputs
    return host.run_node(
        "RewindEDMInversion", model=model, positive=conditions["source"], latent=latent, sigmas=sigmas, **values
    )


def denoise(host, model, conditions, inversion, positive="edited", **inputs):
    both = {"positive": conditions[positive], "negative": conditions["source"]}
    return host.run_node("RewindSVDDenoise", model=model, inversion=inversion, **both, **inputs)[0]["samples"]


def spied(model):
    """The MODEL, and what its network is called with: the frames and the first frame that it is told of."""
    spying, seen = model.clone(), []

    def spy(apply_model, args):
        told = args["c"]["c_concat"]
        seen.append((len(args["input"]), told[0].cpu(), args["c"]["c_crossattn"].cpu()))
        assert (told == told[:1]).all(), "every frame of a part is told of the same one"
        return apply_model(args["input"], args["timestep"], **args["c"])

    spying.set_model_unet_function_wrapper(spy)
    return spying, seen


# --- parts ------------------------------------------------------------------------------------------------------------


def test_each_part_is_told_of_the_frame_that_it_shares(host, model, conditions, source):
    spying, seen = spied(model)
    rewound, *_, inversion = invert(host, spying, source, conditions)
    assert [count for count, *_ in seen] == 3 * STEPS * [AT_ONCE] and inversion.evaluations == len(seen)
    assert rewound["samples"].shape == source["samples"].shape == inversion.latent.shape
    assert torch.equal(rewound["samples"], model.model.process_latent_out(inversion.latent))
    first = conditions["source"][0][1]["concat_latent_image"]
    for (_, told, embedding), (start, _) in zip(seen[::STEPS], SPANS, strict=True):
        torch.testing.assert_close(told, source["samples"][start] if start else first[0])
        torch.testing.assert_close(embedding, seen[0][2])

    seen.clear()
    result = denoise(host, spying, conditions, inversion)
    assert len(seen) == 3 * STEPS and result.shape == source["samples"].shape
    first = conditions["edited"][0][1]["concat_latent_image"]
    for (_, told, _), (start, _) in zip(seen[::STEPS], SPANS, strict=True):
        torch.testing.assert_close(told, result[start] if start else first[0])


@pytest.mark.parametrize("kind", ["off", "frame"])
def test_an_unedited_clip_comes_back(host, model, conditions, source, kind):
    (latent,) = host.run_node("RewindLatentNormalize", model=model, latent=source, kind=kind)
    *_, inversion = invert(host, model, latent, conditions, refine=30, damping=0.0)
    back = denoise(host, model, conditions, inversion, positive="source")
    error = (back - source["samples"]).norm() / source["samples"].norm()
    assert error < 5e-3
    # Without the undoing, the frame that a part is told of is in the clip's own scale all the same.
    still = denoise(host, model, conditions, inversion, positive="source", denormalize=False)
    undone = inversion.normalisation.undo(model.model.process_latent_in(still)) if kind == "frame" else None
    if undone is not None:
        assert (model.model.process_latent_out(undone) - source["samples"]).norm() / source["samples"].norm() < 5e-3


def test_outside_a_mask_every_part_is_the_source_to_the_bit(host, model, conditions, source):
    mask = torch.zeros(1, 64, 64)
    mask[:, :16, :16] = 1
    *_, inversion = invert(host, model, source, conditions)
    result = denoise(host, model, conditions, inversion, mask=mask)
    assert torch.equal(result[:, :, 2:], source["samples"][:, :, 2:])
    assert torch.equal(result[:, :, :, 2:], source["samples"][:, :, :, 2:])
    assert all((result - source["samples"])[frame, :, :2, :2].abs().mean() > 0.01 for frame in range(FRAMES))


def test_guidance_runs_over_all_parts(host, model, conditions, source):
    """Guidance of 1 on the first frame and more on the last changes the last frames most."""
    *_, inversion = invert(host, model, source, conditions)
    plain, guided = (denoise(host, model, conditions, inversion, last_guidance=last) for last in (1.0, 3.0))
    torch.testing.assert_close(guided[:1], plain[:1], rtol=0.05, atol=0.2)
    change = (guided - plain).square().mean((1, 2, 3))
    assert change[0] < 0.2 * change[-3:].mean()


def test_a_kept_inversion_in_parts_serves_edits(host, model, conditions, source):
    *_, inversion = invert(host, model, source, conditions)
    host.run_node("RewindSaveInversion", inversion=inversion, filename_prefix="parts")
    *_, noise, loaded = host.run_node("RewindLoadInversion", model=model, inversion_name="parts_00001_.safetensors")
    assert torch.equal(denoise(host, model, conditions, loaded), denoise(host, model, conditions, inversion))
    with pytest.raises(ValueError, match="was made in 3 parts, which SVD Denoise alone plays again"):
        noise.generate_noise({"samples": torch.zeros_like(source["samples"])})


def test_as_many_frames_as_the_clip_has_are_one_part(host, model, conditions, source):
    whole = invert(host, model, source, conditions, frames_at_once=0)
    for at_once in (FRAMES, 100):
        one = invert(host, model, source, conditions, frames_at_once=at_once)
        assert torch.equal(one[0]["samples"], whole[0]["samples"]) and one[3].joins is None
        assert torch.equal(one[2].generate_noise({"samples": torch.zeros_like(source["samples"])}), whole[2].noise)


def test_costs_of_all_parts_are_told_before(host, model, conditions, source, caplog):
    with caplog.at_level("INFO"):
        *_, inversion = invert(host, model, source, conditions)
        denoise(host, model, conditions, inversion, last_guidance=2.0)
    assert f"{3 * STEPS} network evaluations in 3 parts (of at most 3 frames)" in caplog.text
    assert f"{6 * STEPS} network evaluations in 3 parts (of at most 3 frames)" in caplog.text


def test_what_cannot_go_in_parts_is_refused_before_any_step(host, model, conditions, source):
    with pytest.raises(ValueError, match="frames_at_once is 1; it must be at least 2"):
        invert(host, model, source, conditions, frames_at_once=1)
    other = tiny_models.sd15(host)
    latent = tiny_models.latent("sd15")
    sigmas = tiny_models.sigmas(other, STEPS, "karras")
    values = {"positive": tiny_models.conditioning("sd15"), "latent": latent, "sigmas": sigmas}
    with pytest.raises(ValueError, match="this MODEL is not told of a first frame"):
        host.run_node("RewindEDMInversion", model=other, **values, frames_at_once=2)
    *_, inversion = invert(host, model, source, conditions)
    with pytest.raises(ValueError, match="was made in 3 parts"):
        host.run_node("RewindMaskedSampler", inversion=inversion, mask=torch.ones(1, 64, 64))


def test_cancel_stops_a_later_part_too(host, model, conditions, source):
    import comfy.model_management as management

    def stop(number):
        if number == STEPS + 1:
            management.interrupt_current_processing()

    stopping, calls = tiny_models.counted(model, stop)
    with pytest.raises(management.InterruptProcessingException):
        invert(host, stopping, source, conditions)
    assert len(calls) == STEPS + 1


# --- context windows --------------------------------------------------------------------------------------------------


def windowed(host, model, **more):
    fix = "causal_window_fix" in context_windows.known_inputs(host)
    values = {"causal_window_fix": False} if fix else {}
    return context_windows.windowed(host, model, **values | more), fix


def test_context_windows_go_there_and_back(host, model, conditions, source):
    """Every window is told of the first frame of the clip, the source's there and the edited one back."""
    spying, seen = spied(model)
    in_windows, _ = windowed(host, spying)
    *_, inversion = invert(host, in_windows, source, conditions, frames_at_once=0, refine=30, damping=0.0)
    assert {count for count, *_ in seen} == {3}
    told = conditions["source"][0][1]["concat_latent_image"][0]
    for _, frame, _ in seen:
        torch.testing.assert_close(frame, told)
    seen.clear()
    back = denoise(host, in_windows, conditions, inversion, positive="source")
    assert (back - source["samples"]).norm() / source["samples"].norm() < 5e-3
    seen.clear()
    edited = denoise(host, in_windows, conditions, inversion)
    for _, frame, _ in seen:
        torch.testing.assert_close(frame, conditions["edited"][0][1]["concat_latent_image"][0])
    assert (edited - back).norm() / back.norm() > 1e-3


def test_a_frame_more_in_a_window_is_left_out(host, model, conditions, source):
    """Newer hosts add a frame to every later window, unless told not to, and do not tell their own SVD of it."""
    in_windows, fix = windowed(host, model)
    if not fix:
        pytest.skip(f"ComfyUI {host.version} adds no frame to its windows")
    with_frame, _ = windowed(host, model, causal_window_fix=True)
    results = []
    for patched in (in_windows, with_frame):
        rewound, levels, _, inversion = invert(host, patched, source, conditions, frames_at_once=0)
        (sampler,) = host.run_node("RewindMaskedSampler", inversion=inversion, mask=torch.ones(1, 64, 64))
        (guider,) = host.run_node("BasicGuider", model=patched, conditioning=conditions["edited"])
        (none,) = host.run_node("DisableNoise")
        values = {"noise": none, "guider": guider, "sampler": sampler, "sigmas": levels, "latent_image": rewound}
        played = host.run_node("SamplerCustomAdvanced", **values)[0]["samples"]
        results.append((inversion.latent, denoise(host, patched, conditions, inversion), played))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    torch.testing.assert_close(results[0][2], results[0][1], rtol=1e-4, atol=1e-4)
    assert with_frame.model_options["context_handler"].causal_window_fix, "the MODEL itself stays as it was"


def test_the_windows_without_a_host_are_the_hosts(host):
    own, inputs = host.module("pipelines.videoshop.windows"), context_windows.known_inputs(host)
    from comfy import context_windows as hosts

    assert inputs["context_overlap"][1]["default"] == own.OVERLAP
    for length in (2, 3, 5, 8, 9, 16):
        handler = SimpleNamespace(context_length=length, context_overlap=min(own.OVERLAP, length // 2))
        for count in (1, 7, 8, 9, 10, 12, 13, 31, 32, 33):
            theirs = hosts.create_windows_static_standard(count, handler, {})
            assert [list(range(*window)) for window in own.windows(count, length)] == theirs, (count, length)
    for length in range(1, 17):
        assert own.pyramid(length).tolist() == hosts.create_weights_pyramid(length), length


# --- the workflows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "division"), [("videoshop_long", "in 5 parts"), ("videoshop_windows", "in 7 windows")]
)
def test_the_long_graph_shows_the_known_answer_to_its_end(host, server, trained, name, division):
    workflow = json.loads((comfy_host.ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    prompt = to_api(workflow, server.object_info())
    result = frames(server, server.prompt(prompt), node_of(prompt, "PreviewImage")).movedim(-1, 1)
    given = prompt[node_of(prompt, "RewindDemoClip")]["inputs"]
    clip, metrics = host.module("demo.clip"), host.module("pipelines.evaluation.metrics")
    truth = clip.example(given["seed"], given["edit"], world=clip.world_of(given["frames"]))
    assert result.shape == truth.source.shape and len(result) == 4 * 8
    assert server.log.read_text().count(f" network evaluations {division} ") >= 2, "there and back"
    if not trained:
        return
    for start, stop in host.module("pipelines.videoshop.parts").parts(len(result), 8):
        region = truth.region[start:stop]
        edit, left = (
            metrics.psnr(shown[start:stop], truth.target[start:stop], region) for shown in (result, truth.source)
        )
        assert edit > left + 3, (start, stop)
