"""What tells one model from another: precision does not, a fine-tuning and another architecture do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rewind.pipelines.fingerprint import LAYERS, VALUES, fingerprint


def network(seed: int = 0, width: int = 48, layers: int = 20) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = {f"block.{i}.weight": torch.randn(width, 64, generator=generator) for i in range(layers)}
    return weights | {f"block.{i}.bias": torch.zeros(width) for i in range(layers)}


def test_a_model_is_itself_in_every_precision():
    own = fingerprint("Net", network())
    assert own.weights.dtype == torch.float32 and len(own.weights) <= LAYERS * VALUES
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        own.check(fingerprint("Net", {name: w.to(dtype) for name, w in network().items()}), "it")


def test_another_order_of_the_layers_is_the_same_model():
    shuffled = dict(reversed(network().items()))
    fingerprint("Net", network()).check(fingerprint("Net", shuffled), "it")


def test_a_fine_tuning_is_another_model():
    tuned = {name: w + 0.02 * torch.randn(w.shape) for name, w in network().items()}
    with pytest.raises(ValueError, match="the clip was made with other weights of the same architecture"):
        fingerprint("Net", network()).check(fingerprint("Net", tuned), "the clip")


def test_weights_that_are_not_numbers_are_another_model():
    with pytest.raises(ValueError, match="other weights"):
        fingerprint("Net", network()).check(fingerprint("Net", {n: w * torch.nan for n, w in network().items()}), "it")


@pytest.mark.parametrize(
    ("kind", "other", "message"),
    [
        ("Net", network(width=49), "made with a model of other layers, and this is Net"),
        ("Net", network(layers=19), "a model of other layers"),
        ("Net", {f"x{name}": w for name, w in network().items()}, "a model of other layers"),
        ("Web", network(), "made with another kind of model, Net, and this is Web"),
    ],
)
def test_another_architecture_is_refused(kind, other, message):
    with pytest.raises(ValueError, match=message):
        fingerprint("Net", network()).check(fingerprint(kind, other), "it")


def test_weights_of_one_value_and_of_many_are_taken_evenly():
    weights = {"a": torch.arange(1000.0).reshape(10, 100), "b": torch.full((1, 1), 7.0)}
    values = fingerprint("Net", weights).weights
    assert values[0] == 0 and values[VALUES - 1] == 999 and (values[VALUES:] == 7).all()
    steps = values[:VALUES].diff()
    assert steps.max() - steps.min() <= 1


def test_a_model_whose_weights_cannot_be_read_is_known_by_its_layers():
    with torch.device("meta"):
        weights = {"a": torch.empty(3, 4)}
    hidden = fingerprint("Net", weights | {"table": torch.zeros(3, 3, dtype=torch.int8), "bias": torch.zeros(3)})
    assert len(hidden.weights) == 0
    hidden.check(hidden, "it")
    with pytest.raises(ValueError, match="a model of other layers"):
        hidden.check(fingerprint("Net", weights), "it")


def test_another_number_of_values_is_another_model():
    own = fingerprint("Net", network())
    for weights in (own.weights[:-1], own.weights[:0], own.weights.repeat(2)):
        with pytest.raises(ValueError, match="100.0% apart"):
            own.check(replace(own, weights=weights), "it")
