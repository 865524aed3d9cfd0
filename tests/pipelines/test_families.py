"""The model families: each denoises by its own formula, and turns pixels to latents and back as its VAE does."""

from __future__ import annotations

import math

import pytest
import tiny_text_video as tiny
import torch

from rewind.demo.text import build_text_encoder, load_tokenizer
from rewind.pipelines.denoiser import EPS, V
from rewind.pipelines.dreamix.families import ModelScope, TextSVD, Wan, load_family


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", params=tiny.NAMES)
def family(request):
    return tiny.family(request.param)


class Knows:
    """In place of a network: it answers with its training target for a known clip, and notes what it was asked."""

    def __init__(self, target, config=None):
        self.target, self.config, self.dtype, self.asked = target, config, torch.float32, []

    def __call__(self, x, time, context, *more, return_dict=False):
        self.asked.append((x, time, context, *more))
        return (self.target(x),)


# --- the formulas -----------------------------------------------------------------------------------------------------


def test_text_svd_denoises_exactly_where_the_network_knows_its_target():
    clean, noise, sigma = torch.randn(3, 4, 4, 6, generator=generator()), torch.randn(3, 4, 4, 6), 2.5
    c_skip, c_out = 1 / (sigma**2 + 1), -sigma / math.sqrt(sigma**2 + 1)
    x = clean + sigma * noise
    network = Knows(lambda _: ((clean - c_skip * x) / c_out)[None])
    got = TextSVD(network, None, None, None).denoise(x, torch.full((3,), sigma), torch.zeros(1, 7, 5))
    assert torch.allclose(got, clean, atol=1e-5)
    ((given, time, context, added),) = network.asked
    assert given.shape == (1, 3, 8, 4, 6) and not given[:, :, 4:].any(), "the first frame's latents are zeros"
    assert torch.allclose(given[0, :, :4], x / math.sqrt(sigma**2 + 1))
    assert time.tolist() == pytest.approx([0.25 * math.log(sigma)])
    assert context.shape == (1, 7, 5) and added.tolist() == [[5.0, 127.0, 0.0]]


@pytest.mark.parametrize("predicts_v", [False, True])
def test_modelscope_denoises_exactly_where_the_network_knows_its_target(predicts_v):
    alphas = torch.linspace(0.999, 0.01, 1000, dtype=torch.float64)
    index = 400
    alpha = float(alphas[index])
    sigma = math.sqrt((1 - alpha) / alpha)
    clean, noise = torch.randn(1, 4, 3, 4, 6, generator=generator()), torch.randn(1, 4, 3, 4, 6)
    target = math.sqrt(alpha) * noise - math.sqrt(1 - alpha) * clean if predicts_v else noise
    network = Knows(lambda _: target)
    family = ModelScope(network, None, None, None, alphas, predicts_v)
    got = family.denoise(clean + sigma * noise, torch.tensor([sigma]), torch.zeros(1, 7, 5))
    assert torch.allclose(got, clean, atol=1e-4) and family.path is (V if predicts_v else EPS)
    ((given, time, _),) = network.asked
    assert torch.allclose(given, math.sqrt(alpha) * clean + math.sqrt(1 - alpha) * noise, atol=1e-5)
    assert time.tolist() == pytest.approx([index], abs=1e-2)


def test_modelscopes_times_lie_on_its_table_and_between():
    family = tiny.family("ModelScope")
    levels = family.times.log_sigmas
    assert torch.allclose(family.times.time(levels.exp()), torch.arange(1000.0), atol=1e-2)
    middle = (0.5 * (levels[10] + levels[11])).exp()
    assert family.times.time(middle[None]).item() == pytest.approx(10.5, abs=1e-2)
    ends = family.times.time(torch.tensor([1e-6, 1e6]))
    assert ends.tolist() == pytest.approx([0, 999], abs=1e-3)


def test_wan_denoises_exactly_where_the_network_knows_its_target():
    clean, noise, sigma = torch.randn(2, 16, 1, 4, 6, generator=generator()), torch.randn(2, 16, 1, 4, 6), 0.7
    network = Knows(lambda _: noise - clean)
    x = (1 - sigma) * clean + sigma * noise
    got = Wan(network, None, None, None).denoise(x, torch.full((2,), sigma), torch.zeros(1, 7, 5), as_pictures=True)
    assert torch.allclose(got, clean, atol=1e-5)
    ((_, time, context),) = network.asked
    assert time.tolist() == pytest.approx([700.0, 700.0]) and context.shape == (2, 7, 5)


def test_wans_schedule_is_shifted_towards_noise():
    family = Wan(None, None, None, None, shift=5.0)
    levels = family.schedule(4)
    assert levels.tolist() == pytest.approx([1, 5 * 0.75 / 4, 5 * 0.5 / 3, 5 * 0.25 / 2, 0])


# --- the modules ------------------------------------------------------------------------------------------------------


def test_clips_and_pictures_have_the_shapes_that_the_network_takes(family):
    clip, pictures = family.encode_clip(tiny.video()), family.encode_pictures(tiny.video())
    assert len(pictures) == tiny.FRAMES
    context = family.embed(["a red circle"])
    for latents, as_pictures in ((clip, False), (pictures, True)):
        sigma = torch.full((len(latents),), family.sigma_range[1] / 2)
        with torch.no_grad():
            assert family.denoise(latents, sigma, context, as_pictures).shape == latents.shape
    assert family.decode(clip).shape == tiny.video().shape


def test_every_picture_is_denoised_as_if_it_were_alone(family):
    pictures, context = family.encode_pictures(tiny.video()), family.embed(["a red circle"])
    sigmas = torch.linspace(0.2, 0.8, len(pictures))
    with torch.no_grad():
        together = family.denoise(pictures, sigmas, context, as_pictures=True)
        for i in range(len(pictures)):
            alone = family.denoise(pictures[i : i + 1], sigmas[i : i + 1], context, as_pictures=True)
            assert torch.allclose(together[i], alone[0], atol=1e-4)


def test_a_frames_neighbours_matter_in_a_clip(family):
    """The other side of the test above: the clip's own way has temporal layers."""
    clip, context = family.encode_clip(tiny.video()), family.embed(["a red circle"])
    sigma = torch.full((len(clip),), 0.5)
    time = 0 if clip.ndim == 4 else 2
    other = clip.clone()
    other.select(time, clip.shape[time] - 1).add_(1.0)
    with torch.no_grad():
        a, b = (family.denoise(x, sigma, context).select(time, 0) for x in (clip, other))
    assert not torch.allclose(a, b, atol=1e-4)


def test_a_prompt_matters(family):
    clip = family.encode_clip(tiny.video())
    sigma = torch.full((len(clip),), 0.5)
    with torch.no_grad():
        a, b = (family.denoise(clip, sigma, family.embed([text])) for text in ("a red circle", "a blue square"))
    assert not torch.allclose(a, b, atol=1e-5)


def test_wans_padding_is_zeros():
    context = tiny.family("Wan").embed(["a red circle", "a"])
    assert not context[0, 3:].any() and not context[1, 1:].any() and context[0, :3].any(dim=-1).all()


# --- from a folder ----------------------------------------------------------------------------------------------------


def save(folder, kind: str):
    """A tiny model of a kind in diffusers' layout, and the pipeline it was saved from."""
    import diffusers
    from transformers import UMT5Config, UMT5EncoderModel

    if kind == "WanPipeline":
        family = tiny.family("Wan")
        text = UMT5EncoderModel(
            UMT5Config(vocab_size=700, d_model=tiny.TEXT, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        )
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
        pipe = diffusers.WanPipeline(load_tokenizer(), text, family.vae, scheduler, family.network)
    else:
        family = tiny.family("ModelScope")
        scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction")
        pipe = diffusers.TextToVideoSDPipeline(
            family.vae, build_text_encoder(), load_tokenizer(), family.network, scheduler
        )
    pipe.save_pretrained(folder)
    return pipe


def test_a_wan_folder_is_loaded_with_its_shift(tmp_path):
    pipe = save(tmp_path, "WanPipeline")
    loaded = load_family(tmp_path)
    assert isinstance(loaded, Wan) and loaded.shift == 5.0
    weights = loaded.network.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in pipe.transformer.state_dict().items())
    assert not any(p.requires_grad for p in loaded.network.parameters())


def test_a_modelscope_folder_is_loaded_with_its_schedule_and_target(tmp_path):
    pipe = save(tmp_path, "TextToVideoSDPipeline")
    loaded = load_family(tmp_path)
    assert isinstance(loaded, ModelScope) and loaded.path is V
    alphas = pipe.scheduler.alphas_cumprod.double()
    assert torch.allclose(loaded.times.log_sigmas.exp(), ((1 - alphas) / alphas).sqrt())


def test_another_kind_is_refused_before_weights_are_read(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ValueError, match="holds a FluxPipeline; Dreamix takes text-to-video models"):
        load_family(tmp_path)
