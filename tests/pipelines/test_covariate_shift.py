"""The covariate-shift probe against shifts that are known beforehand."""

from __future__ import annotations

import math
from statistics import fmean

import pytest
import tiny_text_image as tiny
import torch
from torch import Tensor

from rewind.pipelines.ei2.covariate_shift import (
    Probe,
    Reading,
    by_block,
    by_block_and_level,
    by_level,
    overall,
    shift,
)
from rewind.pipelines.ei2.inflation import Inflation, InflationSettings
from rewind.pipelines.ei2.stam import TEMPORALS


def features(seed: int = 0) -> Tensor:
    """[4 frames, 30 places, 5 channels] of different means and spreads."""
    x = torch.randn(4, 30, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x * torch.tensor([0.5, 1.0, 2.0, 3.0, 4.0]) + torch.tensor([0.0, -1.0, 5.0, 2.0, 1.0])


def test_no_change_is_no_shift():
    assert shift(features(), features()) == (0.0, 0.0)


def test_a_constant_vector_shifts_the_mean_by_its_share_of_the_spread_and_no_variance():
    x, moved = features(), torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0], dtype=torch.float64)
    expected = float(moved.norm() / x.flatten(0, 1).std(0, correction=0).norm())
    mean, variance = shift(x, x + moved)
    assert mean == pytest.approx(expected, rel=1e-9) and variance == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("a", [0.25, 3.0, -2.0])
def test_a_factor_shifts_every_variance_by_twice_its_logarithm_and_the_mean_with_it(a):
    x = features()
    mean, variance = shift(x, a * x)
    assert variance == pytest.approx(2 * abs(math.log(abs(a))), rel=1e-6)
    flat = x.flatten(0, 1)
    assert mean == pytest.approx(abs(a - 1) * float(flat.mean(0).norm() / flat.std(0, correction=0).norm()), rel=1e-9)
    centred = x - flat.mean(0)
    assert shift(centred, a * centred)[0] == pytest.approx(0, abs=1e-9)


def test_the_variance_shift_is_the_mean_over_channels():
    x = features() - features().flatten(0, 1).mean(0)
    factors = torch.tensor([1.0, 2.0, 0.5, 4.0, 1.0], dtype=torch.float64)
    assert shift(x, factors * x)[1] == pytest.approx((2 + 2 + 4) * math.log(2) / 5, rel=1e-6)


def test_a_channel_that_never_varies_counts_nothing():
    x = features()
    x[..., 1] = 7.0
    mean, variance = shift(x, 2 * x)
    assert variance == pytest.approx(2 * math.log(2) * 4 / 5, rel=1e-6) and math.isfinite(mean)
    assert shift(torch.zeros_like(x), torch.zeros_like(x)) == (0.0, 0.0)


def test_half_precision_is_measured_in_double():
    x = features().half()
    assert shift(x, x + 1)[0] == pytest.approx(shift(x.double(), (x + 1).double())[0], rel=1e-12)


def test_the_probe_keeps_each_block_with_its_noise_level():
    probe, x = Probe(), features()
    for probe.sigma in (2.0, 0.5):
        for block, a in (("first", 2.0), ("second", 1.0)):
            probe.observer(block, x, a * x)
    assert [(r.block, r.sigma) for r in probe.readings] == [
        ("first", 2.0),
        ("second", 2.0),
        ("first", 0.5),
        ("second", 0.5),
    ]
    assert probe.blocks() == ["first", "second"]
    assert [r.variance_shift for r in probe.readings] == pytest.approx([2 * math.log(2), 0] * 2, rel=1e-6)


def test_readings_are_averaged_block_by_block_and_over_all():
    readings = [Reading("a", 1.0, 0.1, 1.0), Reading("b", 1.0, 0.5, 3.0), Reading("a", 2.0, 0.3, 2.0)]
    assert by_block(readings) == {"a": (pytest.approx(0.2), 1.5), "b": (0.5, 3.0)}
    assert overall(readings) == (pytest.approx(0.3), 2.0)
    with pytest.raises(ValueError, match="nothing was measured: the model has no temporal modules"):
        overall([])


def test_readings_are_told_apart_by_level_and_average_to_those_of_the_blocks():
    values = {("a", 9.0): (0.1, 1.0), ("b", 9.0): (0.5, 3.0), ("a", 0.5): (0.3, 2.0), ("b", 0.5): (0.9, 7.0)}
    readings = [Reading(*where, *shifts) for where, shifts in values.items()]
    cells = by_block_and_level(readings)
    assert {(name, sigma): shifts for name, levels in cells.items() for sigma, shifts in levels.items()} == values
    assert list(cells) == ["a", "b"] and all(list(levels) == [9.0, 0.5] for levels in cells.values()), "as taken"
    for name, shifts in by_block(readings).items():
        assert [fmean(column) for column in zip(*cells[name].values())] == pytest.approx(shifts)
    levels = by_level(readings)
    assert list(levels) == [9.0, 0.5]
    assert levels[9.0] == pytest.approx((0.3, 2.0)) and levels[0.5] == pytest.approx((0.6, 4.5))


def shifts(kind: str, x: Tensor, frames: int) -> tuple[float, float]:
    """Of a module with weights that do something, as an inflation shows it to a probe."""
    network, probe = tiny.unet(), Probe()
    settings = InflationSettings(temporal=kind)
    inflation = Inflation(settings, tiny.BLOCKS, tiny.temporal(network, settings), observer=probe.observer)
    for module in inflation.temporal.values():
        torch.nn.init.zeros_(module.to_q.weight)
    inflation.residual(tiny.BLOCKS[0], x, frames)
    return overall(probe.readings)


def test_uniform_attention_shifts_nothing_behind_instance_centering_and_something_behind_layer_norm():
    x = torch.randn(4, 24, 16, generator=torch.Generator().manual_seed(1)) + torch.linspace(-2, 3, 16)
    for kind, parts in TEMPORALS.items():
        mean, variance = shifts(kind, x, 4)
        if parts.centred:
            assert mean == pytest.approx(0, abs=1e-5) and variance == pytest.approx(0, abs=1e-5)
        else:
            assert mean > 0.1 and variance > 0.01
