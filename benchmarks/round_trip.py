"""The round trip without an edit: how well a clip comes back, for each guess, against what it costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from ..demo.clip import SEEDS, example
from ..pipelines.evaluation.metrics import psnr
from ..pipelines.videoshop.diagnostics import inverted_noise, noise_statistics
from ..pipelines.videoshop.pipeline import VideoshopPipeline
from ..pipelines.videoshop.settings import DEFAULT, VideoshopSettings
from . import runner
from .editing import ClipEditor

# Name -> (guess above the threshold, guess below it); None: the host's own naive inversion.
GUESSES: dict[str, tuple[str, str] | None] = {
    "the host's own nodes (naive, lower level)": None,
    "current latent (naive)": ("current", "current"),
    "noise extrapolation, random below (paper)": ("extrapolation", "random"),
    "noise extrapolation, current below": ("extrapolation", "current"),
    "noise extrapolation, last direction below": ("extrapolation", "last_direction"),
    "last direction": ("last_direction", "last_direction"),
}
STEPS = (10, 25, 50)
REFINEMENTS = (1, 3)  # at the base's own number of steps


@dataclass(frozen=True)
class Trip:
    """One row of the table."""

    guess: str
    settings: VideoshopSettings

    @property
    def name(self) -> str:
        refined = f", refined {self.settings.refine} times" if self.settings.refine else ""
        return f"{self.guess}, {self.settings.steps} steps{refined}"


def trips(base: VideoshopSettings) -> list[Trip]:
    """Each guess at each number of steps, and refined. No guidance: with it no inversion can return exactly."""
    plain = replace(base, first_guidance=1.0, last_guidance=1.0, rescale=0.0, refine=0, normalise_condition=False)
    rows = []
    for name, guesses in GUESSES.items():
        chosen = plain if guesses is None else replace(plain, guess_above=guesses[0], guess_below=guesses[1])
        rows += [Trip(name, replace(chosen, steps=steps)) for steps in STEPS]
        rows += [Trip(name, replace(chosen, refine=count)) for count in REFINEMENTS if guesses is not None]
    return rows


@torch.no_grad()
def work(pipeline: VideoshopPipeline, seed: int, rows: Sequence[Trip]) -> list[dict[str, Any]]:
    """All trips of one clip: a record each, and one of the VAE alone."""
    source = example(seed).source
    editor, latents = ClipEditor(pipeline, source, seed), pipeline.encode(source)
    picture = pipeline.decode(latents)
    records = [{"seed": seed, "trip": "VAE alone", "psnr_source": psnr(picture, source)}]
    for trip in rows:
        inversion = editor.invert(trip.settings, "host" if GUESSES[trip.guess] is None else "inversion")
        back, _ = editor.play(inversion, source[0], replace(trip.settings, denormalise=True))
        clean = latents if inversion.normalisation is None else inversion.normalisation.apply(latents)
        noise = inverted_noise(inversion.latent, clean, float(inversion.sigmas[0]), 1.0)
        deviation, correlation = noise_statistics(noise, clean)
        shown = pipeline.decode(back)
        records.append(
            {
                "seed": seed,
                "trip": trip.name,
                "evaluations": inversion.evaluations,
                "latent_error": float((back - latents).norm() / latents.norm()),
                "psnr_vae": psnr(shown, picture),
                "psnr_source": psnr(shown, source),
                "noise_deviation": float(deviation.mean()),
                "noise_correlation": float(correlation.mean()),
            }
        )
    return records


# Column -> (key of a record, digits)
COLUMNS = {
    "relative latent error": ("latent_error", 4),
    "to the VAE's own picture, dB": ("psnr_vae", 2),
    "to the source, dB": ("psnr_source", 2),
    "std of the noise found": ("noise_deviation", 3),
    "its correlation with the clip": ("noise_correlation", 3),
}


def report(records: Sequence[dict[str, Any]], base: VideoshopSettings, seeds: str) -> str:
    """The table as Markdown."""
    names = list(dict.fromkeys(record["trip"] for record in records))
    rows = []
    for name in names:
        own = [record for record in records if record["trip"] == name]
        cells = [runner.mean_sd((r[key] for r in own if key in r), digits) for key, digits in COLUMNS.values()]
        calls = [r["evaluations"] for r in own if "evaluations" in r]
        rows.append([name, f"{fmean(calls):g}" if calls else "0", *cells])
    clips = len({record["seed"] for record in records})
    return (
        f"# Round trip without an edit\n\n{clips} clips of {seeds} seeds, `rewind benchmark videoshop`: inverted and "
        f"played again from their own first frame, without guidance, strength {base.strength:g} of a Karras schedule "
        f"from sigma {base.sigma_max:g}, normalisation {base.normalise}. Mean ± standard deviation over clips.\n\n"
        + runner.table(["inversion", "evaluations of the inversion", *COLUMNS], rows)
    )


def main(
    clips: int = 16,
    seeds: str = "test",
    workers: int | None = None,
    output: Path = runner.RESULTS,
    load: Callable[[], Any] = runner.embedded_pipeline,
    base: VideoshopSettings = DEFAULT,
) -> list[dict[str, Any]]:
    """Measure, print and save."""
    numbers = [SEEDS[seeds] + index for index in range(clips)]
    parts = runner.run(partial(work, rows=trips(base)), numbers, "round trip", workers, load)
    records = [record for part in parts for record in part]
    data = {"seeds": seeds, "machine": runner.machine(), "base": asdict(base), "records": records}
    runner.save("round_trip", report(records, base, seeds), data, output)
    return records
