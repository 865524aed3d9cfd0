"""The settings: what is refused, and what the named sets are known to be."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace

import pytest

from rewind.pipelines.videoshop.settings import DEFAULT, NAIVE, PAPER, REFERENCE, VideoshopSettings

BAD = [
    ({"steps": 0}, "steps is 0; it must be at least 1"),
    ({"strength": 0.0}, "strength is 0.0; it must be above 0 and at most 1"),
    ({"strength": 1.1}, "strength is 1.1"),
    ({"strength": math.nan}, "strength is nan"),
    ({"sigma_min": 5.0, "sigma_max": 1.0}, "sigma_min is 5.0 and sigma_max 1.0; they must satisfy 0 < min < max"),
    ({"sigma_min": 0.0}, "0 < min < max"),
    ({"rho": 0.0}, "rho is 0.0"),
    ({"guess_above": "luck"}, 'guess_above is "luck"; one of extrapolation, random'),
    ({"guess_below": ""}, "guess_below"),
    ({"threshold": -1.0}, "threshold is -1.0"),
    ({"refine": -1}, "refine is -1"),
    ({"damping": 1.0}, "damping is 1.0; it must be at least 0 and below 1"),
    ({"tolerance": -1e-3}, "tolerance is -0.001"),
    ({"normalise": "all"}, 'normalise is "all"; one of channel, frame, off'),
    ({"rescale": 2.0}, "rescale is 2.0; it must be 0 to 1"),
    ({"first_guidance": -1.0}, "guidance is -1.0 to"),
    ({"last_guidance": -1.0}, "to -1.0; it must be at least 0"),
    ({"guidance_interval": (2.0, 1.0)}, r"guidance_interval is \(2.0, 1.0\)"),
    ({"guidance_interval": (-1.0, 1.0)}, "low first"),
    ({"augmentation": -0.1}, "augmentation is -0.1"),
    ({"fps": 0}, "fps is 0"),
    ({"motion_bucket": 2000}, "motion_bucket is 2000; it must be 0 to 1023"),
]


@pytest.mark.parametrize("bad, message", BAD, ids=[",".join(bad) for bad, _ in BAD])
def test_values_out_of_range_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        VideoshopSettings(**bad)
    with pytest.raises(ValueError, match=message):
        replace(REFERENCE, **bad)


def test_settings_are_values():
    assert VideoshopSettings() == DEFAULT and hash(PAPER) != hash(REFERENCE)
    with pytest.raises(FrozenInstanceError):
        DEFAULT.steps = 3


def test_the_reference_is_the_released_code():
    """Its run.py and model_utils.py: the numbers that the notes on the code list."""
    r = REFERENCE
    assert (r.steps, r.strength, r.sigma_min, r.sigma_max, r.rho) == (25, 0.55, 0.002, 700.0, 7.0)
    assert (r.guess_above, r.guess_below, r.threshold, r.refine) == ("extrapolation", "random", 1.0, 0)
    assert (r.normalise, r.normalise_condition, r.denormalise, r.rescale) == ("frame", True, False, 1.0)
    assert (r.first_guidance, r.last_guidance, r.guidance_interval) == (4.0, 4.0, (0.0, math.inf))
    assert (r.augmentation, r.shared_augmentation, r.fps, r.motion_bucket) == (0.2, False, 7, 127)


def test_the_papers_method_has_none_of_the_codes_quirks():
    p = PAPER
    assert (p.strength, p.guess_above, p.guess_below, p.refine) == (1.0, "extrapolation", "random", 0)
    assert (p.normalise, p.normalise_condition, p.denormalise, p.rescale) == ("channel", False, True, 1.0)
    assert p.shared_augmentation


def test_the_naive_set_changes_the_guess_alone():
    assert replace(NAIVE, guess_above=DEFAULT.guess_above, guess_below=DEFAULT.guess_below) == DEFAULT
    assert NAIVE.guess_above == NAIVE.guess_below == "current"
