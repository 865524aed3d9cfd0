"""Statistics of records of edits, by clip: the edits and runs of one clip are not independent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from ..pipelines.evaluation.metrics import lower_bound

Record = dict[str, Any]


def per_clip(records: Sequence[Record], key: str) -> list[float]:
    """The mean over a source clip's edits and runs, for each clip in turn: of what is right or wrong the share.

    What is NaN does not count; NaN where nothing else is left of a clip.
    """
    clips: dict[int, list[float]] = {}
    for record in records:
        values = clips.setdefault(record["seed"], [])
        if not math.isnan(value := float(record[key])):
            values.append(value)
    return [fmean(values) if values else math.nan for values in clips.values()]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Two-sided 95 % interval of the mean over clips (Student's t; edits of one clip are not independent)."""
    if len(values) < 2:
        return math.nan, math.nan
    reach = fmean(values) - lower_bound(values, 0.975)
    return fmean(values) - reach, fmean(values) + reach


def estimate(
    records: Sequence[Record], key: str, digits: int = 2, limits: tuple[float, float] = (-math.inf, math.inf)
) -> str:
    """ "0.47 (0.35 to 0.59)", mean and interval over clips, cut to limits; a dash where there is nothing."""
    values = [value for value in per_clip(records, key) if not math.isnan(value)]
    if not values:
        return "-"
    low, high = interval(values)
    told = f"{fmean(values):.{digits}f}"
    if math.isnan(low):
        return told
    return f"{told} ({max(low, limits[0]):.{digits}f} to {min(high, limits[1]):.{digits}f})"


def share(records: Sequence[Record], key: str) -> str:
    """The same of a share, in 0..1."""
    return estimate(records, key, 2, (0.0, 1.0))


def margin(own: Sequence[Record], base: Sequence[Record], key: str = "success") -> tuple[float, float]:
    """Mean and lower 95 % bound of how far one method's mean is above another's, clip by clip."""
    pairs = zip(per_clip(own, key), per_clip(base, key), strict=True)
    differences = [a - b for a, b in pairs if not math.isnan(a - b)]
    if not differences:
        return math.nan, math.nan
    return fmean(differences), lower_bound(differences) if len(differences) > 1 else math.nan
