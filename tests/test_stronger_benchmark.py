"""`rewind benchmark stronger`: its candidates against closed forms, and its table."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from denoisers import Gaussian, Network, clip, relative
from quick import quick_pipeline

from rewind import cli
from rewind.benchmarks import stronger
from rewind.benchmarks.strengthening import (
    edit,
    mask_of,
    noised,
    not_inverted,
    renormalised,
    sample_difference,
    sample_with_residuals,
    stored,
)
from rewind.demo.clip import SEEDS, example
from rewind.pipelines.denoiser import V, karras_sigmas
from rewind.pipelines.evaluation.metrics import PSNR_CAP
from rewind.pipelines.videoshop.denoising import sample_euler
from rewind.pipelines.videoshop.inversion import sample_edm_inversion
from rewind.pipelines.videoshop.masks import edit_mask

SEED = SEEDS["validation"]
SHORT = tuple(replace(each, settings=replace(each.settings, steps=4)) for each in stronger.CANDIDATES)
BY_NAME = {each.name: each for each in stronger.CANDIDATES}


@pytest.fixture(scope="module")
def pipeline():
    return quick_pipeline()


@pytest.fixture(scope="module")
def trip():
    """A clip, the levels of its way back, and what its inversion passed, from the clip up."""
    x, sigmas, states = clip(), karras_sigmas(6, 0.02, 20.0), [clip()]
    options = {"guess_above": "extrapolation", "guess_below": "current"}
    sample_edm_inversion(
        Network(), x, sigmas.flip(0), callback=lambda s: states.append(s["x"]), disable=True, **options
    )
    return x, sigmas, torch.stack(states)


# --- the difference of two branches -----------------------------------------------------------------------------------


def test_one_condition_twice_gives_the_source_back_to_the_bit(trip):
    x, sigmas, states = trip
    drawn = torch.Generator().manual_seed(1)
    for source in (stored(states, x), noised(x, sigmas, lambda: torch.randn(x.shape, generator=drawn).to(x))):
        seen = Network()
        assert torch.equal(sample_difference(seen, Network(), source, x, sigmas), x)
        assert seen.sigmas == pytest.approx(sigmas[:-1].tolist())  # once a level, never at 0
    assert not torch.equal(sample_euler(Network(), states[-1], sigmas, disable=True), x)


def test_the_difference_of_two_gaussians_is_their_closed_form():
    """Of data N(m, s^2) and N(m + d, s^2) it is, from any source, d (1 - s / sqrt(s^2 + sigma^2)) at the end."""
    x, s, wanted, errors = clip(), 0.7, 0.4, []
    for steps in (40, 80, 160):
        sigmas = torch.linspace(4, 0, steps + 1, dtype=torch.float64)
        branches = Gaussian(V, s, 0.3 + wanted), Gaussian(V, s, 0.3)
        found = sample_difference(*branches, noised(x, sigmas, lambda: clip(seed=3)), x, sigmas)
        errors.append(relative(found - x, torch.full_like(x, wanted * (1 - s / math.hypot(s, 4)))))
    assert errors[-1] < 0.01 and all(1.7 < a / b < 2.3 for a, b in zip(errors, errors[1:])), errors


def test_with_the_stored_move_for_the_source_branch_it_is_plain_euler(trip):
    x, sigmas, states = trip
    levels, moves = sigmas.tolist(), {}
    for i, (high, low) in enumerate(zip(levels, levels[1:])):
        x_high, x_low = stored(states, x)(i), stored(states, x)(i + 1)
        moves[high] = x_high - (x_low - x_high) / (low / high - 1)
    edited = Network(seed=5)
    found = sample_difference(edited, lambda _, sigma: moves[float(sigma[0])], stored(states, x), x, sigmas)
    torch.testing.assert_close(found, sample_euler(edited, states[-1], sigmas, disable=True))


def test_residuals_everywhere_are_the_difference_and_nowhere_plain_euler(trip):
    x, sigmas, states = trip
    branches, source = (Network(seed=5), Network()), stored(states, x)
    everywhere, nowhere = (
        sample_with_residuals(*branches, source, sigmas, torch.full((1, 1, 1, 1), keep, dtype=x.dtype))
        for keep in (1.0, 0.0)
    )
    torch.testing.assert_close(everywhere, sample_difference(*branches, source, x, sigmas))
    torch.testing.assert_close(nowhere, sample_euler(branches[0], states[-1], sigmas, disable=True))
    assert relative(everywhere, nowhere) > 0.01


def test_drawn_noise_belongs_to_its_level():
    x, sigmas = clip(), torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64)
    drawn = iter((clip(seed=1), clip(seed=2)))
    states = noised(x, sigmas, lambda: next(drawn))
    assert torch.equal(states(0), x + 3 * clip(seed=1)) and torch.equal(states(1), x + clip(seed=2))


# --- the inverted noise -----------------------------------------------------------------------------------------------


def test_renormalised_noise_has_the_moments_of_drawn_noise(pipeline):
    source = example(SEED).source
    inversion = pipeline.invert(source, SHORT[0].settings, torch.Generator().manual_seed(0), keep_trajectory=True)
    clean, sigma = inversion.trajectory[0], float(inversion.sigmas[0])
    for over, axes in (("channel", (0, 2, 3)), ("frame", (2, 3))):
        new = renormalised(inversion, clean, over)
        z, before = ((each.latent - clean) / sigma for each in (new, inversion))
        torch.testing.assert_close(z.mean(axes), torch.zeros_like(z.mean(axes)), atol=1e-4, rtol=0)
        torch.testing.assert_close(z.std(axes), torch.ones_like(z.std(axes)), atol=1e-4, rtol=0)
        assert not torch.allclose(before.std(axes), z.std(axes), atol=0.02)
        assert torch.equal(new.trajectory, inversion.trajectory)


# --- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["difference of branches, stored trajectory", "difference of branches, drawn noise"])
def test_an_edit_that_changes_nothing_gives_the_clip_back(pipeline, name):
    """In the pipeline's own conditions too: the difference is of the first frames alone."""
    chosen = example(SEED)
    unedited, candidate = replace(chosen, target=chosen.source), {each.name: each for each in SHORT}[name]
    if "drawn" in name:
        inversion = not_inverted(pipeline, chosen.source, candidate.settings, SEED)
    else:
        generator = torch.Generator().manual_seed(SEED)
        inversion = pipeline.invert(chosen.source, candidate.settings, generator, keep_trajectory=True)
    assert torch.equal(edit(pipeline, inversion, unedited, candidate, SEED), pipeline.encode(chosen.source))
    assert not torch.equal(edit(pipeline, inversion, chosen, candidate, SEED), pipeline.encode(chosen.source))


def test_an_edit_too_faint_for_the_default_mask_is_masked_all_the_same():
    clear, faint = example(SEED), example(SEED + 5, "background")
    assert torch.equal(mask_of(clear), edit_mask(clear.source, clear.edited_frame))
    with pytest.raises(ValueError, match="differs"):
        edit_mask(faint.source, faint.edited_frame)
    assert 0.5 < float(mask_of(faint).mean()) <= 1


def test_what_needs_no_inversion_has_the_noise_of_one(pipeline):
    source, settings = example(SEED).source, SHORT[0].settings
    inversion = pipeline.invert(source, settings, torch.Generator().manual_seed(3), keep_trajectory=True)
    free = not_inverted(pipeline, source, settings, 3)
    assert torch.equal(free.augmentation_noise, inversion.augmentation_noise)
    assert torch.equal(free.trajectory[0], inversion.trajectory[0]) and torch.equal(free.sigmas, inversion.sigmas)
    assert free.evaluations == 0


def test_every_candidate_costs_nearly_the_same(pipeline):
    """At their full length, with the network's own calls."""
    records = stronger.work(pipeline, stronger.Job(SEED, ("recolour",), stronger.CANDIDATES))
    found = {record["variant"]: record for record in records}
    assert len(records) == len(found) and set(found) == {stronger.VAE, stronger.SOURCE, *BY_NAME}
    assert found[stronger.OWN]["evaluations"] == 26
    assert all(24 <= found[name]["evaluations"] <= 27 for name in BY_NAME)
    assert len({found[name]["psnr_edit"] for name in BY_NAME}) == len(BY_NAME)
    assert found[stronger.SOURCE]["psnr_unedited"] == PSNR_CAP and not found[stronger.SOURCE]["alive"]


def test_alive_is_the_true_edit_and_neither_the_source_nor_ruins():
    chosen = example(SEED)
    truth, source, half = chosen.target, chosen.source, torch.lerp(chosen.source, chosen.target, 0.6)
    late = torch.cat([truth[:-1], source[-1:]])
    assert stronger.measure(truth, chosen)["alive"] and stronger.measure(half, chosen)["alive"]
    assert not stronger.measure(source, chosen)["alive"]
    assert not stronger.measure(torch.lerp(source, truth, 0.4), chosen)["alive"]
    assert not stronger.measure(late, chosen)["alive"], "only the last frame counts"
    # Nearer to the true edit than to the source, but further than the source is.
    beyond = (truth + 1.5 * (truth - source)).clamp(-1, 2)
    assert not stronger.measure(beyond, chosen)["alive"]
    assert stronger.measure(late, chosen)["psnr_edit"] > stronger.measure(late, chosen)["psnr_last"]


def records_of(name, edited, last=None, unedited=(30.0, 30.0, 30.0)):
    rows = zip(edited, last or edited, unedited, strict=True)
    keys = ("psnr_edit", "psnr_last", "psnr_unedited")
    return [
        {"seed": seed, "variant": name, "alive": True} | dict(zip(keys, row, strict=True))
        for seed, row in enumerate(rows)
    ]


def test_only_what_is_outside_the_noise_wins():
    base = records_of("base", (20.0, 15.0, 10.0))
    better = (21.0, 16.1, 10.9)
    assert stronger.wins(records_of("a", better), base)
    assert not stronger.wins(records_of("a", (26.0, 14.0, 11.0)), base), "a lead inside the noise"
    assert not stronger.wins(records_of("a", better, last=(20.0, 15.0, 10.0)), base), "nothing on the last frame"
    assert not stronger.wins(records_of("a", better, unedited=(28.0, 27.9, 28.1)), base), "worse outside the edit"
    assert stronger.wins(records_of("a", better, unedited=(28.0, 34.0, 30.0)), base)


def test_the_finalists_are_one_of_each_family():
    chosen = stronger.finalists()
    assert [each.name for each in chosen] == [each.name for each in stronger.CANDIDATES if each in chosen]
    assert len(chosen) == len(stronger.FINALISTS) and chosen[0].name == stronger.OWN
    assert [each.family for each in chosen] == list(dict.fromkeys(each.family for each in stronger.CANDIDATES))


def test_the_report_tells_gains_and_bounds(pipeline, tmp_path, capsys):
    folder = tmp_path / "results"
    made = stronger.main(2, "validation", ("recolour", "add"), 1, folder, lambda: pipeline, SHORT)
    assert len(made) == 2 * (2 + len(SHORT)) and {r["kind"] for r in made if r["seed"] == SEED + 1} == {"add"}
    text = (folder / "stronger_validation.md").read_text(encoding="utf-8")
    name = "noise renormalised by channel"
    assert text.count(f"| {name} |") == 2 + 2, "the results, the gains, each kind"
    assert "a lead, not a result" in text and "--seeds validation --clips 2`" in text
    own, base = stronger.of(made, name), stronger.of(made, stronger.OWN)
    gain = sum(a["psnr_edit"] - b["psnr_edit"] for a, b in zip(own, base, strict=True)) / 2
    assert f"| {name} | {gain:+.2f} (" in text
    data = json.loads((folder / "stronger_validation.json").read_text(encoding="utf-8"))
    assert data["seeds"] == "validation" and len(data["records"]) == len(made)
    assert data["candidates"][name]["way"] == "renormalised by channel"
    assert not list(folder.glob("*.partial.jsonl")) and "Stronger edits" in capsys.readouterr().out


def test_on_test_seeds_the_finalists_are_measured(pipeline, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(stronger, "work", lambda _, job: asked.append(job) or [])
    monkeypatch.setattr(stronger, "report", lambda *_: "")
    stronger.main(2, "test", ("add",), 1, tmp_path, lambda: pipeline)
    assert [job.candidates for job in asked] == [stronger.finalists()] * 2
    assert asked[0].seed == SEEDS["test"] and (tmp_path / "stronger.md").is_file()


def test_the_command_passes_its_options(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(stronger, "main", lambda *a, **k: asked.append((a, k)))
    assert cli.main(["benchmark", "stronger"]) == 0
    options = ["--clips", "2", "--seeds", "validation", "--kinds", "add", "--workers", "3", "-o", str(tmp_path)]
    assert cli.main(["benchmark", "stronger", *options]) == 0
    assert [a for a, _ in asked] == [(stronger.CLIPS, "test", cli.EDITS), (2, "validation", ["add"])]
    assert asked[1][1] == {"workers": 3, "output": tmp_path}
