"""`rewind benchmark cost` times the nodes through the host's guider, and counts every call of the network."""

from __future__ import annotations

import pytest
import tiny_models


@pytest.fixture
def result(host, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    timing, builders = host.module("nodes.host.timing"), host.module("nodes.host.models")
    file = tmp_path / "weights.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tiny_models.checkpoint(host, seed=5).items()}, file)
    monkeypatch.setattr(timing, "load_demo_models", lambda: builders.load_demo_models(file))
    inversion, denoising = host.module("nodes.videoshop"), host.module("nodes.denoising")
    return timing.measure(inversion.EDMInversion, denoising.SVDDenoise, runs=2, steps=3)


def test_every_side_is_timed_and_none_calls_the_network_more_often_than_it_steps(host, result):
    assert set(result["seconds"]) == {"the host's euler", "EDM Inversion", "SVD Denoise"}
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in result["seconds"].values())
    assert result["evaluations"] == {side: [3, 3] for side in result["seconds"]}
    assert result["host"] == host.version


def test_the_two_samplers_of_the_host_are_called_by_one_name(host):
    timing, cost = host.module("nodes.host.timing"), host.module("benchmarks.cost")
    assert cost.HOST_EULER == timing.HOST_EULER
