"""Dreamix headless on tiny random models of each family: corrupt, restore, tune, animate, put a subject in a clip."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny_text_video as tiny
import torch

from rewind.pipelines.dreamix.coarse_video import coarse_video, move
from rewind.pipelines.dreamix.corruption import degrade
from rewind.pipelines.dreamix.finetuning import FineTuning
from rewind.pipelines.dreamix.pipeline import DreamixPipeline, DreamixSettings

FEW = DreamixSettings(s=0.7, factor=2.0, steps=4, guidance=2.0)
SHORT = FineTuning(steps=2, rank=2, warm_up=1, learning_rate=1e-2)
PROMPT = "a red circle"


@pytest.fixture(scope="module", params=tiny.NAMES)
def pipeline(request):
    return DreamixPipeline(tiny.family(request.param))


@pytest.fixture(scope="module")
def svd():
    return DreamixPipeline(tiny.family("TextSVD"))


@pytest.fixture(scope="module")
def tuned(svd):
    return svd.fine_tune(tiny.video(), "sks", SHORT)


def never(step):
    raise AssertionError("something was computed")


# --- the edit ---------------------------------------------------------------------------------------------------------


def test_equal_arguments_give_equal_clips_and_other_seeds_others(pipeline):
    first, again = (pipeline.edit(tiny.video(), PROMPT, FEW, seed=1).frames for _ in range(2))
    other = pipeline.edit(tiny.video(), PROMPT, FEW, seed=2).frames
    assert first.shape == tiny.video().shape and torch.isfinite(first).all()
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_without_noise_the_degraded_clip_comes_back(pipeline):
    result = pipeline.edit(tiny.video(), PROMPT, replace(FEW, s=0.0))
    family = pipeline.family
    assert torch.equal(result.frames, family.decode(family.encode_clip(degrade(tiny.video(), 2.0))))
    assert result.evaluations == 0
    small = pipeline.edit(tiny.video(), PROMPT, replace(FEW, s=0.0, size=(8, 6)))
    assert torch.equal(small.frames, family.decode(family.encode_clip(degrade(tiny.video(), size=(8, 6)))))


def test_from_pure_noise_nothing_of_the_clip_is_left(pipeline):
    pure = replace(FEW, s=1.0)
    a, b = (pipeline.edit(tiny.video(seed), PROMPT, pure).frames for seed in (3, 4))
    assert torch.equal(a, b)
    c, d = (pipeline.edit(tiny.video(seed), PROMPT, replace(FEW, s=0.99)).frames for seed in (3, 4))
    assert not torch.equal(c, d)


def test_guidance_takes_two_calls_a_step_and_none_takes_one(pipeline):
    steps = []
    guided = pipeline.edit(tiny.video(), PROMPT, replace(FEW, s=1.0), callback=steps.append)
    plain = pipeline.edit(tiny.video(), PROMPT, replace(FEW, s=1.0, guidance=1.0))
    assert len(steps) == FEW.steps and (guided.evaluations, plain.evaluations) == (2 * FEW.steps, FEW.steps)


def test_the_second_pass_takes_up_the_first_ones_result_larger(svd):
    single = svd.edit(tiny.video(), PROMPT, FEW)
    double = svd.edit(tiny.video(), PROMPT, replace(FEW, second_pass=0.4, scale=2.0))
    assert torch.equal(double.first_pass, single.frames)
    assert double.frames.shape[-2:] == (2 * tiny.HEIGHT, 2 * tiny.WIDTH)
    assert double.evaluations > single.evaluations
    same_size = svd.edit(tiny.video(), PROMPT, replace(FEW, second_pass=0.4, scale=1.0))
    assert same_size.frames.shape == single.frames.shape and not torch.equal(same_size.frames, single.frames)


def test_adapters_matter_bring_the_token_and_are_taken_off(svd, tuned):
    weights = {name: value.clone() for name, value in svd.family.network.state_dict().items()}
    plain = svd.edit(tiny.video(), PROMPT, FEW)
    with_lora = svd.edit(tiny.video(), PROMPT, FEW, lora=tuned.lora)
    assert not torch.equal(plain.frames, with_lora.frames)
    written = svd.edit(tiny.video(), "a sks red circle", replace(FEW, place="as written"), lora=tuned.lora)
    assert torch.equal(written.frames, with_lora.frames)
    assert torch.equal(svd.edit(tiny.video(), PROMPT, FEW).frames, plain.frames)
    assert all(torch.equal(value, weights[name]) for name, value in svd.family.network.state_dict().items())


# --- whole jobs -------------------------------------------------------------------------------------------------------


def test_the_whole_job_is_its_parts(pipeline):
    steps = []
    whole = pipeline(tiny.video(), PROMPT, FEW, SHORT, seed=5, callback=steps.append)
    lora = pipeline.fine_tune(tiny.video(), "sks", SHORT).lora
    assert torch.equal(whole.frames, pipeline.edit(tiny.video(), PROMPT, FEW, 5, lora).frames)
    assert [step["i"] for step in steps[: SHORT.steps]] == list(range(SHORT.steps)) and len(steps) > SHORT.steps
    assert len(whole.tuned.losses.total) == SHORT.steps


def test_no_steps_of_tuning_are_no_tuning(svd):
    whole = svd(tiny.video(), PROMPT, FEW, replace(SHORT, steps=0))
    assert whole.tuned is None and torch.equal(whole.frames, svd.edit(tiny.video(), PROMPT, FEW).frames)


def test_a_picture_is_animated_from_its_coarse_video(svd):
    picture, tuning, end = tiny.video()[0], replace(SHORT, alpha=0.0), move("zoom in")
    result = svd.animate(picture, tiny.FRAMES, PROMPT, end, FEW, tuning, fill="edge")
    video = coarse_video(picture, tiny.FRAMES, end, fill="edge")
    assert torch.equal(result.frames, svd(video, PROMPT, FEW, tuning).frames)
    assert all(value != value for value in result.tuned.losses.video), "no clip's loss at alpha 0"


def test_a_subject_is_put_in_a_clip_of_any_length_from_pure_noise(svd):
    pictures, tuning = tiny.video(frames=3), replace(SHORT, alpha=0.0)
    result = svd.subject(pictures, tiny.FRAMES, PROMPT, replace(FEW, s=1.0), tuning)
    assert result.frames.shape == (tiny.FRAMES, *pictures.shape[1:])
    plain = svd.edit(torch.zeros_like(tiny.video()), PROMPT, replace(FEW, s=1.0))
    assert not torch.equal(result.frames, plain.frames)


@pytest.mark.parametrize("task", ["animate", "subject"])
def test_both_tasks_go_on_from_a_checkpoint(svd, tmp_path, task):
    """A run that was stopped in its fine-tuning gives what one gives that was not, with the steps that were left."""
    tuning, pure, steps = replace(SHORT, steps=4, alpha=0.0), replace(FEW, s=1.0), []

    def run(callback, checkpoints=None):
        if task == "animate":
            how = (tiny.video()[0], tiny.FRAMES, PROMPT, move("zoom in"), FEW, tuning)
        else:
            how = (tiny.video(frames=3), tiny.FRAMES, PROMPT, pure, tuning)
        return getattr(svd, task)(*how, callback=callback, checkpoints=checkpoints).frames

    def stop(step):
        if step["i"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(stop, tmp_path)
    resumed = run(lambda step: steps.append(step["i"]) if "total" in step else None, tmp_path)
    assert steps == [2, 3] and torch.equal(resumed, run(None))


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: p(tiny.video(frames=1), PROMPT, FEW, SHORT, callback=never), "got 1 frames; a clip has at least 2"),
        (lambda p: p(tiny.video()[..., :20], PROMPT, FEW, SHORT, callback=never), "multiples of 16"),
        (lambda p: p(tiny.video() * 2, PROMPT, FEW, SHORT, callback=never), "must be 0 to 1"),
        (
            lambda p: p(tiny.video(), PROMPT, replace(FEW, place="as written"), SHORT, callback=never),
            "does not hold the token",
        ),
        (lambda p: p(tiny.video(), PROMPT, replace(FEW, token="a b"), SHORT, callback=never), "one word"),
        (lambda p: p.fine_tune(tiny.video(), " ", SHORT, never), "the token is empty"),
        (lambda p: p.fine_tune(tiny.video(frames=1), "sks", SHORT, never), "at least 2"),
        (lambda p: p.animate(tiny.video()[0], 5, PROMPT, tuning=SHORT, callback=never), "is animated with 0"),
        (lambda p: p.subject(tiny.video(), 5, PROMPT, FEW, callback=never), "with 0 and 1"),
        (lambda p: p.subject(tiny.video(), 5, PROMPT, tuning=SHORT, callback=never), "with 0 and 1"),
        (lambda p: replace(FEW, s=1.5), "the noise is 1.5"),
        (lambda p: replace(FEW, second_pass=-0.1), "the noise is -0.1"),
        (lambda p: replace(FEW, steps=0), "at least 1"),
        (lambda p: replace(FEW, scale=9.0), "must be 1"),
    ],
)
def test_bad_input_is_told_before_anything_is_computed(svd, call, words):
    with pytest.raises(ValueError, match=words):
        call(svd)


def test_wans_clips_have_four_frames_and_one_more():
    wan = DreamixPipeline(tiny.family("Wan"))
    with pytest.raises(ValueError, match=r"takes 4 n \+ 1: 5 for example"):
        wan(tiny.video(frames=7), PROMPT, FEW, SHORT, callback=never)
