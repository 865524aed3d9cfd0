"""What EI²'s nodes refuse, before anything is sampled or trained."""

from __future__ import annotations

import re
from dataclasses import replace

import fine_tuning
import one_shot
import pytest
import tiny_models
import torch
from one_shot import denoised, noisy, patch, prompt, random_weights


@pytest.fixture(scope="module")
def sd15(host):
    return one_shot.sd15()


@pytest.fixture(scope="module")
def weights(host, sd15):
    return random_weights(host, sd15, axes="frames + space", factor=3)


@pytest.fixture(scope="module")
def setting(host, tmp_path_factory):
    return one_shot.demo(host, tmp_path_factory.mktemp("weights"))


# --- models and weights that do not fit ------------------------------------------------------------------------------


def as_flow(model):
    """A MODEL of ours that samples as a flow."""
    import comfy.model_sampling

    class Flow(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.CONST):
        pass

    model = model.clone()
    model.add_object_patch("model_sampling", Flow(model.model.model_config))
    return model


OTHERS = {
    "svd": tiny_models.svd,
    "wan": tiny_models.wan,
    "ltxv": tiny_models.ltxv,
    "hunyuan": tiny_models.hunyuan,
    "a flow": lambda host: as_flow(one_shot.sd15()),
}


@pytest.fixture
def never(host, monkeypatch):
    """Fails where anything is trained or sampled after all."""
    import comfy.samplers

    def run(*_, **__):
        raise AssertionError("it was run all the same")

    monkeypatch.setattr(host.module("nodes.host.one_shot"), "one_shot_tune", run)
    monkeypatch.setattr(comfy.samplers.CFGGuider, "sample", run)


@pytest.mark.parametrize("other", OTHERS)
def test_other_models_are_told_what_is_taken(host, setting, sd15, weights, never, other):
    model, x = OTHERS[other](host), {"samples": noisy()}
    with pytest.raises(ValueError, match=r"Stable Diffusion 1\.x, 2\.x and SDXL"):
        patch(host, model)
    with pytest.raises(ValueError, match=r"Stable Diffusion 1\.x, 2\.x and SDXL"):
        setting.tune(host, model=model)
    with pytest.raises(ValueError, match=r"Stable Diffusion 1\.x, 2\.x and SDXL"):
        host.run_node(one_shot.PROBE, model=model, weights=weights, samples=x, conditioning=prompt(sd15))


def test_a_distilled_model_is_refused(host, setting, never):
    (model,) = host.run_node("ModelSamplingDiscrete", model=setting.model, sampling="lcm", zsnr=False)
    for run in (lambda: patch(host, model), lambda: setting.tune(host, model=model)):
        with pytest.raises(ValueError, match="samples as LCM"):
            run()


def test_weights_of_another_architecture_are_refused(host, setting, sd15, weights, never):
    message = "another architecture: they are for 7 blocks of widths 32 to 64, context 32, the model has 7 blocks"
    with pytest.raises(ValueError, match=message):
        patch(host, setting.model, weights=weights)
    with pytest.raises(ValueError, match="another architecture"):
        patch(host, setting.model, weights=weights, strength=0.0)
    samples = {"samples": noisy()}
    with pytest.raises(ValueError, match="another architecture"):
        host.run_node(
            one_shot.PROBE, model=setting.model, weights=weights, samples=samples, conditioning=setting.caption
        )


@pytest.mark.parametrize("part", ["attn1.to_q.diff", "attn2.to_q.diff", "temporal.to_k.weight"])
@pytest.mark.parametrize("tensor", [None, torch.zeros(3, 3)], ids=["missing", "shape"])
def test_damaged_weights_are_refused(host, sd15, weights, never, part, tensor):
    """By name, whatever the strength, and nothing is left on the MODEL."""
    name = [name for name in weights.tensors if name.endswith(part)][2]
    tensors = {key: t for key, t in (weights.tensors | {name: tensor}).items() if t is not None}
    damaged, before = replace(weights, tensors=tensors), one_shot.state(sd15)
    told = f"damaged at {re.escape(name)}: " + ("it is missing" if tensor is None else r"it has shape \(3, 3\)")
    for values in ({}, {"strength": 0.0}, {"blocks": "input"}):
        with pytest.raises(ValueError, match=told):
            patch(host, sd15, weights=damaged, **values)
    with pytest.raises(ValueError, match=told):
        values = {"samples": {"samples": noisy()}, "conditioning": prompt(sd15)}
        host.run_node(one_shot.PROBE, model=sd15, weights=damaged, **values)
    assert not sd15.patches and all(torch.equal(t, before[key]) for key, t in one_shot.state(sd15).items())


@pytest.mark.parametrize("family", one_shot.FAMILIES)
def test_the_tensors_of_a_tuning_fit_the_hosts_networks(host, family):
    model = one_shot.FAMILIES[family]()
    for temporal in ("STAM", "Tune-A-Video", "none"):
        whole = random_weights(host, model, temporal=temporal)
        whole.check(model.model.diffusion_model)
        with pytest.raises(ValueError, match="damaged at x.diff: neither the model nor its temporal modules"):
            replace(whole, tensors=whole.tensors | {"x.diff": torch.zeros(1)}).check(model.model.diffusion_model)


@pytest.mark.parametrize("index", [None, 0])
def test_self_attention_that_another_pack_has_is_left_to_it(host, sd15, weights, index):
    """Neither wins in silence: the block and the other are named, and what can be done instead works."""
    seen, x = [], noisy()

    def other(q, k, v, extra):
        seen.append(extra["block"])
        return v

    taken = sd15.clone()
    taken.set_model_attn1_replace(other, "input", 3, index)
    message = rf"self-attention of input_blocks\.3\.1\.transformer_blocks\.0 is replaced already \(by {__name__}\)"
    for values in ({}, {"weights": weights}, {"blocks": "input"}):
        with pytest.raises(ValueError, match=message):
            patch(host, taken, **values)
    for values in ({"blocks": "middle"}, {"attention": "own frame", "weights": weights}, {"strength": 0.0}):
        seen.clear()
        denoised(host, patch(host, taken, **values), x)
        assert seen == [("input", 3)]


# --- what cannot be tuned on -----------------------------------------------------------------------------------------

WIDE = [[torch.ones(1, 4, 768), {}]]
BAD = {
    "one frame": (lambda s: {"images": s.images[:1]}, "got 1 frame; a clip has at least 2"),
    "no frames": (lambda s: {"images": s.images[:0]}, "the frames of a clip"),
    "grey": (lambda s: {"images": s.images[..., :1]}, "the frames of a clip"),
    "NaN": (lambda s: {"images": s.images * float("nan")}, "images holds NaN"),
    "NaN in the caption": (lambda s: {"caption": [[s.caption[0][0] * float("nan"), {}]]}, "caption holds NaN"),
    "no caption": (lambda s: {"caption": []}, "caption is empty: connect CLIP Text Encode"),
    "another CLIP": (lambda s: {"caption": WIDE}, "width 768, this MODEL takes 64: connect the CLIP"),
    "another VAE": (lambda s: {"vae": tiny_models.wan_vae()}, "connect the VAE that belongs to the MODEL"),
    "learning rate": (lambda s: {"learning_rate": 0.0}, "learning rate is 0"),
    "factor": (lambda s: {"coarse_factor": 0}, "coarse factor is 0"),
    "attention": (lambda s: {"attention": "dense"}, "one of FFAM, sparse-causal"),
    "no copy": (lambda s: {"model": bare(s.model)}, "cannot be copied"),
}


def bare(model):
    model = model.clone()
    model.cached_patcher_init = None
    return model


@pytest.mark.parametrize("case", BAD)
def test_bad_inputs_are_refused_before_anything_is_trained(host, setting, never, case):
    fine_tuning.skip_old(host)
    change, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        setting.tune(host, **change(setting))


def test_a_taken_block_is_refused_before_anything_is_trained(host, setting, never):
    fine_tuning.skip_old(host)
    taken = setting.model.clone()
    taken.set_model_attn1_replace(lambda q, k, v, extra: v, "middle", 0)
    with pytest.raises(ValueError, match=r"self-attention of middle_block\.1\.transformer_blocks\.0 is replaced"):
        setting.tune(host, model=taken)


@pytest.mark.parametrize("checkpointing, help_", [(False, ", or gradient_checkpointing"), (True, "smaller frames ")])
def test_what_does_not_fit_is_refused(host, setting, monkeypatch, checkpointing, help_):
    import comfy.model_management as management

    fine_tuning.skip_old(host)
    reported, folder = [], host.module("nodes.host.training").checkpoint_folder()
    with monkeypatch.context() as patch_:
        patch_.setattr(management, "get_free_memory", lambda *_: 2**16)
        patch_.setattr(host.module("nodes.ei2").EI2OneShotTune, "_progress", lambda steps: reported.append)
        with pytest.raises(ValueError, match=r"needs about \d+\.\d GiB") as error:
            setting.tune(host, memory_check=True, gradient_checkpointing=checkpointing)
        assert help_ in str(error.value) and reported == [] and not any(folder.glob("*"))
        assert setting.tune(host, memory_check=False, steps=1)[1].about["steps"] == 1


def test_hosts_that_cannot_copy_a_model_say_so(host, setting, never):
    if host.release >= (0, 33):
        pytest.skip("this host can copy a model")
    with pytest.raises(ValueError, match=rf"EI² One-Shot Tune.*0\.33 does.*this is {host.version}: update ComfyUI"):
        setting.tune(host)


CLIPS = {
    "one frame": (noisy(1), "got 1 frame; a clip has at least 2"),
    "other channels": (torch.ones(1, 16, 3, 8, 8), "this model takes 4 channels in 4 axes"),
    "nothing": (torch.zeros(3, 4, 8, 8), "is empty"),
    "NaN": (noisy() * float("nan"), "holds NaN"),
}


@pytest.mark.parametrize("case", CLIPS)
def test_what_is_no_clip_is_not_measured(host, sd15, weights, never, case):
    samples, message = CLIPS[case]
    with pytest.raises(ValueError, match=message):
        host.run_node(
            one_shot.PROBE, model=sd15, weights=weights, samples={"samples": samples}, conditioning=prompt(sd15)
        )
    with pytest.raises(ValueError, match="conditioning holds an embedding of width 768"):
        host.run_node(one_shot.PROBE, model=sd15, weights=weights, samples={"samples": noisy()}, conditioning=WIDE)
