"""What ComfyUI's context windows tell Wan image-to-video of the clip's first frame (docs/models.md, note 9)."""

from __future__ import annotations

import native_models
import pytest
import torch
from context_windows import known_inputs, windowed

FRAMES, LENGTH = 5, 3
GIVEN = slice(0, 4)  # the channels of Wan's condition that say where a frame is given; the picture's follow


@pytest.fixture(scope="module")
def models(host):
    return native_models.Models(host)


def told_conditions(host, model, family, **settings):
    """The condition [1, 20, frames, h, w] of each network call of one step: as a whole, then window by window."""
    spying, seen = model.clone(), []

    def note(apply_model, args):
        seen.append(args["c"]["c_concat"].clone())
        return apply_model(args["input"], args["timestep"], **args["c"])

    spying.set_model_unet_function_wrapper(note)
    latent = {"samples": torch.randn(1, 16, FRAMES, 8, 8, generator=torch.Generator().manual_seed(3))}
    for patched in (spying, windowed(host, spying, context_length=LENGTH, dim=2, **settings)):
        host.run_node(
            "RewindEDMInversion",
            model=patched,
            positive=native_models.conditioning(family, frames=FRAMES),
            latent=latent,
            sigmas=native_models.sigmas(patched, family, 1),
            strength=1.0,
        )
    return seen


@pytest.mark.parametrize("family", ["wan21_i2v", "wan22_i2v"])
def test_only_the_windows_that_hold_the_first_frame_are_told_of_it(host, models, family):
    whole, first, second = told_conditions(host, models[family], family)
    assert whole[:, GIVEN, 0].all() and not whole[:, GIVEN, 1:].any()
    assert torch.equal(first, whole[:, :, :LENGTH])
    assert not second[:, GIVEN].any()
    assert torch.equal(second, whole[:, :, -second.shape[2] :]), "with the frame before it, where the host adds one"


@pytest.mark.parametrize("family", ["wan21_i2v", "wan22_i2v"])
@pytest.mark.parametrize("added", [True, False], ids=["a frame added", "none added"])
def test_a_retained_condition_tells_every_window(host, models, family, added):
    """The place is the added frame's, where there is one: the host takes that off the result."""
    if "cond_retain_index_list" not in known_inputs(host):
        pytest.skip(f"ComfyUI {host.version} has no such setting in its node")
    settings = {"cond_retain_index_list": "0", "causal_window_fix": added}
    whole, first, second = told_conditions(host, models[family], family, **settings)
    assert torch.equal(first, whole[:, :, :LENGTH]) and second.shape[2] == LENGTH + added
    assert torch.equal(second[:, :, 0], whole[:, :, 0]), "picture and place of the first frame"
    assert not second[:, GIVEN, 1:].any()
