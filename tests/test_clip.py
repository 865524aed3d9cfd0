"""The examples with known answers, and the shipped one."""

from __future__ import annotations

import pytest
import torch

from rewind.demo import clip, world
from rewind.pipelines.evaluation.metrics import colour_transfer, psnr
from rewind.pipelines.video import read_image, read_video


def test_the_shipped_files_are_the_shipped_example():
    shipped = clip.shipped()
    read = read_video(clip.CLIP)
    assert read.frames.shape == (8, 3, 96, 96)
    assert read.fps == clip.FPS
    assert psnr(read.frames, shipped.source) > 45
    assert psnr(read.frames, shipped.source, shipped.source_mask) > 40, "the object's colour did not survive the codec"
    assert (read_image(clip.EDITED) - shipped.edited_frame).abs().max() <= 0.5 / 255 + 1e-6


def test_the_shipped_example_is_an_edit_with_motion_that_frame_0_does_not_tell():
    shipped = clip.shipped()
    assert shipped.motion_bucket == world.UNSPECIFIED_MOTION
    frozen = shipped.target[:1].expand_as(shipped.target)
    assert psnr(frozen, shipped.target, shipped.region) < 15
    assert colour_transfer(
        frozen[:1], shipped.source[:1], shipped.target[:1], shipped.target_mask[:1]
    ) == pytest.approx(1)


@pytest.mark.parametrize("kind", world.EDITS)
def test_an_edit_changes_its_region_and_nothing_else(kind):
    chosen = clip.example(clip.SEEDS["validation"], kind)
    changed = (chosen.source - chosen.target).abs().amax(1)
    assert (changed * (1 - chosen.region)).max() < 1e-6
    assert (changed * chosen.region).max() > 0.05
    assert torch.equal(chosen.edited_frame, chosen.target[0])


def test_all_kinds_of_edit_share_the_source_and_seeds_differ():
    first, second = (clip.example(7, kind).source for kind in ("recolour", "remove"))
    assert torch.equal(first, second)
    assert not torch.equal(first, clip.example(8).source)


def test_the_sets_of_seeds_do_not_meet():
    starts = sorted(clip.SEEDS.values())
    assert all(later - earlier > 10_000 for earlier, later in zip(starts, starts[1:], strict=False))
    assert clip.SHIPPED_SEED not in range(clip.SEEDS["test"], clip.SEEDS["test"] + 10_000)


def test_another_kind_is_refused():
    with pytest.raises(ValueError, match="recolour"):
        clip.example(0, "paint")
