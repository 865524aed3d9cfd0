"""What Dreamix Mixed Fine-Tune refuses, and that it does so before anything is trained."""

from __future__ import annotations

import fine_tuning
import pytest
import tiny_models
import torch
from fine_tuning import equal


@pytest.fixture
def never(host, monkeypatch):
    """Fails where anything is trained after all."""

    def fine_tune(*_, **__):
        raise AssertionError("it was trained all the same")

    monkeypatch.setattr(host.module("nodes.host.mixed_training"), "fine_tune", fine_tune)


WIDE = [[torch.ones(1, 4, 768), {}]]
BAD = {
    "one frame": ("svd", lambda s: {"images": s.images[:1]}, "got 1 image, and alpha is 0.5"),
    "no frames": ("svd", lambda s: {"images": s.images[:0]}, "at least one RGB image"),
    "grey": ("svd", lambda s: {"images": s.images[..., :1]}, "at least one RGB image"),
    "NaN": ("svd", lambda s: {"images": s.images * float("nan")}, "images holds NaN"),
    "NaN in the token": ("svd", lambda s: {"token": [[s.token[0][0] * float("nan"), {}]]}, "token holds NaN"),
    "no token": ("svd", lambda s: {"token": []}, "token is empty"),
    "a token of another width": ("svd", lambda s: {"token": WIDE}, "width 768, this MODEL takes 64"),
    "a token of another width for Wan": ("wan", lambda s: {"token": WIDE}, "width 768, this MODEL takes 64"),
    "a first frame in the token": (
        "svd",
        lambda s: {"token": [[s.token[0][0], {"concat_latent_image": torch.zeros(1, 4, 4, 4)}]]},
        "token holds a first frame",
    ),
    "a length that Wan's VAE cuts": ("wan", lambda s: {"images": s.images[:4]}, "4 frames; this VAE takes 1 or 5"),
    "learning rate": ("svd", lambda s: {"learning_rate": 0.0}, "learning rate is 0"),
    "alpha": ("svd", lambda s: {"alpha": 1.5}, "alpha is 1.5"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_inputs_are_refused_before_anything_is_trained(host, request, never, case):
    family, change, message = BAD[case]
    setting = request.getfixturevalue(family)
    with pytest.raises(ValueError, match=message):
        setting.tune(host, **change(setting))


def test_models_that_cannot_be_tuned_are_refused(host, svd, wan, never):
    for model, message in (
        (tiny_models.sd15(host), "no temporal layers, or none that are known"),
        (tiny_models.hunyuan(host), "none that are known"),
        (tiny_models.svd(host), "cannot be copied"),
    ):
        with pytest.raises(ValueError, match=message):
            svd.tune(host, model=model)
    (distilled,) = host.run_node("ModelSamplingDiscrete", model=svd.model, sampling="lcm", zsnr=False)
    with pytest.raises(ValueError, match="samples as LCM"):
        svd.tune(host, model=distilled)
    by_picture = wan.model.clone()
    format_ = type(wan.model.model.latent_format)()
    format_.latent_channels = 8
    by_picture.add_object_patch("latent_format", format_)
    with pytest.raises(ValueError, match="told by a picture"):
        wan.tune(host, model=by_picture)


def test_the_vae_of_another_model_is_refused(host, svd, wan, never):
    with pytest.raises(ValueError, match="VAE that belongs to the MODEL"):
        svd.tune(host, vae=wan.vae, images=wan.images)
    with pytest.raises(ValueError, match="VAE that belongs to the MODEL"):
        wan.tune(host, vae=svd.vae)


def test_a_model_that_animates_a_picture_wants_one(host, svd, never, tmp_path):
    file = tiny_models.save_weights(tiny_models.checkpoint(host), tmp_path / "svd.safetensors")
    config = host.module("demo.models").ImageToVideoConfig()
    model = host.module("nodes.host.models").load_demo_unet(file, config)
    with pytest.raises(ValueError, match="token holds no first frame"):
        svd.tune(host, model=model)


@pytest.mark.parametrize("checkpointing, help_", [(False, ", or gradient_checkpointing"), (True, "smaller frames ")])
def test_what_does_not_fit_is_refused(host, setting, monkeypatch, checkpointing, help_):
    import comfy.model_management as management

    reported, folder = [], host.module("nodes.host.training").checkpoint_folder()
    values = {"steps": 1, "gradient_checkpointing": checkpointing}
    with monkeypatch.context() as patch:
        patch.setattr(management, "get_free_memory", lambda *_: 2**16)
        patch.setattr(host.module("nodes.finetuning").DreamixFineTune, "_progress", lambda steps: reported.append)
        with pytest.raises(ValueError, match=r"needs about \d+\.\d GiB") as error:
            setting.tune(host, memory_check=True, **values)
        assert help_ in str(error.value) and reported == [] and not any(folder.glob("*"))
        assert setting.tune(host, memory_check=False, **values)[3] == 1
    checked, plain = (setting.tune(host, memory_check=on, **values) for on in (True, False))
    assert equal(checked[1], plain[1]), "the check leaves no trace"


def test_the_estimate_grows_with_the_clip(host, svd):
    """What is counted on a corner is, carried over, what the whole clip keeps."""
    training, mixed = host.module("nodes.host.training"), host.module("nodes.host.mixed_training")
    settings = host.module("pipelines.dreamix.finetuning").FineTuning(steps=1, alpha=1.0, rank=2)
    latents = torch.randn(6, 4, 24, 24, generator=torch.Generator().manual_seed(7))
    material = mixed.Material(latents, None, svd.token)
    with training.training_mode():
        copy = training.training_copy(svd.model, "float32")
        carried_over = mixed._kept(copy, material, settings)
        with training.Kept(copy.model.diffusion_model) as whole:
            mixed._in_seat(copy, material, settings, lambda step: None)
    assert carried_over == pytest.approx(whole.bytes, rel=0.2)


def test_hosts_that_cannot_copy_a_model_say_so(host, never):
    if host.release >= (0, 33):
        pytest.skip("this host can copy a model")
    setting = fine_tuning.Setting(tiny_models.svd(host), None, tiny_models.conditioning("svd"), 3)
    with pytest.raises(ValueError, match=rf"0\.33 does.*this is {host.version}: update ComfyUI"):
        setting.tune(host)
    assert setting.tune(host, steps=0)[0] is setting.model
