"""Dreamix's corruption: exact sizes, no aliasing, and one s that means the same on every family of models."""

import math

import pytest
import torch

from rewind.pipelines.denoiser import EDM, EPS, FLOW, V, karras_sigmas
from rewind.pipelines.dreamix import corruption as C

PATHS = [EPS, V, EDM(), FLOW]
# Time s of the cosine schedule: log-SNR, k-diffusion's sigma, flow's sigma, worked out from alpha = cos(pi s / 2).
TABLE = [
    (0.3, 1.35, 0.51, 0.338),
    (0.5, 0.0, 1.00, 0.500),
    (0.75, -1.76, 2.41, 0.707),
    (0.9, -3.69, 6.31, 0.863),
    (0.95, -5.08, 12.71, 0.927),
]


@pytest.fixture
def clip():
    return torch.rand(8, 3, 48, 64, generator=torch.Generator().manual_seed(0))


# --- space ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "size", "expected"),
    [(4, None, (24, 40)), (1, None, (96, 160)), (3, None, (32, 53)), (9, (24, 40), (24, 40))],
)
def test_the_coarse_size_is_exact(factor, size, expected):
    assert C.coarse_size(96, 160, factor, size) == expected


def test_the_clip_keeps_its_size_and_range_and_loses_its_detail(clip):
    for options in ({"factor": 4}, {"size": (5, 7)}, {"factor": 1000}):
        coarse = C.degrade_space(clip, **options)
        assert coarse.shape == clip.shape and 0 <= coarse.min() and coarse.max() <= 1
    assert C.degrade_space(clip, 4).var() < 0.2 * clip.var()


def test_a_factor_of_one_changes_nothing(clip):
    assert C.degrade_space(clip, 1.0) is clip
    assert C.degrade_space(clip, 4.0, (48, 64)) is clip


@pytest.mark.parametrize("factor", [2, 3, 4, 4.7])
def test_a_fine_checkerboard_becomes_grey_and_not_a_coarser_pattern(factor):
    y, x = torch.meshgrid(torch.arange(96), torch.arange(96), indexing="ij")
    board = ((x + y) % 2).float().expand(2, 3, 96, 96)
    assert (C.degrade_space(board, factor) - 0.5).abs().max() < 0.05
    assert (board[..., :: round(factor), :: round(factor)] - 0.5).abs().min() == 0.5  # what plain subsampling shows


def test_a_gradient_stays_where_it_is():
    ramp = torch.linspace(0, 1, 96).expand(1, 3, 96, 96)
    inside = slice(12, -12)
    assert torch.allclose(C.degrade_space(ramp, 4)[..., inside], ramp[..., inside], atol=0.01)


# --- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stride", "temporal", "expected"),
    [
        (3, "hold", [0, 0, 0, 3, 3, 3, 6, 6]),
        (3, "linear", [0, 1, 2, 3, 4, 5, 6, 6]),
        (8, "linear", [0] * 8),
        (1, "linear", list(range(8))),
    ],
)
def test_frames_between_the_kept_ones_are_filled_in(stride, temporal, expected):
    levels = torch.arange(8.0)[:, None, None, None].expand(8, 3, 4, 4) / 7
    assert torch.allclose(C.degrade_time(levels, stride, temporal)[:, 0, 0, 0] * 7, torch.tensor(expected).float())


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"factor": 0.5}, r"1 \(not at all\)"),
        ({"size": (100, 10)}, "48x64"),
        ({"size": (0, 10)}, "1x1"),
        ({"stride": 0}, "stride"),
        ({"temporal": "guess"}, "hold, linear"),
    ],
)
def test_bad_settings_are_refused(clip, bad, words):
    with pytest.raises(ValueError, match=words):
        C.degrade(clip, **bad)


def test_bad_clips_are_refused(clip):
    with pytest.raises(ValueError, match="not empty"):
        C.degrade(clip[:0])
    with pytest.raises(ValueError, match="NaN"):
        C.degrade(clip * math.nan)


# --- noise ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("s", "log_snr", "sigma", "flow"), TABLE)
def test_the_noise_is_the_table_of_equal_log_snr(s, log_snr, sigma, flow):
    assert C.log_snr(s) == pytest.approx(log_snr, abs=0.006)
    assert C.sigma_at(s, EPS) == pytest.approx(sigma, abs=0.006)
    assert C.sigma_at(s, FLOW) == pytest.approx(flow, abs=0.0006)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("s", [0.1, 0.5, 0.8, 0.99])
def test_one_s_means_one_log_snr_on_every_family(path, s):
    sigma = C.sigma_at(s, path)
    assert 2 * math.log(path.signal(sigma) / sigma) == pytest.approx(C.log_snr(s), abs=1e-9)


def test_the_ends_of_s():
    assert all(C.sigma_at(0, path) == 0 for path in PATHS)
    assert C.sigma_at(1, FLOW) == 1 and C.sigma_at(1, EPS) == math.inf
    assert C.log_snr(0) == math.inf and C.log_snr(1) == -math.inf
    with pytest.raises(ValueError, match=r"0 \(none\) to 1"):
        C.sigma_at(1.1, EPS)


def test_a_schedule_begins_at_sigma_of_s_and_goes_on_below():
    whole = karras_sigmas(20, 0.03, 15)
    cut = C.sigmas_from(whole, 0.75, EPS)
    assert float(cut[0]) == pytest.approx(math.tan(0.375 * math.pi)) and cut[-1] == 0
    assert torch.equal(cut[1:], whole[whole < float(cut[0])])
    assert (cut.diff() < 0).all()
    assert torch.equal(C.sigmas_from(whole, 1.0, EPS), whole)
    assert torch.equal(C.sigmas_from(whole, 0.99, EPS), whole)  # sigma(0.99) = 64 lies above this schedule's top
    assert torch.equal(C.sigmas_from(whole, 0.0, EPS), torch.zeros(1, dtype=whole.dtype))


def test_a_level_that_is_sigma_of_s_is_stepped_to_once():
    flow = torch.linspace(1, 0, 11, dtype=torch.float64)
    cut = C.sigmas_from(flow, 0.5, FLOW)  # sigma(0.5) = 0.5, a level of the schedule
    assert torch.allclose(cut, flow[5:])


@pytest.mark.parametrize("path", PATHS)
def test_noise_at_the_ends(path, clip):
    noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(1))
    assert C.add_noise(clip, noise, C.sigma_at(0, path), path) is clip
    middle = C.add_noise(clip, noise, C.sigma_at(0.5, path), path)
    assert torch.allclose(middle, (clip + noise) * path.signal(C.sigma_at(0.5, path)), atol=1e-6)
    if path is FLOW:
        assert torch.equal(C.add_noise(clip, noise, C.sigma_at(1, path), path), noise)
