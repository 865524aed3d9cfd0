"""EI² One-Shot Tune and the Covariate-Shift Probe on the host's own models, in process as the host runs a node."""

from __future__ import annotations

import shutil
from statistics import fmean
from types import SimpleNamespace

import fine_tuning
import one_shot
import pytest
import torch
from fine_tuning import equal
from one_shot import STEPS, denoised, noisy, patch, prompt, random_weights


@pytest.fixture(scope="module")
def setting(host):
    fine_tuning.skip_old(host)
    return one_shot.small(host)


@pytest.fixture(scope="module")
def sd15(host):
    return one_shot.sd15()


@pytest.fixture
def folder(host):
    """Where the node keeps runs that ended early; empty before and after."""
    folder = host.module("nodes.host.training").checkpoint_folder()
    shutil.rmtree(folder, ignore_errors=True)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def losses(host, monkeypatch):
    """The losses of every tuning, in turn."""
    module, kept = host.module("nodes.host.one_shot"), []

    def look(*args):
        result = plain(*args)
        kept.append(result[1])
        return result

    plain = module.one_shot_tune
    monkeypatch.setattr(module, "one_shot_tune", look)
    return kept


def close(a, b):
    assert a.tensors.keys() == b.tensors.keys()
    for name in a.tensors:
        torch.testing.assert_close(a.tensors[name], b.tensors[name], rtol=1e-3, atol=2e-5)


def reported(monkeypatch, cancel_at=None):
    """What the node's progress bar shows, (step, whether with a picture); Cancel is pressed at a step."""
    import comfy.model_management as management
    import comfy.utils

    shown = []

    def update(bar, value, total=None, preview=None):
        shown.append((value, preview is not None))
        if value == cancel_at:
            management.interrupt_current_processing()

    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", update)
    return shown


# --- what comes out --------------------------------------------------------------------------------------------------


def test_the_model_is_the_patch_with_the_weights_and_the_input_stays(host, folder, tmp_path):
    fine_tuning.skip_old(host)
    setting = one_shot.demo(host, tmp_path)
    before, images, x = one_shot.state(setting.model), setting.images.clone(), noisy()
    untouched = denoised(host, setting.model, x)
    tuned, weights, plot = setting.tune(host)
    assert equal(one_shot.state(setting.model), before) and torch.equal(setting.images, images)
    assert not setting.model.patches and setting.model.model_options == {"transformer_options": {}}
    assert torch.equal(denoised(host, setting.model, x), untouched)
    assert tuned.model is setting.model.model
    ours = denoised(host, tuned, x)
    assert torch.equal(ours, denoised(host, patch(host, setting.model, weights=weights), x))
    untuned = denoised(host, patch(host, setting.model), x)
    assert float((ours - untuned).abs().max()) > 1e-3
    assert plot.shape[0] == 1 and float(plot.std()) > 0.05
    assert not any(folder.glob("*")), "a run that ended well leaves nothing behind"
    assert weights.caption == "", "the host does not tell the text"
    assert weights.about == {"steps": STEPS, "learning_rate": 0.01, "seed": 0, "frames": one_shot.FRAMES}


def test_what_is_trained(host, setting):
    """Every temporal module and every query; outputs begin at 0, the rest where the seed puts it."""
    inflation, weights = host.module("pipelines.ei2.inflation"), setting.tune(host)[1]
    blocks = inflation.transformer_blocks(setting.model.model.diffusion_model)
    fresh = inflation.fresh_temporal(setting.model.model.diffusion_model, weights.settings, 0)
    layers = [f"temporal.to_{x}.weight" for x in ("q", "k", "v", "out")] + ["attn1.to_q.diff", "attn2.to_q.diff"]
    assert weights.tensors.keys() == {f"{block}.{layer}" for block in blocks for layer in layers}
    for name, tensor in weights.tensors.items():
        block, _, key = name.partition(".temporal.")
        start = fresh[block].folded()[key] if key else torch.zeros_like(tensor)
        assert float((tensor - start).abs().max()) > 1e-4, f"{name} was not trained"
        if name.endswith(("to_v.weight", "temporal.to_out.weight")):
            assert float(torch.linalg.matrix_norm(tensor, 2)) <= 1 + 1e-4


def test_0_steps_tune_nothing(host, losses):
    """What is left is the attention alone, without a copy of the model, so on every host."""
    model, vae = one_shot.sd15(), SimpleNamespace()
    given = {"model": patch(host, model, weights=random_weights(host, model)), "vae": vae, "caption": prompt(model)}
    images = torch.rand(2, 32, 32, 3)
    alone, weights, plot = host.run_node(one_shot.TUNE, **given, images=images, steps=0, attention="first frame")
    x = noisy()
    near = denoised(host, patch(host, model, attention="first frame"), x)
    assert torch.equal(denoised(host, alone, x), near)
    assert torch.equal(denoised(host, patch(host, model, weights=weights), x), near), "as tuned is this attention"
    assert weights.tensors == {} and weights.about == {"steps": 0} and losses == []
    assert plot.message is None, "nodes behind it are left out"


@pytest.mark.parametrize(
    "values",
    [
        {"temporal": "none"},
        {"temporal": "Tune-A-Video", "attention": "sparse-causal"},
        {"centring": "frames + space", "attention": "own frame", "coarse_factor": 3},
    ],
    ids=str,
)
def test_the_choices_are_kept_with_the_weights(host, setting, values):
    tuned, weights, _ = setting.tune(host, steps=1, **values)
    settings = vars(weights.settings)
    names = {"temporal": "temporal", "attention": "attention", "centring": "axes", "coarse_factor": "factor"}
    assert all(settings[names[name]] == value for name, value in values.items())
    assert any(".temporal." in name for name in weights.tensors) == (values.get("temporal") != "none")
    assert torch.isfinite(denoised(host, tuned, noisy())).all()


def test_equal_seeds_tune_equally(host, setting):
    first, again, other = (setting.tune(host, seed=seed)[1].tensors for seed in (3, 3, 4))
    assert equal(first, again) and not equal(first, other)


@pytest.mark.parametrize("family", one_shot.FAMILIES)
def test_every_family_is_tuned_on_odd_sizes(host, setting, losses, family):
    model = one_shot.FAMILIES[family]()
    if family == "sd2":
        (model,) = host.run_node("ModelSamplingDiscrete", model=model, sampling="v_prediction", zsnr=False)
    images = torch.rand(2, 72, 40, 3, generator=torch.Generator().manual_seed(6))
    tuned, weights, _ = setting.tune(host, model=model, caption=prompt(model), images=images, steps=2)
    x = noisy(3, 9, 5)
    assert float((denoised(host, tuned, x) - denoised(host, patch(host, model), x)).abs().max()) > 1e-3
    assert weights.architecture == host.module("pipelines.ei2.inflation").architecture(model.model.diffusion_model)
    assert len(losses[0]) == 2 and all(0 < loss < 1e3 for loss in losses[0])


@pytest.mark.parametrize("sampling", ["eps", "v_prediction"])
def test_the_loss_is_the_models_own(host, setting, losses, sampling):
    """Of the first step, by hand: the error of the noise, or of v, of the denoised estimate of core nodes."""
    training, tuning = host.module("pipelines.training"), host.module("pipelines.ei2.tuning")
    (model,) = host.run_node("ModelSamplingDiscrete", model=setting.model, sampling=sampling, zsnr=False)
    setting.tune(host, model=model, steps=1, seed=5)
    latents = host.run_node("VAEEncode", pixels=setting.images, vae=setting.vae)[0]["samples"]
    clean, generator = model.model.process_latent_in(latents), training.step_generator(5, 0)
    sigma = tuning.draw_time(model.get_model_object("model_sampling").sigmas.cpu(), generator)
    noise = torch.randn(clean.shape, generator=generator)
    x = clean + sigma * noise
    estimate = denoised(host, patch(host, model), x, sigma=sigma)
    if sampling == "eps":
        error = (x - estimate) / sigma - noise
    else:  # v = (noise - sigma x0) / sqrt(1 + sigma^2), of which x0 = (x - sigma sqrt(1 + sigma^2) v) / (1 + sigma^2)
        root = (1 + sigma**2) ** 0.5
        error = (x - (1 + sigma**2) * estimate) / (sigma * root) - (noise - sigma * clean) / root
    assert losses[0] == [pytest.approx(float(error.square().mean()), rel=1e-3)]


def test_the_loss_falls(host, setting):
    """On held noise: the tuned model's estimate is nearer to the clip."""
    tuned, _, _ = setting.tune(host, steps=12, learning_rate=0.02)
    latents = host.run_node("VAEEncode", pixels=setting.images, vae=setting.vae)[0]["samples"]
    clean = setting.model.model.process_latent_in(latents)
    x = clean + one_shot.SIGMA * noisy(height=4, width=4, seed=7) / 1.8
    errors = [
        float((denoised(host, model, x, setting.caption) - clean).square().mean())
        for model in (patch(host, setting.model), tuned)
    ]
    assert errors[1] < 0.96 * errors[0]


# --- how it is trained -----------------------------------------------------------------------------------------------


def test_recomputed_blocks_tune_alike(host, setting, losses):
    kept, again = (setting.tune(host, gradient_checkpointing=on)[1] for on in (False, True))
    close(kept, again)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_half_precision_tunes_near_to_it(host, setting, losses):
    tuned = [setting.tune(host, mixed_precision=kind)[1] for kind in ("float32", "bfloat16")]
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.05)
    assert {tensor.dtype for tensor in tuned[1].tensors.values()} == {torch.float32}


LAYER = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_v"


def lora_on(model):
    """A LoRA on the smallest MODEL, by the host's own function."""
    import comfy.sd

    up, down = (torch.randn(64, 2, generator=torch.Generator().manual_seed(seed)) for seed in (8, 9))
    lora = {f"{LAYER}.lora_up.weight": up, f"{LAYER}.lora_down.weight": down.T.contiguous()}
    return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]


def test_a_patch_on_the_model_is_taken_off_and_a_lora_counts(host, setting, losses):
    plain = setting.tune(host)[1]
    patched = patch(host, setting.model, weights=random_weights(host, setting.model), attention="first frame")
    assert equal(setting.tune(host, model=patched)[1].tensors, plain.tensors) and losses[1] == losses[0]
    with_lora = lora_on(setting.model)
    tuned, weights, _ = setting.tune(host, model=with_lora)
    assert losses[2] != losses[0] and f"{LAYER}.weight" in tuned.patches
    x = noisy()
    assert torch.equal(denoised(host, tuned, x), denoised(host, patch(host, with_lora, weights=weights), x))
    assert list(with_lora.patches) == [f"{LAYER}.weight"]


def test_guidance_and_fast_kernels_of_the_model_do_not_reach_the_tuning(host, setting):
    """A guidance function would mix in zeros; attention without a way back would train nothing."""
    changed = setting.model.clone()
    changed.set_model_sampler_cfg_function(lambda args: 0 * args["cond"])
    changed.model_options["transformer_options"]["optimized_attention_override"] = lambda f, q, k, v, *a, **b: 0 * q
    assert equal(setting.tune(host, model=changed)[1].tensors, setting.tune(host)[1].tensors)
    assert "sampler_cfg_function" in changed.model_options


def test_progress_is_shown_each_step_and_now_and_then_with_a_picture(host, setting, monkeypatch):
    shown = reported(monkeypatch)
    setting.tune(host, steps=11)
    # The sampler in whose seat it runs has a bar of its own, which has no steps to show.
    assert shown == [(step, step == 10) for step in range(1, 12)]


def test_cancel_leaves_a_file_from_which_the_next_run_goes_on(host, setting, folder, monkeypatch):
    import comfy.model_management as management

    whole = setting.tune(host, steps=4)[1]
    with monkeypatch.context() as patch_, pytest.raises(management.InterruptProcessingException):
        reported(patch_, cancel_at=2)
        setting.tune(host, steps=4)
    (file,) = folder.glob("ei2-*.safetensors")
    with monkeypatch.context() as patch_:
        shown = reported(patch_)
        resumed = setting.tune(host, steps=4, gradient_checkpointing=False)[1]
    assert [step for step, _ in shown] == [3, 4], "the steps that were done are not done again"
    assert equal(resumed.tensors, whole.tensors) and not file.exists()


def test_another_clip_caption_model_or_seed_is_another_run(host, setting, folder, monkeypatch):
    """What was cancelled is not gone on with by mistake."""
    import comfy.model_management as management

    by_v = host.run_node("ModelSamplingDiscrete", model=setting.model, sampling="v_prediction", zsnr=False)[0]
    cases = (
        {},
        {"model": lora_on(setting.model)},
        {"model": by_v},
        {"images": setting.images.flip(0)},
        {"caption": prompt(setting.model, 1)},
        {"seed": 1},
        {"temporal": "none"},
        {"attention": "first frame"},
    )
    for values in cases:
        with monkeypatch.context() as patch_, pytest.raises(management.InterruptProcessingException):
            reported(patch_, cancel_at=1)
            setting.tune(host, steps=2, **values)
    assert len(list(folder.glob("ei2-*.safetensors"))) == len(cases)


def test_a_run_writes_its_file_now_and_then(host, setting, folder, monkeypatch):
    written = []
    training = host.module("pipelines.training")
    monkeypatch.setattr(training, "write_checkpoint", lambda path, run: written.append((path.parent, run.step)))
    setting.tune(host, steps=5, checkpoint_every=2)
    assert written == [(folder, 2), (folder, 4)]


def test_the_host_is_told_that_it_trains_and_that_it_is_over(host, setting):
    import comfy.model_management as management

    seen = []

    def look(apply_model, args):
        seen.append((management.in_training, torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        if len(seen) > 1:
            raise RuntimeError("stop")
        return apply_model(args["input"], args["timestep"], **args["c"])

    model = setting.model.clone()
    model.set_model_unet_function_wrapper(look)
    with pytest.raises(RuntimeError, match="stop"):
        setting.tune(host, model=model)
    assert set(seen) == {(True, False, True)} and management.in_training is False
    assert not torch.is_inference_mode_enabled()


def test_the_memory_check_leaves_no_trace(host, setting, folder):
    checked, plain = (setting.tune(host, steps=1, memory_check=on)[1] for on in (True, False))
    assert equal(checked.tensors, plain.tensors) and not any(folder.glob("*"))


# --- Covariate-Shift Probe -------------------------------------------------------------------------------------------

LEVELS = (0.9, 0.7, 0.5, 0.3, 0.1)  # shares of the training times, as the node takes them


def probe(host, model, weights, x, seed=3):
    samples = {"samples": model.model.process_latent_out(x)}
    return host.run_node(
        one_shot.PROBE, model=model, weights=weights, samples=samples, conditioning=prompt(model), seed=seed
    )


def seen_by_hand(host, model, clean, name, seed=3):
    """Mean and variance shift of one block at each level, two rows of numbers, from the features at its hooks."""
    block = model.model.diffusion_model.get_submodule(name)
    seen, sigmas = {}, model.get_model_object("model_sampling").sigmas
    handles = [
        block.norm1.register_forward_pre_hook(lambda m, args: seen.update(x=args[0].clone())),
        block.attn1.to_out.register_forward_hook(lambda m, args, out: seen.update(x=seen["x"] + out)),
        block.norm2.register_forward_pre_hook(lambda m, args: seen.update(y=args[0].clone())),
    ]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    shifts = []
    for share in LEVELS:
        sigma = float(sigmas[round(share * 999)])
        denoised(host, model, clean + sigma * noise, sigma=sigma)
        x, y = (seen[key].double().flatten(0, 1) for key in "xy")
        spread = x.var(0, correction=0)
        moved = (y.mean(0) - x.mean(0)).norm() / spread.sum().sqrt()
        shifts.append((float(moved), float((y.var(0, correction=0) / spread).log().abs().mean())))
    for handle in handles:
        handle.remove()
    return list(zip(*shifts))


def numbers(table):
    """The header of a Markdown table, and its rows by name."""
    header, _, *rows = ([cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines())
    return header, {name: [float(value) for value in values] for name, *values in rows}


@pytest.mark.parametrize("temporal", ["STAM", "Tune-A-Video"])
def test_the_probe_measures_what_passes_the_modules(host, sd15, temporal):
    clean, tuned = noisy(3, 9, 5, seed=2), random_weights(host, sd15, scale=30.0, temporal=temporal)
    picture, mean_shift, variance_shift, table = probe(host, sd15, tuned, clean)
    over_levels, *at_levels = (numbers(part) for part in table.split("\n\n"))
    blocks = list(host.module("pipelines.ei2.inflation").transformer_blocks(sd15.model.diffusion_model))
    names = [name.replace(".transformer_blocks.", ".") for name in blocks]
    assert list(over_levels[1]) == names and over_levels[0] == ["block", "mean shift", "variance shift"]
    sigmas = sd15.get_model_object("model_sampling").sigmas
    levels = [f"{float(sigmas[round(share * 999)]):.3g}" for share in LEVELS]
    assert [header for header, _ in at_levels] == [[f"{kind} shift at sigma", *levels] for kind in ("mean", "variance")]
    patched = patch(host, sd15, weights=tuned)
    for index in (0, 2, len(blocks) - 1):
        for (_, rows), seen in zip(at_levels, seen_by_hand(host, patched, clean, blocks[index]), strict=True):
            assert rows[names[index]] == pytest.approx(seen, rel=1e-3, abs=1e-4), "each level in its own column"
    for column, (value, (_, rows)) in enumerate(zip((mean_shift, variance_shift), at_levels, strict=True)):
        whole = rows.pop("all blocks")
        assert list(rows) == names and whole == pytest.approx([fmean(c) for c in zip(*rows.values())], abs=1e-4)
        means = {name: fmean(row) for name, row in rows.items()}
        assert means == pytest.approx({name: row[column] for name, row in over_levels[1].items()}, abs=1e-4)
        assert value == pytest.approx(fmean(means.values()), abs=1e-4) and value > 1e-3
    _, height, across, channels = picture.shape
    assert channels == 3 and 400 <= across <= 800 and 150 <= height <= 1000 and float(picture.std()) > 0.02
    again = probe(host, patched, tuned, clean)
    assert again[1:] == (mean_shift, variance_shift, table), "a patch on the MODEL makes no difference"
    assert probe(host, sd15, tuned, clean, seed=4)[1] != mean_shift


def test_a_module_that_adds_nothing_shifts_nothing(host, sd15):
    _, mean_shift, variance_shift, _ = probe(host, sd15, random_weights(host, sd15, scale=0.0), noisy())
    assert mean_shift == 0 and variance_shift == 0
    with pytest.raises(ValueError, match="no temporal modules"):
        probe(host, sd15, random_weights(host, sd15, temporal="none"), noisy())
