"""Dreamix Mixed Fine-Tune on the host's own models, in process as the host runs a node, and through its server."""

from __future__ import annotations

import shutil
from pathlib import Path

import fine_tuning
import pytest
import tiny_models
import torch
from fine_tuning import QUICK, equal

STEPS = fine_tuning.STEPS


@pytest.fixture
def folder(host):
    """Where the node keeps runs that ended early; empty before and after."""
    folder = host.module("nodes.host.training").checkpoint_folder()
    shutil.rmtree(folder, ignore_errors=True)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.model.state_dict().items()}


def close(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5)


def cancel_after(monkeypatch, step):
    """Press Cancel when a step has been reported."""
    import comfy.model_management as management
    import comfy.utils

    plain = comfy.utils.ProgressBar.update_absolute

    def update(bar, value, total=None, preview=None):
        plain(bar, value, total, preview)
        if value == step:
            management.interrupt_current_processing()

    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", update)
    return management.InterruptProcessingException


def denoised(host, model, setting):
    """The denoised estimate of a MODEL at one noise level, through core nodes."""
    samples = host.run_node("VAEEncode", pixels=setting.images, vae=setting.vae)[0]
    (guider,) = host.run_node("BasicGuider", model=model, conditioning=setting.token)
    (noise,) = host.run_node("RandomNoise", noise_seed=1)
    (euler,) = host.run_node("KSamplerSelect", sampler_name="euler")
    result, _ = host.run_node(
        "SamplerCustomAdvanced",
        noise=noise,
        guider=guider,
        sampler=euler,
        sigmas=torch.tensor([0.9, 0.0]),
        latent_image=samples,
    )
    return result["samples"]


# --- what comes out --------------------------------------------------------------------------------------------------


def test_the_lora_is_an_ordinary_one_and_the_input_stays(host, setting, folder):
    """The node's MODEL is LoraLoaderModelOnly on what SaveLoRA wrote; the input is bit for bit as it was."""
    import folder_paths

    before, images = weights(setting.model), setting.images.clone()
    untouched = denoised(host, setting.model, setting)
    tuned, lora, losses, steps = setting.tune(host)
    assert equal(weights(setting.model), before) and torch.equal(setting.images, images)
    assert not setting.model.patches and "optimized_attention_override" not in str(setting.model.model_options)
    assert torch.equal(denoised(host, setting.model, setting), untouched)
    assert tuned.model is setting.model.model and steps == STEPS == len(losses["loss"])

    host.run_node("SaveLoRA", lora=lora, prefix="loras/tuned", steps=steps)
    (saved,) = (Path(folder_paths.get_output_directory()) / "loras").glob(f"tuned_{STEPS}_steps_*.safetensors")
    loras = Path(folder_paths.get_folder_paths("loras")[0])
    loras.mkdir(parents=True, exist_ok=True)
    shutil.move(saved, loras / "tuned.safetensors")
    (loaded,) = host.run_node(
        "LoraLoaderModelOnly", model=setting.model, lora_name="tuned.safetensors", strength_model=1.0
    )
    assert tuned.patches.keys() == loaded.patches.keys()
    assert len(tuned.patches) == sum(name.endswith("lora_up.weight") for name in lora), "every adapter is taken"
    ours = denoised(host, tuned, setting)
    assert torch.equal(ours, denoised(host, loaded, setting))
    assert float((ours - untouched).abs().max()) > 1e-5
    assert not any(folder.glob("*")), "a run that ended well leaves nothing behind"


def test_equal_seeds_give_equal_loras(host, svd):
    first, again, other = (svd.tune(host, seed=seed) for seed in (3, 3, 4))
    assert equal(first[1], again[1]) and first[2]["loss"] == again[2]["loss"]
    assert not equal(first[1], other[1])


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_alpha_says_what_is_learnt(host, setting, alpha):
    """Temporal layers of a UNet learn from the clip alone; each loss is there where it has a share."""
    is_temporal = host.module("pipelines.dreamix.temporal").is_temporal
    _, lora, losses, _ = setting.tune(host, alpha=alpha)
    assert set(losses) == {"loss"} | ({"video"} if alpha > 0 else set()) | ({"frames"} if alpha < 1 else set())
    video, frames = losses.get("video", [0.0] * STEPS), losses.get("frames", [0.0] * STEPS)
    assert losses["loss"] == pytest.approx([alpha * v + (1 - alpha) * f for v, f in zip(video, frames)])
    learnt = {name: bool(tensor.any()) for name, tensor in lora.items() if name.endswith("lora_up.weight")}
    temporal = [learnt[name] for name in learnt if is_temporal(name)]
    assert any(temporal) == (bool(temporal) and alpha > 0)
    assert any(learnt[name] for name in learnt if not is_temporal(name))


def test_a_set_of_pictures_has_no_order(host, setting):
    """With alpha 0 one picture is enough, and no number of them is wrong for a VAE that wants 4 n + 1."""
    for count in (1, 2):
        _, lora, losses, _ = setting.tune(host, alpha=0.0, images=setting.images[:count])
        assert set(losses) == {"loss", "frames"} and any(bool(t.any()) for n, t in lora.items() if "lora_up" in n)


def test_the_frames_are_clips_of_their_own(host, svd, monkeypatch):
    """On SVD's architecture a frame's estimate in the frames' loss does not depend on the other frames."""
    training, mixed = host.module("nodes.host.training"), host.module("nodes.host.mixed_training")
    temporal = host.module("pipelines.dreamix.temporal")
    settings, estimates = host.module("pipelines.dreamix.finetuning").FineTuning(), []

    def look(subject, *_):
        levels = torch.full((len(subject.frames),), 0.8)
        with temporal.masked(subject.network):
            estimates.append(subject.pictures(subject.frames, levels).detach())
        return host.module("pipelines.dreamix.finetuning").Tuned({}, None)

    monkeypatch.setattr(mixed, "fine_tune", look)
    latents = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(6))
    with training.training_mode():
        copy = training.training_copy(svd.model, "float32")
        for frames in (latents, latents[1:2]):
            mixed._in_seat(copy, mixed.Material(None, frames, svd.token), settings, print)
    torch.testing.assert_close(estimates[0][1:2], estimates[1], rtol=1e-4, atol=1e-5)


def test_without_steps_the_model_is_handed_on(host, svd):
    tuned, lora, _, steps = svd.tune(host, steps=0, images=svd.images[:1])
    assert tuned is svd.model and lora == {} and steps == 0
    (loaded,) = host.run_node("LoraModelLoader", model=svd.model, lora=lora, strength_model=1.0)
    assert not loaded.patches


def test_the_losses_can_be_drawn_by_the_host(host, svd, folder):
    """Its Loss Graph takes the map; where it could draw none, it is left out and all else runs."""
    from comfy_execution.graph_utils import ExecutionBlocker

    for steps in (2, 1, 0):
        losses = svd.tune(host, steps=steps)[2]
        if steps > 1:
            _, ui = host.run_node_ui("LossGraphNode", loss=losses, filename_prefix="loss")
            assert ui["images"]
        else:
            assert isinstance(losses, ExecutionBlocker) and losses.message is None
            (output,) = host.run_node("LossGraphNode", loss=losses, filename_prefix="loss") or (losses,)
            assert isinstance(output, ExecutionBlocker)


def test_the_loss_falls(host, svd, tmp_path):
    """On held noise: the LoRA's denoised estimate is nearer to the clip than the plain model's."""
    loud = tiny_models.text_checkpoint(host, seed=2)
    for name in ("weight", "bias"):  # the random network's last layer is scaled down, so that it could hardly learn
        loud[f"model.diffusion_model.out.2.{name}"] *= 10
    file = tiny_models.save_weights(loud, tmp_path / "loud.safetensors")
    config = host.module("demo.models").ImageToVideoConfig()
    model = host.module("nodes.host.models").load_demo_unet(file, config, by_text=True)
    (clean,) = host.run_node("VAEEncode", pixels=svd.images, vae=svd.vae)
    tuned, _, losses, _ = svd.tune(host, model=model, steps=12, alpha=1.0, learning_rate=0.05)

    def error(model):
        return float((denoised(host, model, svd) - clean["samples"]).square().mean())

    assert error(tuned) < 0.85 * error(model)
    assert sum(losses["loss"][-4:]) < 0.75 * sum(losses["loss"][:4])


# --- how it is trained -----------------------------------------------------------------------------------------------


def test_recomputed_blocks_train_alike(host, setting):
    kept, again = (setting.tune(host, gradient_checkpointing=on) for on in (False, True))
    close(kept[1], again[1])
    assert kept[2]["loss"] == pytest.approx(again[2]["loss"], rel=1e-4)


def test_half_precision_trains_near_to_it(host, svd):
    exact, half = (svd.tune(host, mixed_precision=kind)[2]["loss"] for kind in ("float32", "bfloat16"))
    assert half != exact and half == pytest.approx(exact, rel=0.1)


def test_guidance_and_fast_kernels_of_the_model_do_not_reach_the_training(host, svd):
    """A guidance function would mix in zeros; attention without a way back would train nothing."""
    (guided,) = host.run_node("VideoLinearCFGGuidance", model=svd.model, min_cfg=3.0)
    guided.model_options["transformer_options"]["optimized_attention_override"] = lambda f, q, k, v, *a, **b: 0 * q
    assert equal(svd.tune(host, model=guided)[1], svd.tune(host)[1])
    assert "sampler_cfg_function" in guided.model_options


def test_a_model_that_was_tuned_is_trained_as_it_is(host, svd):
    """Patches of the input, such as another LoRA, count."""
    tuned, first, _, _ = svd.tune(host, learning_rate=0.05)
    both, second, losses, _ = svd.tune(host, model=tuned, seed=1)
    assert losses["loss"] != svd.tune(host, seed=1)[2]["loss"]
    key = next(iter(tuned.patches))
    assert len(both.patches[key]) == 2 and not equal(first, second)


def test_cancel_leaves_a_file_from_which_the_next_run_goes_on(host, setting, folder, monkeypatch):
    whole = setting.tune(host, steps=4)
    with monkeypatch.context() as patch, pytest.raises(cancel_after(patch, 2)):
        setting.tune(host, steps=4)
    (file,) = folder.glob("*.safetensors")
    shown = []
    with monkeypatch.context() as patch:
        import comfy.utils

        patch.setattr(comfy.utils.ProgressBar, "update_absolute", lambda bar, value, *_: shown.append(value))
        resumed = setting.tune(host, steps=4)
    assert shown == [3, 4], "the steps that were done are not done again"
    assert equal(resumed[1], whole[1]) and resumed[2]["loss"] == whole[2]["loss"] and resumed[3] == 4
    assert not file.exists()


def test_a_run_writes_its_file_now_and_then(host, svd, folder, monkeypatch):
    training = host.module("pipelines.training")
    written = []
    monkeypatch.setattr(training, "write_checkpoint", lambda path, run: written.append((path.parent, run.step)))
    svd.tune(host, steps=5, checkpoint_every=2)
    assert written == [(folder, 2), (folder, 4)]


def test_the_host_is_told_that_it_trains_and_that_it_is_over(host, svd):
    import comfy.model_management as management

    seen = []

    def look(apply_model, args):
        seen.append((management.in_training, torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        return apply_model(args["input"], args["timestep"], **args["c"])

    model = svd.model.clone()
    model.set_model_unet_function_wrapper(look)
    svd.tune(host, model=model, steps=1)
    assert set(seen) == {(True, False, True)} and management.in_training is False
    with pytest.raises(RuntimeError, match="stop"):
        model.set_model_unet_function_wrapper(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
        svd.tune(host, model=model, steps=1)
    assert management.in_training is False


# --- through the server ----------------------------------------------------------------------------------------------


def graph(steps):
    """The node between the embedded model and the host's own nodes."""
    tune = {"model": ["1", 0], "vae": ["1", 2], "images": ["3", 0], "token": ["2", 0], **QUICK}
    tune |= {"steps": steps, "alpha": 0.5, "seed": 0}
    return {
        "1": {"class_type": "RewindDemoTextToVideo", "inputs": {}},
        "2": {
            "class_type": "RewindDreamixPrompt",
            "inputs": {"clip": ["1", 1], "token": "sks", "prompt": "", "place": "before the prompt"},
        },
        "3": {"class_type": "EmptyImage", "inputs": {"width": 32, "height": 32, "batch_size": 2, "color": 255}},
        "4": {"class_type": fine_tuning.NODE, "inputs": tune},
        "5": {"class_type": "SaveLoRA", "inputs": {"lora": ["4", 1], "prefix": "loras/x", "steps": ["4", 3]}},
        "6": {"class_type": "LossGraphNode", "inputs": {"loss": ["4", 2], "filename_prefix": "loss"}},
    }


def test_the_server_cancels_goes_on_and_shows_the_losses(host, server, trained):
    fine_tuning.skip_old(host)
    steps, since = 24, len(server.messages)
    prompt = server.submit(graph(steps))

    def progress(kind, data):
        return kind == "progress" and data["prompt_id"] == prompt and data["node"] == "4" and data["value"] >= 11

    server.wait_message(progress, since=since, timeout=120)
    server.interrupt()
    assert server.wait(prompt)["status"]["status_str"] == "error"
    folder = server.base / "user" / "rewind"
    assert len(list(folder.glob("dreamix-*.safetensors"))) == 1
    assert server.previews(since), "a picture of the losses"

    since = len(server.messages)
    entry = server.prompt(graph(steps), timeout=120)
    done = [data["value"] for kind, data in server.messages[since:] if kind == "progress" and data["node"] == "4"]
    assert min(done) > 11 and max(done) == steps
    assert len(list(server.base.glob(f"output/loras/x_{steps}_steps_*.safetensors"))) == 1
    assert entry["outputs"]["4"]["images"] and entry["outputs"]["6"]["images"]
    assert not list(folder.glob("*"))


def test_the_server_runs_the_rest_where_nothing_is_to_be_trained(host, server, trained):
    entry = server.prompt(graph(0))
    assert "6" not in entry["outputs"] and entry["status"]["completed"]
