"""The embedded text-to-image model is Stable Diffusion 1.5 made small, and its pictures can be read."""

from __future__ import annotations

import pytest
import torch

from rewind.demo import captions, text_to_image
from rewind.demo import world as W
from rewind.demo.recognition import recognise
from rewind.pipelines.denoiser import DiscreteTimes


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return text_to_image.build_image_unet().eval()


def test_its_configuration_is_stable_diffusions_but_for_the_sizes(unet):
    """SD 1.5's own, as far as it has to do with the architecture; what is not named there is diffusers' default."""
    config = unet.config
    assert config.down_block_types == ("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",)
    assert config.up_block_types == ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2
    assert config.mid_block_type == "UNetMidBlock2DCrossAttn" and not config.use_linear_projection
    assert (config.act_fn, config.norm_eps, config.norm_num_groups) == ("silu", 1e-5, 32)
    assert (config.flip_sin_to_cos, config.freq_shift, config.center_input_sample) == (True, 0, False)
    assert not any(config[name] for name in ("class_embed_type", "addition_embed_type", "time_cond_proj_dim"))
    projections = [module for name, module in unet.named_modules() if name.endswith(("proj_in", "proj_out"))]
    assert projections and all(isinstance(module, torch.nn.Conv2d) for module in projections)
    heads = {module.heads for name, module in unet.named_modules() if name.endswith((".attn1", ".attn2"))}
    assert heads == {text_to_image.TextToImageConfig().heads}, "of one number at every width"


def test_it_fits_in_14_megabytes_and_every_normalised_width_in_32_groups(unet):
    assert 2 * sum(parameter.numel() for parameter in unet.parameters()) < 14e6
    norms = [module for module in unet.modules() if isinstance(module, torch.nn.GroupNorm)]
    assert all(norm.num_groups == 32 and norm.num_channels >= 64 for norm in norms)


@torch.no_grad()
def test_its_grids_are_12_6_and_an_odd_3(unet):
    seen = []
    hooks = [
        block.register_forward_hook(lambda *call: seen.append(call[2][0].shape[-1])) for block in unet.mid_block.resnets
    ]
    for block in unet.down_blocks:
        hooks.append(block.resnets[0].register_forward_hook(lambda *call: seen.append(call[2].shape[-1])))
    output = unet(torch.zeros(2, 4, 12, 12), 500, torch.zeros(2, 32, 64), return_dict=False)[0]
    for hook in hooks:
        hook.remove()
    assert sorted(set(seen)) == [3, 6, 12] and output.shape == (2, 4, 12, 12)


def test_its_noise_schedule_is_stable_diffusions():
    from diffusers import DDIMScheduler

    told = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)
    alphas = text_to_image.alphas_cumprod()
    torch.testing.assert_close(alphas.float(), told.alphas_cumprod, rtol=0, atol=1e-6)
    assert DiscreteTimes(alphas).sigma_range == (pytest.approx(0.0292, abs=1e-4), pytest.approx(14.61, abs=0.01))


@pytest.mark.parametrize(
    ("caption", "left"),
    [
        ("a red circle moves right quickly on a blue background", "a red circle on a blue background"),
        ("a shape moves up, at night", "a shape, at night"),
        ("a sks green square moves down slowly, striped", "a sks green square, striped"),
        ("a upper shape on a grey background", "a upper shape on a grey background"),
        ("", ""),
    ],
)
def test_a_picture_shows_no_motion(caption, left):
    assert text_to_image.without_motion(caption) == left


def test_a_single_frame_is_read_as_a_clip_is():
    """All that a picture can show: the gates read pictures."""
    count, generator = 40, torch.Generator().manual_seed(21)
    words = captions.draw_words(count, generator, styled=0.4)
    clips = W.render(captions.scenes(words, generator))[0]
    right = dict.fromkeys(("colour", "shape", "hue", "night", "present"), 0)
    for i, clip in enumerate(clips):
        seen = recognise(clip[i % 8][None])
        right["colour"] += int(seen.colour == words.colour[i])
        right["shape"] += int(seen.shape == words.shape[i])
        right["hue"] += int(seen.hue == words.hue[i])
        right["night"] += int(seen.night == (words.style[i] == 1))
        right["present"] += seen.present
        assert seen.direction == -1, "a picture has no motion"
    assert right["colour"] == right["night"] == right["present"] == count
    assert min(right.values()) >= 0.95 * count, right
    assert not recognise(torch.full((1, 3, 96, 96), 0.2)).present


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.safetensors: reinstall Rewind"):
        text_to_image.load_image_components(tmp_path / "none.safetensors")
