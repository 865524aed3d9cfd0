"""Mixed fine-tuning: what each loss is, what it may train, and that a run can stop and go on."""

import math
from dataclasses import replace

import pytest
import tiny_text_video as tiny
import torch

from rewind.pipelines.denoiser import EPS, FLOW
from rewind.pipelines.dreamix.finetuning import (
    FineTuning,
    Run,
    Subject,
    denoising_loss,
    draw_sigma,
    fine_tune,
    loss_weight,
)
from rewind.pipelines.dreamix.lora import from_state
from rewind.pipelines.dreamix.temporal import is_temporal

SMALL = FineTuning(steps=4, rank=2, warm_up=1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def subject_of(family, video=None):
    video, context = tiny.video() if video is None else video, family.embed(["sks"])
    return Subject(
        network=family.network,
        video=lambda x, sigma: family.denoise(x, sigma, context),
        pictures=lambda x, sigma: family.denoise(x, sigma, context, as_pictures=True),
        clip=family.encode_clip(video),
        frames=family.encode_pictures(video),
        path=family.path,
        sigma_range=family.sigma_range,
    )


@pytest.fixture(scope="module", params=tiny.NAMES)
def subject(request):
    return subject_of(tiny.family(request.param))


@pytest.fixture(scope="module")
def svd():
    return subject_of(tiny.family("TextSVD"))


# --- the losses -------------------------------------------------------------------------------------------------------


def test_the_loss_is_zero_for_a_denoiser_that_knows_and_weighted_by_snr_plus_one_else():
    clean, sigmas = torch.randn(3, 4, 2, 2, generator=generator()), torch.tensor([0.5, 1.0, 3.0])
    noise = torch.randn(clean.shape, generator=generator(1))
    assert float(denoising_loss(lambda x, s: clean, clean, sigmas, EPS, noise)) == 0.0
    off = denoising_loss(lambda x, s: clean + 0.1, clean, sigmas, EPS, noise)
    assert float(off) == pytest.approx(0.01 * sum((1 + s * s) / s**2 for s in (0.5, 1.0, 3.0)) / 3, rel=1e-4)


def test_the_weight_makes_every_family_a_v_prediction():
    """With D = x - sigma F (flow), the weighted loss is (signal^2 + sigma^2) |F error|^2: the scale of v."""
    sigma = torch.tensor([0.3, 0.8])
    assert torch.allclose(loss_weight(sigma, FLOW) * sigma**2, (1 - sigma) ** 2 + sigma**2)
    assert torch.allclose(loss_weight(sigma, EPS), (1 + sigma**2) / sigma**2)


def test_noise_levels_follow_the_schedule_inside_the_models_limits():
    low, high = 0.1, 5.0
    levels = draw_sigma(4000, EPS, (low, high), generator())
    assert levels.min() >= low * (1 - 1e-5) and levels.max() <= high * (1 + 1e-5)
    times = 2 / math.pi * levels.atan()  # of sigma = tan(pi s / 2): uniform between the limits' times
    inside = times[(levels > low * 1.01) & (levels < high * 0.99)]
    assert float(inside.median()) == pytest.approx(float(inside.min() + inside.max()) / 2, abs=0.02)
    flow = draw_sigma(4000, FLOW, (0.0, 1.0), generator())
    assert 0 < flow.min() and flow.max() < 1


# --- what is trained --------------------------------------------------------------------------------------------------


def gradients(subject, alpha):
    run = Run(subject, replace(SMALL, alpha=alpha))
    with run.lora:
        run.train_step()
    named = zip(run.lora.layers, zip(run.lora.down, run.lora.up))
    return {name: any(p.grad is not None and p.grad.any() for p in pair) for name, pair in named}


def test_frames_teach_no_temporal_layer_and_the_clip_teaches_all(subject):
    frames, clip = gradients(subject, 0.0), gradients(subject, 1.0)
    assert not any(learnt for name, learnt in frames.items() if is_temporal(name))
    assert any(learnt for name, learnt in frames.items() if not is_temporal(name))
    assert [learnt for name, learnt in clip.items() if is_temporal(name)].count(False) == 0
    assert any(is_temporal(name) for name in clip) == (type(subject.network).__name__ != "WanTransformer3DModel")


@pytest.mark.parametrize("mask", ["identity", "bypass"])
def test_in_a_mixed_step_temporal_layers_get_the_clips_gradient_alone(svd, mask):
    mixed, clip = (Run(svd, replace(SMALL, alpha=alpha, mask=mask)) for alpha in (0.5, 1.0))
    for run in (mixed, clip):
        run.settings = replace(run.settings, clip=1e9)
        with run.lora:
            run.train_step()
    for name, ours, theirs in zip(mixed.lora.layers, mixed.lora.up, clip.lora.up):
        if is_temporal(name):
            assert torch.allclose(ours.grad, 0.5 * theirs.grad, rtol=1e-3, atol=1e-7)


def test_the_losses_of_the_parts_are_the_mixed_ones_and_absent_parts_are_nan(svd):
    both, video, frames = (fine_tune(svd, replace(SMALL, steps=1, alpha=alpha)).losses for alpha in (0.25, 1.0, 0.0))
    assert both.video == video.video
    assert both.total[0] == pytest.approx(0.25 * both.video[0] + 0.75 * both.frames[0])
    assert math.isnan(video.frames[0]) and math.isnan(frames.video[0])
    assert video.total == video.video and frames.total == frames.frames


def test_training_lowers_the_loss_on_the_clip_and_leaves_the_network_alone(subject):
    before = {name: value.clone() for name, value in subject.network.state_dict().items()}

    def measured():
        sigmas = torch.linspace(0.2, 0.9, 4)
        noise = torch.randn(4, *subject.clip.shape, generator=generator(9))
        with torch.no_grad():
            parts = [
                denoising_loss(subject.video, subject.clip, s.expand(len(subject.clip)), subject.path, n)
                for s, n in zip(sigmas, noise)
            ]
        return float(torch.stack(parts).mean())

    untrained = measured()
    tuned = fine_tune(subject, replace(SMALL, steps=50, alpha=1.0, learning_rate=2e-2))
    assert measured() == untrained
    with from_state(subject.network, tuned.lora):
        assert measured() < 0.9 * untrained
    after = subject.network.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(p.requires_grad for p in subject.network.parameters())


def test_equal_seeds_train_equally_and_others_otherwise(svd):
    first, again, other = (fine_tune(svd, replace(SMALL, seed=seed)) for seed in (0, 0, 1))
    assert first.losses == again.losses
    assert all(torch.equal(first.lora[key], again.lora[key]) for key in first.lora)
    assert first.losses.total != other.losses.total


def test_recomputing_blocks_trains_the_same(subject):
    plain, recomputed = (fine_tune(subject, replace(SMALL, checkpointing=on)) for on in (False, True))
    for key, value in plain.lora.items():
        assert torch.allclose(value, recomputed.lora[key], atol=1e-6)


def test_half_precision_trains(svd):
    tuned = fine_tune(svd, replace(SMALL, precision="bfloat16"))
    exact = fine_tune(svd, SMALL)
    assert all(value.dtype == torch.float32 for value in tuned.lora.values())
    assert tuned.losses.total == pytest.approx(exact.losses.total, rel=0.1)
    assert tuned.losses.total != exact.losses.total


def test_few_of_many_pictures_are_drawn_anew_each_step(svd):
    seen = []
    wide = replace(svd, pictures=lambda x, s: seen.append(len(x)) or svd.pictures(x, s))
    fine_tune(wide, replace(SMALL, alpha=0.0, pictures=2))
    assert seen == [2] * SMALL.steps


# --- stopping and going on --------------------------------------------------------------------------------------------


class Cancelled(BaseException):
    """Like the host's, no Exception."""


def cancel_at(count):
    def callback(step):
        if step["i"] + 1 == count:
            raise Cancelled

    return callback


def test_a_cancelled_run_goes_on_as_if_nothing_had_happened(svd, tmp_path):
    settings = replace(SMALL, steps=6)
    whole = fine_tune(svd, settings)
    with pytest.raises(Cancelled):
        fine_tune(svd, settings, cancel_at(3), tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    steps = []
    resumed = fine_tune(svd, settings, lambda step: steps.append(step["i"]), tmp_path)
    assert steps == [3, 4, 5]
    assert resumed.losses.total == whole.losses.total
    assert all(torch.equal(value, whole.lora[key]) for key, value in resumed.lora.items())
    assert not list(tmp_path.iterdir())  # done: nothing is left behind


def test_the_file_of_a_cancelled_run_is_a_lora_for_the_host(svd, tmp_path):
    from safetensors.torch import load_file

    with pytest.raises(Cancelled):
        fine_tune(svd, SMALL, cancel_at(2), tmp_path)
    (file,) = tmp_path.iterdir()
    keys = [key for key in load_file(file) if key.startswith("diffusion_model.")]
    assert keys and all(key.endswith((".lora_up.weight", ".lora_down.weight", ".alpha")) for key in keys)


def test_a_run_is_written_on_the_way(svd, tmp_path):
    seen = []
    fine_tune(svd, replace(SMALL, steps=5), lambda step: seen.append(len(list(tmp_path.iterdir()))), tmp_path, every=2)
    assert seen == [0, 1, 1, 1, 1]


def test_other_data_settings_or_weights_do_not_take_a_file_that_is_not_theirs(svd, tmp_path):
    with pytest.raises(Cancelled):
        fine_tune(svd, SMALL, cancel_at(2), tmp_path)
    others = [
        (replace(svd, clip=svd.clip + 1), SMALL),
        (svd, replace(SMALL, alpha=0.7)),
        (subject_of(tiny.family("TextSVD", seed=1)), SMALL),
    ]
    for other, settings in others:
        steps = []
        fine_tune(other, settings, lambda step, steps=steps: steps.append(step["i"]), tmp_path)
        assert steps == [0, 1, 2, 3]
    steps = []
    fine_tune(svd, replace(SMALL, steps=5), lambda step: steps.append(step["i"]), tmp_path)  # longer: the same run
    assert steps == [2, 3, 4]


def test_a_broken_file_is_told(svd, tmp_path):
    with pytest.raises(Cancelled):
        fine_tune(svd, SMALL, cancel_at(2), tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        fine_tune(svd, SMALL, None, tmp_path)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"learning_rate": 0.0}, "the learning rate is 0.0"),
        ({"steps": -1}, "steps is -1"),
        ({"rank": 0}, "rank is 0"),
        ({"mask": "off"}, 'mask is "off"'),
        ({"targets": "all"}, 'targets is "all"'),
        ({"precision": "int8"}, 'precision is "int8"'),
    ],
)
def test_settings_out_of_range_are_told(change, told):
    with pytest.raises(ValueError, match=told):
        FineTuning(**change)


def test_missing_or_broken_material_is_told_before_training(svd):
    nan = svd.clip.clone()
    nan[0, 0, 0, 0] = math.nan
    for changed, alpha, told in (
        (replace(svd, clip=None), 0.5, "give a clip"),
        (replace(svd, frames=None), 0.5, "give at least 1"),
        (replace(svd, clip=nan), 0.5, "the latents of the clip hold NaN"),
        (replace(svd, network=torch.nn.Linear(2, 2)), 0.5, "cannot be tuned on clips"),
    ):
        with pytest.raises(ValueError, match=told):
            fine_tune(changed, replace(SMALL, alpha=alpha))


def test_a_loss_that_is_not_finite_is_told(svd):
    broken = replace(svd, video=lambda x, sigma: svd.video(x, sigma) * math.inf)
    with pytest.raises(ValueError, match="at step 0: lower the learning rate"):
        fine_tune(broken, SMALL)


def test_a_checkpoint_of_more_steps_than_are_wanted_is_left_alone(svd, tmp_path):
    """A shorter run is not given the longer run's adapters."""

    def stop(step):
        if step["i"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fine_tune(svd, replace(SMALL, steps=5), stop, tmp_path)
    (kept,) = tmp_path.iterdir()
    before = kept.read_bytes()
    short = fine_tune(svd, replace(SMALL, steps=2), checkpoints=tmp_path)
    assert short.losses == fine_tune(svd, replace(SMALL, steps=2)).losses
    assert kept.read_bytes() == before
    whole = fine_tune(svd, replace(SMALL, steps=5), checkpoints=tmp_path)
    assert whole.losses == fine_tune(svd, replace(SMALL, steps=5)).losses and not kept.exists()
