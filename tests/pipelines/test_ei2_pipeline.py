"""EI² headless on a tiny random Stable Diffusion: tune, rewind, edit, measure; and from a folder."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import tiny_text_image as tiny
import torch
from torch import Tensor

from rewind.pipelines.denoiser import EPS, V
from rewind.pipelines.ei2.covariate_shift import by_block, overall
from rewind.pipelines.ei2.family import TextToImage, load_family
from rewind.pipelines.ei2.inflation import InflationSettings
from rewind.pipelines.ei2.pipeline import EI2Pipeline, EI2Settings
from rewind.pipelines.ei2.tuning import OneShot, query_layers
from rewind.pipelines.ei2.weights import EI2Weights, load_weights, save_weights

FEW = EI2Settings(steps=3, guidance=2.0)
SHORT = OneShot(steps=3, learning_rate=1e-2)
PER_FRAME = InflationSettings("own frame", temporal="none")
CAPTION, PROMPT = "a red circle", "a blue square"


@pytest.fixture(scope="module")
def pipeline():
    return EI2Pipeline(tiny.family())


@pytest.fixture(scope="module")
def tuned(pipeline) -> EI2Weights:
    return pipeline.tune(tiny.video(), CAPTION, SHORT)[0]


class Counted(TextToImage):
    """A family that keeps what its network was asked; latents are taken and given as they are, if there are any."""

    latents: Tensor | None = None

    @classmethod
    def of(cls, family: TextToImage, latents: Tensor | None = None) -> Counted:
        made = cls(family.network, family.vae, family.text_encoder, family.tokenizer, tiny.alphas())
        made.asked, made.latents = [], latents
        return made

    def denoise(self, x, sigma, context):
        self.asked.append((float(sigma[0]), context))
        return super().denoise(x, sigma, context)

    def encode_clip(self, frames):
        return super().encode_clip(frames) if self.latents is None else self.latents

    def decode(self, latents):
        return super().decode(latents) if self.latents is None else latents


def latents() -> Tensor:
    return torch.randn(tiny.FRAMES, 4, 4, 6, generator=torch.Generator().manual_seed(0))


# --- the edit ---------------------------------------------------------------------------------------------------------


def ddim(family: TextToImage, x: Tensor, settings: EI2Settings) -> Tensor:
    """DDIM inversion with the empty prompt, then DDIM with guidance, in the noise scale dx = eps dsigma."""
    empty, context = family.embed([""]), family.embed([PROMPT])
    levels = family.schedule(settings.steps).flip(0).tolist()
    for low, high in zip(levels, levels[1:]):
        eps = (x - family.denoise(x, torch.full((len(x),), high), empty)) / high
        x = x + (high - low) * eps
    for high, low in zip(levels[::-1], levels[-2::-1]):
        sigma = torch.full((len(x),), high)
        plain, wanted = (family.denoise(x, sigma, c) for c in (empty, context))
        x = x + (low - high) * (x - plain - settings.guidance * (wanted - plain)) / high
    return x


@torch.no_grad()
def test_an_edit_is_ddim_inversion_with_the_empty_prompt_and_sampling_with_guidance(pipeline, tuned):
    family = Counted.of(pipeline.family, latents())
    ours = EI2Pipeline(family)
    video, plain = tiny.video(), ours.edit(tiny.video(), PROMPT, FEW, inflation=PER_FRAME).frames
    assert torch.allclose(plain, ddim(family, latents(), FEW), rtol=1e-3, atol=1e-3)
    alone = torch.cat([ddim(family, frame[None], FEW) for frame in latents()])
    assert torch.allclose(plain, alone, rtol=1e-3, atol=1e-3)  # per-frame editing: no frame sees another
    patched = ours.edit(video, PROMPT, FEW, tuned).frames
    with ours.patched(tiny.FRAMES, tuned, FEW, tuned.settings):
        assert torch.allclose(patched, ddim(family, latents(), FEW), rtol=1e-3, atol=1e-3)
    assert (patched - plain).norm() > 0.01 * plain.norm()


def test_refined_inversion_without_guidance_or_another_prompt_brings_the_clip_back(tuned):
    """With the patch on, both ways: the inversion solves the very steps that the sampler takes."""
    family = Counted.of(tiny.family(), latents())
    family.network.conv_out.weight.data.mul_(0.03)  # a gentle network, whose fixed points are found
    settings = EI2Settings(steps=4, guidance=1.0)
    back, rough = (
        EI2Pipeline(family).edit(tiny.video(), "", replace(settings, refine=refine), tuned).frames for refine in (20, 0)
    )
    error, without = ((x - latents()).norm() / latents().norm() for x in (back, rough))
    assert error < 1e-3 and without > 10 * error


def test_equal_arguments_give_equal_clips_and_leave_the_model_as_it_was(pipeline, tuned):
    before = {name: value.clone() for name, value in pipeline.family.network.state_dict().items()}
    first, again = (pipeline.edit(tiny.video(), PROMPT, FEW, tuned).frames for _ in range(2))
    assert first.shape == tiny.video().shape and first.min() >= 0 and first.max() <= 1
    assert torch.equal(first, again)
    assert tiny.untouched(pipeline.family.network)
    after = pipeline.family.network.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_weights_attentions_places_and_prompts_matter(pipeline, tuned):
    variants = {
        "tuned": pipeline.edit(tiny.video(), PROMPT, FEW, tuned),
        "middle": pipeline.edit(tiny.video(), PROMPT, replace(FEW, place="middle"), tuned),
        "half": pipeline.edit(tiny.video(), PROMPT, replace(FEW, patch_strength=0.5), tuned),
        "another prompt": pipeline.edit(tiny.video(), CAPTION, FEW, tuned),
        "negative": pipeline.edit(tiny.video(), PROMPT, replace(FEW, negative=CAPTION), tuned),
        "untuned": pipeline.edit(tiny.video(), PROMPT, FEW),
        "per frame": pipeline.edit(tiny.video(), PROMPT, FEW, inflation=PER_FRAME),
    }
    results = [result.frames for result in variants.values()]
    assert not [(i, j) for i in range(len(results)) for j in range(i) if torch.equal(results[i], results[j])]


def test_a_patch_of_strength_0_is_bit_for_bit_the_model(pipeline, tuned):
    off = replace(FEW, patch_strength=0.0)
    with_weights, without = (pipeline.edit(tiny.video(), PROMPT, off, weights).frames for weights in (tuned, None))
    assert torch.equal(with_weights, without)
    x, sigma, context = latents(), torch.ones(tiny.FRAMES), pipeline.family.embed([PROMPT])
    plain = pipeline.family.denoise(x, sigma, context)
    with pipeline.patched(tiny.FRAMES, tuned, off, tuned.settings):
        assert torch.equal(pipeline.family.denoise(x, sigma, context), plain)
    with pipeline.patched(tiny.FRAMES, tuned, FEW, tuned.settings), torch.no_grad():
        assert not torch.allclose(pipeline.family.denoise(x, sigma, context), plain, atol=1e-3)
    assert torch.equal(pipeline.family.denoise(x, sigma, context), plain)


@pytest.mark.parametrize(("place", "blocks"), [("all", tiny.BLOCKS), ("middle", tiny.BLOCKS[1:2])])
def test_changes_of_the_queries_are_added_to_the_chosen_blocks_weights_by_the_patchs_strength(pipeline, place, blocks):
    weights, _ = pipeline.tune(tiny.video(), CAPTION, SHORT, PER_FRAME)
    x, sigma, context = latents(), torch.ones(tiny.FRAMES), pipeline.family.embed([PROMPT])
    settings, changed = replace(FEW, patch_strength=0.5, place=place), tiny.family()
    with torch.no_grad():
        for name, layer in query_layers(changed.network).items():
            if name.rpartition(".attn")[0] in blocks:
                layer.weight.add_(0.5 * weights.queries()[name])
        expected = changed.denoise(x, sigma, context)
        with pipeline.patched(tiny.FRAMES, weights, settings, PER_FRAME):
            assert torch.allclose(pipeline.family.denoise(x, sigma, context), expected, atol=1e-5)
        assert not torch.allclose(pipeline.family.denoise(x, sigma, context), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "levels"),
    [
        ({}, [1, 2, 3, 3, 3, 2, 2, 1, 1]),  # guidance asks twice on the way back
        ({"guidance": 1.0}, [1, 2, 3, 3, 2, 1]),
        ({"guidance": 1.0, "strength": 0.7}, [1, 2, 2, 1]),
    ],
)
def test_the_network_is_asked_at_these_levels_and_by_these_prompts(pipeline, changes, levels):
    family = Counted.of(pipeline.family)
    result = EI2Pipeline(family).edit(tiny.video(), PROMPT, replace(FEW, negative=CAPTION, **changes))
    sigmas = family.schedule(FEW.steps).flip(0)
    assert [sigma for sigma, _ in family.asked] == pytest.approx([float(sigmas[i]) for i in levels])
    assert result.evaluations == len(levels)
    contexts = [context for _, context in family.asked]
    up = max(levels)
    assert all(torch.equal(context, family.embed([""])) for context in contexts[:up])
    assert torch.equal(contexts[up], family.embed([PROMPT]))
    if not changes:
        assert torch.equal(contexts[up + 1], family.embed([CAPTION]))


def test_evaluations_are_the_calls_also_where_refinement_ends_early(pipeline):
    family = Counted.of(pipeline.family)
    family.network = tiny.unet()
    family.network.conv_out.weight.data.mul_(0.01)
    settings = replace(FEW, guidance=1.0, refine=30)
    result = EI2Pipeline(family).edit(tiny.video(), PROMPT, settings)
    assert result.evaluations == len(family.asked) < FEW.steps * 31


# --- whole jobs -------------------------------------------------------------------------------------------------------


def test_the_whole_job_is_a_tuning_and_an_edit(pipeline, tuned):
    steps = []
    result = pipeline(tiny.video(), CAPTION, PROMPT, FEW, SHORT, callback=steps.append)
    assert torch.equal(result.frames, pipeline.edit(tiny.video(), PROMPT, FEW, tuned).frames)
    assert all(torch.equal(result.weights.tensors[name], value) for name, value in tuned.tensors.items())
    assert len(result.losses) == SHORT.steps and len(steps) == SHORT.steps + 2 * FEW.steps
    assert (tuned.caption, tuned.about["steps"], tuned.about["frames"]) == (CAPTION, SHORT.steps, tiny.FRAMES)


def test_with_no_steps_of_tuning_the_attention_alone_is_put_in(pipeline):
    result = pipeline(tiny.video(), CAPTION, PROMPT, FEW, replace(SHORT, steps=0))
    assert result.weights is None and result.losses == []
    assert torch.equal(result.frames, pipeline.edit(tiny.video(), PROMPT, FEW).frames)


def test_weights_from_a_file_edit_as_those_of_the_tuning(pipeline, tuned, tmp_path):
    save_weights(tmp_path / "ei2.safetensors", tuned, torch.float32)
    again = pipeline.edit(tiny.video(), PROMPT, FEW, load_weights(tmp_path / "ei2.safetensors")).frames
    assert torch.equal(again, pipeline.edit(tiny.video(), PROMPT, FEW, tuned).frames)


def test_a_tuning_goes_on_from_its_folder(pipeline, tuned, tmp_path):
    def stop(step):
        if step["i"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.tune(tiny.video(), CAPTION, SHORT, callback=stop, checkpoints=tmp_path)
    weights, losses = pipeline.tune(tiny.video(), CAPTION, SHORT, checkpoints=tmp_path)
    assert all(torch.equal(weights.tensors[name], value) for name, value in tuned.tensors.items())
    assert len(losses) == SHORT.steps and not list(tmp_path.iterdir())


def test_shifts_are_measured_block_by_block_at_shares_of_the_training_times(pipeline, tuned):
    readings = pipeline.covariate_shift(tiny.video(), PROMPT, tuned, times=(0.0, 0.5, 1.0))
    assert [reading.block for reading in readings] == 3 * tiny.BLOCKS
    assert list(by_block(readings)) == tiny.BLOCKS
    alphas = tiny.alphas()
    levels = [math.sqrt((1 - alphas[i]) / alphas[i]) for i in (0, 500, 999)]
    assert [reading.sigma for reading in readings[:: len(tiny.BLOCKS)]] == pytest.approx(levels, rel=1e-4)
    assert all(value > 0 for value in overall(readings))
    assert readings == pipeline.covariate_shift(tiny.video(), PROMPT, tuned, times=(0.0, 0.5, 1.0))
    assert readings != pipeline.covariate_shift(tiny.video(), PROMPT, tuned, times=(0.0, 0.5, 1.0), seed=1)


def test_untrained_modules_shift_nothing_and_queries_alone_have_nothing_to_measure(pipeline):
    fresh, _ = pipeline.tune(tiny.video(), CAPTION, replace(SHORT, steps=0))
    assert overall(pipeline.covariate_shift(tiny.video(), PROMPT, fresh)) == (0.0, 0.0)
    none, _ = pipeline.tune(tiny.video(), CAPTION, replace(SHORT, steps=0), InflationSettings(temporal="none"))
    assert pipeline.covariate_shift(tiny.video(), PROMPT, none) == []


# --- from a folder ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_stable_diffusion_folder_is_loaded_with_its_schedule_and_target(tmp_path, prediction):
    saved = tiny.save(tmp_path, prediction)
    family = EI2Pipeline.from_pretrained(tmp_path).family
    assert family.path is (EPS if prediction == "epsilon" else V)
    assert torch.allclose(family.times.log_sigmas, saved.times.log_sigmas, atol=1e-4)
    for ours, theirs in ((family.network, saved.network), (family.vae, saved.vae)):
        weights = theirs.state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in ours.state_dict().items())
        assert not ours.training and not any(p.requires_grad for p in ours.parameters())
    assert torch.equal(family.embed([PROMPT]), saved.embed([PROMPT]))


def test_a_folder_in_half_precision_is_tuned_and_edited(tmp_path):
    tiny.save(tmp_path)
    pipeline = EI2Pipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert pipeline.family.network.dtype == torch.bfloat16
    result = pipeline(tiny.video(), CAPTION, PROMPT, FEW, SHORT)
    assert result.frames.dtype == torch.float32 and torch.isfinite(result.frames).all()
    assert all(value.dtype == torch.float32 for value in result.weights.tensors.values())
    exact = EI2Pipeline.from_pretrained(tmp_path)(tiny.video(), CAPTION, PROMPT, FEW, SHORT)
    assert result.losses == pytest.approx(exact.losses, rel=0.05)


@pytest.mark.parametrize("kind", ["StableDiffusionXLPipeline", "StableVideoDiffusionPipeline", "WanPipeline"])
def test_another_kind_is_refused_before_weights_are_read(tmp_path, kind):
    (tmp_path / "model_index.json").write_text(f'{{"_class_name": "{kind}"}}')
    with pytest.raises(ValueError, match=f"holds a {kind}; EI² takes Stable Diffusion 1.x and 2.x: StableDiff"):
        load_family(tmp_path)


def test_a_v_model_denoises_by_its_own_formula():
    """D = x / (s^2 + 1) - s / sqrt(s^2 + 1) F(x / sqrt(s^2 + 1)), and D = x - s F for the other kind."""
    x, sigma, s = latents(), torch.full((tiny.FRAMES,), 1.5), 1.5
    eps, v = tiny.family(), tiny.family(predicts_v=True)
    context = eps.embed([PROMPT])
    with torch.no_grad():
        scaled, time = x / math.sqrt(s * s + 1), eps.times.time(sigma)
        output = eps.network(scaled, time, context.expand(tiny.FRAMES, -1, -1), return_dict=False)[0]
        assert torch.allclose(eps.denoise(x, sigma, context), x - s * output, atol=1e-5)
        expected = x / (s * s + 1) - s / math.sqrt(s * s + 1) * output
        assert torch.allclose(v.denoise(x, sigma, context), expected, atol=1e-5)
    assert (eps.path, v.path) == (EPS, V)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda p, w: p(tiny.video(frames=1), CAPTION, PROMPT, FEW, SHORT), "got 1 frames; a clip has at least 2"),
        (lambda p, w: p.edit(tiny.video(frames=1), PROMPT, FEW), "got 1 frames"),
        (lambda p, w: p.covariate_shift(tiny.video(frames=1), PROMPT, w), "got 1 frames"),
        (lambda p, w: p.edit(tiny.video()[..., :24], PROMPT, FEW), "got frames of 24x32.*multiples of 16"),
        (lambda p, w: p.tune(tiny.video() * 2, CAPTION, SHORT), "must be 0 to 1"),
        (lambda p, w: p.tune(tiny.video()[0], CAPTION, SHORT), r"of shape \(3, 32, 48\)"),
        (lambda p, w: p.tune(tiny.video(), "  ", SHORT), "the caption is empty"),
        (lambda p, w: p.edit(tiny.video(), PROMPT, FEW, replace(w, architecture="context 9; a:8")), "another archi"),
        (lambda p, w: p.covariate_shift(tiny.video(), PROMPT, replace(w, architecture="context 9; a:8")), "another ar"),
    ],
)
def test_bad_input_is_told_before_the_network_is_called(pipeline, tuned, call, told):
    family = Counted.of(pipeline.family)
    with pytest.raises(ValueError, match=told):
        call(EI2Pipeline(family), tuned)
    assert family.asked == [] and tiny.untouched(family.network)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"steps": 0}, "got 0 steps"),
        ({"strength": 0.0}, "the strength is 0.0"),
        ({"strength": 1.1}, "the strength is 1.1"),
        ({"patch_strength": -0.1}, "the strength of the patch is -0.1"),
        ({"patch_strength": 2.0}, "the strength of the patch is 2.0"),
        ({"refine": -1}, "got -1 refinements"),
        ({"guess": "best"}, 'the guess is "best"; it must be one of extrapolation, current, last_direction'),
        ({"guess": "random"}, 'the guess is "random"'),
        ({"place": "up"}, 'the blocks are "up"'),
    ],
)
def test_settings_out_of_range_are_told(change, told):
    with pytest.raises(ValueError, match=told):
        EI2Settings(**change)
