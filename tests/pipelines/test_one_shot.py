"""One-shot tuning: the model's own loss, what it trains, what it leaves alone, and that a run can stop and go on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import tiny_text_image as tiny
import torch
from torch import Tensor

from rewind.pipelines.denoiser import EPS, DiscreteTimes, V, discrete_denoised
from rewind.pipelines.ei2 import tuning
from rewind.pipelines.ei2.family import TextToImage
from rewind.pipelines.ei2.inflation import Inflation, InflationSettings, inflated, transformer_blocks
from rewind.pipelines.ei2.stam import SpectralLinear
from rewind.pipelines.ei2.tuning import (
    OneShot,
    Queries,
    Run,
    Subject,
    draw_time,
    one_shot_tune,
    query_layers,
    training_loss,
)
from rewind.pipelines.training import step_generator

FEW = OneShot(steps=4, learning_rate=1e-3)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def subject_of(family: TextToImage, frames: int = tiny.FRAMES) -> Subject:
    """A random clip of latents under a caption."""
    network, context = family.network, family.embed(["a red circle"])
    return Subject(
        network=network,
        denoise=lambda x, sigma: family.denoise(x, sigma, context),
        clip=torch.randn(frames, 4, 4, 6, generator=generator()),
        sigmas=family.times.log_sigmas.exp().float(),
        inflate=lambda inflation: inflated(network, inflation, frames),
        path=family.path,
        caption="a red circle",
    )


@pytest.fixture(scope="module")
def subject():
    return subject_of(tiny.family())


@pytest.fixture
def large(monkeypatch):
    """Tunings begin with temporal modules that do something, with norms above 1."""
    monkeypatch.setattr(tuning, "fresh_temporal", lambda network, settings, seed: tiny.temporal(network, settings, 2.0))


def trained(run: Run, steps: int) -> Run:
    with run.queries, run.subject.inflate(run.inflation):
        for _ in range(steps):
            run.train_step()
    return run


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def norm(weight: Tensor) -> float:
    return float(torch.linalg.matrix_norm(weight.detach(), 2))


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [EPS, V], ids=["EPS", "V"])
@pytest.mark.parametrize("time", [20, 500, 980])
def test_the_loss_is_the_networks_squared_error_of_its_own_target(path, time):
    alpha = float(tiny.alphas()[time])
    times, output = DiscreteTimes(tiny.alphas()), torch.randn(3, 4, 2, 2, generator=generator(2))
    clean, noise = (torch.randn(3, 4, 2, 2, generator=generator(seed)) for seed in (0, 1))
    told = []

    def network(scaled, at):
        told.append((scaled, at))
        return output

    sigma = math.sqrt((1 - alpha) / alpha)
    loss = training_loss(lambda x, s: discrete_denoised(network, x, s, times, path), clean, sigma, noise, path)
    target = noise if path is EPS else math.sqrt(alpha) * noise - math.sqrt(1 - alpha) * clean
    assert float(loss) == pytest.approx(float((output - target).square().mean()), rel=1e-3)
    ((scaled, at),) = told
    assert torch.allclose(scaled, math.sqrt(alpha) * clean + math.sqrt(1 - alpha) * noise, atol=1e-5)
    assert at.tolist() == pytest.approx([time] * 3, abs=1e-2)  # one time for the whole clip


def test_times_are_uniform_over_the_training_times():
    sigmas = torch.tensor([0.1, 0.2, 3.0, 14.0])
    g = generator()
    drawn = [draw_time(sigmas, g) for _ in range(4000)]
    for sigma in sigmas.tolist():
        assert drawn.count(sigma) / 4000 == pytest.approx(0.25, abs=0.03)


def test_the_first_loss_is_the_models_own(subject):
    """A fresh module with each frame's own attention changes nothing yet: the first step measures the plain network."""
    own = InflationSettings("own frame")
    seen = []
    one_shot_tune(subject, replace(FEW, steps=1), own, lambda step: seen.append(step))
    g = step_generator(0, 0)
    sigma = draw_time(subject.sigmas, g)
    noise = torch.randn(subject.clip.shape, generator=g)
    expected = float(training_loss(subject.denoise, subject.clip, sigma, noise, EPS))
    assert [step["i"] for step in seen] == [0]
    assert seen[0]["total"] == pytest.approx(expected, rel=1e-5)


# --- what is trained --------------------------------------------------------------------------------------------------


def test_gradients_reach_the_temporal_modules_and_the_queries_and_nothing_else(subject):
    run = Run(subject, FEW, InflationSettings())
    learnt = []
    for _ in range(2):
        trained(run, 1)
        learnt.append({n for n, p in run.temporal.named_parameters() if p.grad is not None and p.grad.any()})
        assert all(diff.grad.any() for diff in run.queries.diffs)
    names = {name for name, _ in run.temporal.named_parameters()}
    assert learnt == [{name for name in names if "to_out" in name}, names]  # the rest sees a zero output at first
    assert all(p.grad is None for p in subject.network.parameters())
    expected = {f"{block}.{layer}" for block in tiny.BLOCKS for layer in ("attn1.to_q", "attn2.to_q")}
    assert set(run.queries.layers) == expected


def test_without_temporal_modules_the_queries_alone_are_trained(subject):
    weights, losses = one_shot_tune(subject, FEW, InflationSettings(temporal="none"))
    assert len(losses) == FEW.steps and weights.temporal(subject.network) == {}
    assert set(weights.tensors) == {f"{name}.diff" for name in query_layers(subject.network)}
    assert all(diff.any() for diff in weights.queries().values())


def test_changes_of_the_queries_are_added_and_taken_off_again():
    layer, x = torch.nn.Linear(5, 3, bias=False), torch.randn(4, 5, generator=generator())
    queries, plain = Queries({"a.to_q": layer}), layer(x)
    diff = torch.randn(3, 5, generator=generator(1))
    with queries:
        assert torch.equal(layer(x), plain)
        queries.load({"a.to_q": diff})
        assert torch.allclose(layer(x), x @ (layer.weight + diff).T, atol=1e-6)
        queries.load({})
        assert torch.equal(layer(x), plain)
    queries.load({"a.to_q": diff})
    assert torch.equal(layer(x), plain) and not layer._forward_hooks


def test_tuning_lowers_the_loss_on_the_clip_and_leaves_the_network_as_it_was():
    subject = subject_of(tiny.family())
    network = subject.network
    wanted = next(network.parameters()).requires_grad_(True)  # a network whose weights somebody else trains
    before = {name: value.clone() for name, value in network.state_dict().items()}
    noise = torch.randn(4, *subject.clip.shape, generator=generator(9))

    @torch.no_grad()
    def measured() -> float:
        levels = zip((0.5, 1.0, 2.0, 4.0), noise)
        return sum(float(training_loss(subject.denoise, subject.clip, *level, EPS)) for level in levels) / 4

    with inflated(network, Inflation(InflationSettings(), tiny.BLOCKS), tiny.FRAMES):
        untuned = measured()
    weights, losses = one_shot_tune(subject, replace(FEW, steps=40, learning_rate=3e-2))
    queries = Queries(query_layers(network))
    queries.load(weights.queries())
    modules = weights.temporal(network)
    with queries, inflated(network, Inflation(InflationSettings(), tiny.BLOCKS, modules), tiny.FRAMES):
        assert measured() < 0.97 * untuned
    assert len(losses) == 40
    assert tiny.untouched(network) and equal(network.state_dict(), before)
    assert [p for p in network.parameters() if p.requires_grad] == [wanted] and wanted.grad is None


def test_equal_seeds_tune_equally_and_others_otherwise(subject):
    first, again, other = (one_shot_tune(subject, replace(FEW, seed=seed)) for seed in (0, 0, 1))
    assert first[1] == again[1] and equal(first[0].tensors, again[0].tensors)
    assert first[1] != other[1] and not equal(first[0].tensors, other[0].tensors)


# --- spectral normalisation -------------------------------------------------------------------------------------------


def test_norms_stay_at_most_1_while_weights_grow(subject, large):
    run = trained(Run(subject, FEW, InflationSettings()), 20)
    layers = {name: layer for name, layer in run.temporal.named_modules() if isinstance(layer, SpectralLinear)}
    assert len(layers) == 2 * len(tiny.BLOCKS) and all(norm(layer.weight) > 1.5 for layer in layers.values())
    for layer in layers.values():
        assert norm(layer.normalised()) == pytest.approx(1, abs=0.02)
    for module in run.inflation.temporal.values():
        folded = module.folded()
        assert all(norm(folded[f"{name}.weight"]) <= 1 + 1e-5 for name in ("to_v", "to_out"))
        assert norm(folded["to_q.weight"]) > 1


def test_what_is_exported_is_what_was_trained(subject, large):
    run = trained(Run(subject, FEW, InflationSettings()), 3)
    for layer in run.temporal.modules():
        if isinstance(layer, SpectralLinear):
            for _ in range(300):
                layer.iterate()
    weights, sigma = run.result(), torch.full((tiny.FRAMES,), 1.0)

    @torch.no_grad()
    def denoised(inflation: Inflation, queries: Queries) -> Tensor:
        with queries, subject.inflate(inflation):
            return subject.denoise(subject.clip, sigma)

    queries = Queries(query_layers(subject.network))
    queries.load(weights.queries())
    modules = weights.temporal(subject.network)
    assert not any(isinstance(layer, SpectralLinear) for module in modules.values() for layer in module.modules())
    ours = denoised(Inflation(weights.settings, tiny.BLOCKS, modules), queries)
    assert torch.allclose(ours, denoised(run.inflation, run.queries), atol=1e-5)
    assert not torch.allclose(ours, denoised(Inflation(weights.settings, tiny.BLOCKS), queries), atol=1e-2)


# --- memory and precision ---------------------------------------------------------------------------------------------


def test_recomputing_blocks_tunes_the_same(subject, large):
    """With norms above 1: a second computation must see the weights that the first one saw."""
    calls: list[int] = []
    block = transformer_blocks(subject.network)[tiny.BLOCKS[0]]
    hook = block.norm1.register_forward_pre_hook(lambda *args: calls.append(1))
    plain, losses = one_shot_tune(subject, FEW)
    once = len(calls)
    recomputed, same = one_shot_tune(subject, replace(FEW, checkpointing=True))
    hook.remove()
    assert (once, len(calls)) == (FEW.steps, 3 * FEW.steps)
    assert losses == pytest.approx(same, rel=1e-6)
    for name, value in plain.tensors.items():
        assert torch.allclose(value, recomputed.tensors[name], atol=1e-6), name


def test_half_precision_arithmetic_trains_in_float32(subject):
    half, losses = one_shot_tune(subject, replace(FEW, precision="bfloat16"))
    exact = one_shot_tune(subject, FEW)[1]
    assert losses == pytest.approx(exact, rel=0.05) and losses != exact
    assert all(value.dtype == torch.float32 and torch.isfinite(value).all() for value in half.tensors.values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_network_in_half_precision_is_tuned_too(precision):
    family = tiny.family()
    exact = one_shot_tune(subject_of(family), FEW)[1]
    family.network.to(torch.bfloat16)
    weights, losses = one_shot_tune(subject_of(family), replace(FEW, precision=precision))
    assert losses == pytest.approx(exact, rel=0.05)
    assert all(value.dtype == torch.float32 for value in weights.tensors.values())


# --- stopping and going on --------------------------------------------------------------------------------------------


class Cancelled(BaseException):
    """Like the host's, no Exception."""


def cancel_at(count: int) -> Callable[[dict], None]:
    def callback(step):
        if step["i"] + 1 == count:
            raise Cancelled

    return callback


def test_a_cancelled_run_goes_on_as_if_nothing_had_happened(subject, large, tmp_path):
    settings = replace(FEW, steps=6)
    whole, losses = one_shot_tune(subject, settings)
    with pytest.raises(Cancelled):
        one_shot_tune(subject, settings, callback=cancel_at(3), checkpoints=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1 and tiny.untouched(subject.network)
    steps = []
    resumed, rest = one_shot_tune(
        subject, settings, callback=lambda step: steps.append(step["i"]), checkpoints=tmp_path
    )
    assert steps == [3, 4, 5] and rest == losses
    assert equal(resumed.tensors, whole.tensors) and resumed.about == whole.about
    assert not list(tmp_path.iterdir())  # done: nothing is left behind


def test_a_run_that_was_cancelled_inside_a_step_does_that_step_anew(subject, large, tmp_path):
    whole, losses = one_shot_tune(subject, FEW)
    calls = []

    def interrupted(x, sigma):
        denoised = subject.denoise(x, sigma)
        calls.append(1)
        if len(calls) == 3:
            raise Cancelled
        return denoised

    with pytest.raises(Cancelled):
        one_shot_tune(replace(subject, denoise=interrupted), FEW, checkpoints=tmp_path)
    resumed, rest = one_shot_tune(replace(subject, denoise=interrupted), FEW, checkpoints=tmp_path)
    assert len(calls) == 3 + 2 and rest == losses and equal(resumed.tensors, whole.tensors)


def test_a_run_is_written_on_the_way(subject, tmp_path):
    seen = []
    one_shot_tune(
        subject, FEW, callback=lambda step: seen.append(len(list(tmp_path.iterdir()))), checkpoints=tmp_path, every=2
    )
    assert seen == [0, 1, 1, 1]


def test_other_clips_captions_settings_and_models_do_not_take_a_file_that_is_not_theirs(subject, tmp_path):
    with pytest.raises(Cancelled):
        one_shot_tune(subject, FEW, callback=cancel_at(2), checkpoints=tmp_path)
    changed = tiny.family()
    changed.network.conv_in.weight.data.add_(0.01)
    others = [
        (replace(subject, clip=subject.clip + 1), FEW, InflationSettings()),
        (replace(subject, caption="a blue circle"), FEW, InflationSettings()),
        (subject, replace(FEW, seed=1), InflationSettings()),
        (subject, FEW, InflationSettings(temporal="Tune-A-Video")),
        (replace(subject, path=V), FEW, InflationSettings()),
        (replace(subject, sigmas=subject.sigmas[:900]), FEW, InflationSettings()),
        (subject_of(changed), FEW, InflationSettings()),
    ]
    for other, settings, inflation in others:
        steps = []
        one_shot_tune(other, settings, inflation, lambda step, to=steps: to.append(step["i"]), tmp_path)
        assert steps == [0, 1, 2, 3]
    steps = []
    longer = replace(FEW, steps=5, checkpointing=True)  # the same run
    one_shot_tune(subject, longer, callback=lambda step: steps.append(step["i"]), checkpoints=tmp_path)
    assert steps == [2, 3, 4]


def test_a_broken_file_is_told(subject, tmp_path):
    with pytest.raises(Cancelled):
        one_shot_tune(subject, FEW, callback=cancel_at(2), checkpoints=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        one_shot_tune(subject, FEW, checkpoints=tmp_path)
    assert tiny.untouched(subject.network)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"steps": -1}, "steps is -1"),
        ({"warm_up": -1}, "warm_up is -1"),
        ({"learning_rate": 0.0}, "the learning rate is 0.0"),
        ({"learning_rate": math.nan}, "the learning rate is nan"),
        ({"precision": "int8"}, 'the precision is "int8"; it must be one of float32'),
    ],
)
def test_settings_out_of_range_are_told(change, told):
    with pytest.raises(ValueError, match=told):
        OneShot(**change)


def test_bad_material_is_told_before_the_network_is_called(subject):
    def never(x, sigma):
        raise AssertionError("the network was called")

    broken = subject.clip.clone()
    broken[1, 0, 0, 0] = math.nan
    for change, told in (
        ({"clip": subject.clip[:1]}, "at least 2 frames are needed"),
        ({"clip": subject.clip[None]}, r"have shape \(1, 3, 4, 4, 6\)"),
        ({"clip": broken}, "the latents of the clip hold NaN"),
        ({"network": torch.nn.Linear(2, 2)}, "a Linear cannot be inflated"),
    ):
        with pytest.raises(ValueError, match=told):
            one_shot_tune(replace(subject, denoise=never, **change), FEW)


def test_a_loss_that_is_not_finite_is_told(subject):
    broken = replace(subject, denoise=lambda x, sigma: subject.denoise(x, sigma) * math.inf)
    with pytest.raises(ValueError, match="at step 0: lower the learning rate"):
        one_shot_tune(broken, FEW)
    assert tiny.untouched(subject.network)
