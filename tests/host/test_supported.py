"""docs/models.md says what works with which model: held to what the nodes take and refuse."""

from __future__ import annotations

import re

import comfy_host
import fine_tuning
import native_models
import pytest
import torch
from native_models import FAMILIES

TEXT = (comfy_host.ROOT / "docs" / "models.md").read_text(encoding="utf-8")
NOTES = TEXT[TEXT.index("\n1. ") :]
QUOTED = [" ".join(quote.split()) for quote in re.findall(r'"([^"]+)"', NOTES)]


def table() -> dict[str, dict[str, str]]:
    """The table by family and column."""
    heads, _, *rows = [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in TEXT.splitlines() if line.startswith("|")
    ]
    return {row[0]: dict(zip(heads, row, strict=True)) for row in rows}


def said(family: str, column: str) -> bool:
    """Whether the table says yes."""
    answer = table()[FAMILIES[family].title][column].split(" ")[0]
    return {"yes": True, "no": False}[answer]


@pytest.fixture(scope="module")
def models(host):
    return native_models.Models(host)


def test_its_families_are_those_that_are_tested(host):
    assert list(table()) == [entry.title for entry in FAMILIES.values()]
    for family, entry in FAMILIES.items():
        assert all(said(family, column) for column in ("inversion, round trip", "masks", "context windows"))
        hosts = table()[entry.title]["ComfyUI"].split(", ")
        assert hosts == (["0.33.0"] if entry.since >= (0, 33) else ["0.7.0", "0.33.0"])
        assert native_models.there(host, family) == (host.version in hosts)


def test_every_note_is_there():
    assert len(QUOTED) > 6 and all(len(quote) > 15 for quote in QUOTED)
    numbers = set(re.findall(r"\((\d)\)", "".join(line for line in TEXT.splitlines() if line.startswith("|"))))
    assert numbers == set(re.findall(r"^(\d)\. ", TEXT, re.MULTILINE))


@pytest.mark.parametrize("family", FAMILIES)
def test_first_frame_edits_are_for_models_that_take_one(host, models, family):
    checks, model = host.module("nodes.host.checks"), models[family]
    takes = checks.takes_first_frame(model) or checks.is_wan_image_to_video(model)
    assert takes == said(family, "first-frame edit")


@pytest.mark.parametrize("family", FAMILIES)
def test_ei2_takes_what_it_says(host, models, family):
    if said(family, "EI²"):
        (patched,) = host.run_node("RewindEI2TemporalPatch", model=models[family])
        assert patched is not models[family]
        return
    with pytest.raises(ValueError) as refusal:
        host.run_node("RewindEI2TemporalPatch", model=models[family])
    assert "Stable Diffusion 1.x, 2.x and SDXL" in str(refusal.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_dreamix_trains_what_it_says(host, models, family):
    """On a text, as Dreamix Prompt makes it; a refusal is one that the notes quote."""
    model, vae = models[family], native_models.load_vae(host, family)
    frames, height, width = native_models.pixels(family)
    images = torch.rand(frames, height, width, 3, generator=torch.Generator().manual_seed(4))
    ((text, extra),) = native_models.conditioning(family)
    token = [[text, {name: value for name, value in extra.items() if "concat" not in name}]]
    inputs = {"model": model, "vae": vae, "images": images, "token": token, **fine_tuning.QUICK, "steps": 1}
    if said(family, "Dreamix") and host.release >= (0, 33):
        _, lora, *_ = host.run_node(fine_tuning.NODE, **inputs)
        assert lora and all(torch.isfinite(value).all() for value in lora.values())
        return
    with pytest.raises(ValueError) as refusal:
        host.run_node(fine_tuning.NODE, **inputs)
    assert any(quote in str(refusal.value) for quote in QUOTED), refusal.value


def test_dreamix_corrupt_refuses_cogvideox(host, models):
    vae = native_models.load_vae(host, "cogvideox")
    images = torch.rand(9, 64, 64, 3, generator=torch.Generator().manual_seed(4))
    with pytest.raises(ValueError, match="CogVideoX samples in coordinates of its own"):
        host.run_node("RewindDreamixCorrupt", images=images, model=models["cogvideox"], vae=vae)
