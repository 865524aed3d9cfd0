"""`rewind benchmark local` measures what it says it measures."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from quick import quick_pipeline

from rewind import cli
from rewind.benchmarks import local
from rewind.demo.clip import SEEDS, example
from rewind.pipelines.evaluation.metrics import PSNR_CAP
from rewind.pipelines.videoshop.masks import DEFAULT_MASK, edit_mask, latent_mask
from rewind.pipelines.videoshop.settings import DEFAULT

SEED = SEEDS["validation"]
SHORT = replace(DEFAULT, steps=4)


@pytest.fixture(scope="module")
def pipeline():
    return quick_pipeline()


@pytest.fixture(scope="module")
def records(pipeline):
    """Of one clip and one kind of edit, with the network's calls."""
    calls = []
    hook = pipeline.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    found = local.work(pipeline, local.Job(SEED, ("recolour",), SHORT))
    hook.remove()
    return {record["variant"]: record for record in found}, len(calls)


def test_every_variant_is_measured_and_each_mask_played_once(records):
    found, calls = records
    assert list(found) == [local.VAE, *(row.name for row in local.VARIANTS)]
    assert calls == 2 + 4 * 2, "one inversion; without a mask, the true one, the propagated one and its feathered one"
    assert all(record["seam"] >= 0 for record in found.values())


def test_only_kept_pixels_are_equal_to_the_bit(records):
    found, _ = records
    assert found["true mask, pixels kept"]["psnr_unedited"] == PSNR_CAP
    assert found["no mask, pixels kept outside the true one"]["psnr_unedited"] == PSNR_CAP
    for name in ("no mask", "true mask", "propagated mask", "propagated mask, pixels kept"):
        assert found[name]["psnr_unedited"] < PSNR_CAP
    assert found["true mask"]["psnr_unedited"] > found["no mask"]["psnr_unedited"]
    assert found["true mask"]["iou"] == 1 > found["propagated mask"]["iou"] > 0.5


def test_the_seam_is_looked_for_where_the_source_begins():
    chosen = example(SEED)
    hard, row = chosen.region, {row.name: row for row in local.VARIANTS}
    shape = torch.Size((8, 4, 12, 12))
    assert torch.equal(local.edge(row["true mask, pixels kept"], hard, shape), hard)
    assert torch.equal(local.edge(row["no mask"], hard, shape), hard)
    patches = local.edge(row["true mask"], hard, shape)
    assert torch.equal(patches[:, ::8, ::8], latent_mask(hard, shape)[:, 0]) and (patches >= hard).all()
    assert patches.unfold(1, 8, 8).unfold(2, 8, 8).flatten(3).std(-1).max() == 0


def test_an_edit_too_faint_for_the_default_threshold_has_a_mask_too():
    chosen = example(SEED)
    faint = replace(chosen, target=chosen.source + 0.05 * chosen.region[:, None])
    assert float((faint.edited_frame - faint.source[0]).abs().max()) < DEFAULT_MASK.threshold
    with pytest.raises(ValueError, match="lower it"):
        edit_mask(faint.source, faint.edited_frame)
    first = local.mask_of(faint)[0]
    assert (first[chosen.region[0] == 1] == 1).all() and 0 < first.mean() < 0.9


def test_masks_are_the_truths_and_the_edits():
    masks = local.make_masks(example(SEED))
    assert torch.equal(masks["true", 0], example(SEED).region)
    hard, soft = masks["propagated", 0] > 0, masks["propagated", local.FEATHER]
    assert (soft[hard] == 1).all() and ((soft > 0) & (soft < 1)).any()
    assert 0.5 < local.iou(masks["propagated", 0], masks["true", 0]) < 1
    assert local.iou(masks["true", 0], masks["true", 0]) == 1


def test_the_report_tells_means_over_clips(pipeline, tmp_path, capsys):
    folder = tmp_path / "results"
    made = local.main(2, "validation", ("recolour", "add"), 1, folder, lambda: pipeline, SHORT)
    text = (folder / "local.md").read_text(encoding="utf-8")
    assert len(made) == 2 * 2 * (1 + len(local.VARIANTS))
    assert text.count("| propagated mask, pixels kept |") == 3  # the mean, and each kind
    assert "a lead, not a result" in text and "followed through the source" in text
    data = json.loads((folder / "local.json").read_text(encoding="utf-8"))
    assert data["seeds"] == "validation" and data["mask"]["feathered"] == local.FEATHER
    assert len(data["records"]) == len(made) and not list(folder.glob("*.partial.jsonl"))
    assert "local" in capsys.readouterr().out


def test_the_command_passes_its_options(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(local, "main", lambda *a, **k: asked.append((a, k)))
    assert cli.main(["benchmark", "local"]) == 0
    options = ["--clips", "2", "--seeds", "validation", "--kinds", "add", "--workers", "3", "-o", str(tmp_path)]
    assert cli.main(["benchmark", "local", *options]) == 0
    assert [a for a, _ in asked] == [(local.CLIPS, "test", cli.EDITS), (2, "validation", ["add"])]
    assert asked[1][1] == {"workers": 3, "output": tmp_path}
