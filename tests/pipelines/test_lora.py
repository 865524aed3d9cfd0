"""Low-rank adapters: fresh ones change nothing, and their files are what the host's and diffusers' loaders read."""

import pytest
import tiny_text_video as tiny
import torch

from rewind.pipelines.dreamix.lora import (
    LoRA,
    from_diffusers,
    from_state,
    target_layers,
    to_diffusers,
    to_host,
)
from rewind.pipelines.dreamix.temporal import is_temporal


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", params=tiny.NAMES)
def network(request):
    return tiny.family(request.param).network


def test_every_attention_of_every_family_gets_adapters(network):
    names = list(target_layers(network))
    blocks = {name for name, module in network.named_modules() if hasattr(module, "to_q") and hasattr(module, "to_v")}
    assert blocks and len(names) == 4 * len(blocks)
    both = target_layers(network, "attention and feed-forward")
    assert len(both) > len(names) and set(names) < set(both)
    separate = any(is_temporal(name) for name, _ in network.named_modules())
    assert any(is_temporal(name) for name in names) == separate


def test_bad_targets_networks_and_ranks_are_told(network):
    with pytest.raises(ValueError, match='the targets are "all"'):
        target_layers(network, "all")
    with pytest.raises(ValueError, match="no layer that LoRA is known to go on"):
        target_layers(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="the rank is 0"):
        LoRA(target_layers(network), 0, generator())


def test_a_fresh_adapter_changes_nothing_and_a_trained_one_adds_its_product():
    layer = torch.nn.Linear(5, 3)
    x = torch.randn(4, 5, generator=generator())
    lora = LoRA({"a.to_q": layer}, 2, generator(), alpha=4.0)
    plain = layer(x)
    with lora:
        assert torch.equal(layer(x), plain)
        lora.up[0].data = torch.randn(3, 2, generator=generator(1))
        expected = plain + 2.0 * x @ lora.down[0].T @ lora.up[0].T
        assert torch.allclose(layer(x), expected, atol=1e-6)
        lora.strength = 0.0
        assert torch.equal(layer(x), plain)
    lora.strength = 1.0
    assert torch.equal(layer(x), plain)  # taken off


def test_the_state_goes_round_and_equal_seeds_draw_equally(network):
    layers = target_layers(network)
    first, again, other = (LoRA(layers, 3, generator(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters()))
    for up in other.up:
        up.data.normal_(generator=generator(5))
    back = from_state(network, other.state())
    assert back.rank == 3 and back.alpha == 3.0
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), other.parameters()))


def test_weights_of_another_network_or_rank_are_told(network):
    layers = target_layers(network)
    with pytest.raises(ValueError, match="not of this network and rank 2"):
        LoRA(layers, 2, generator()).load(LoRA(layers, 3, generator()).state())
    with pytest.raises(ValueError, match="not of a Linear"):
        from_state(torch.nn.Linear(2, 2), LoRA(layers, 2, generator()).state())
    with pytest.raises(ValueError, match="none found"):
        from_state(network, {})


def test_spatial_parameters_are_those_of_layers_that_do_not_mix_frames(network):
    lora = LoRA(target_layers(network), 2, generator())
    temporal = sum(is_temporal(name) for name in lora.layers)
    assert len(lora.spatial()) == 2 * (len(lora.layers) - temporal)
    assert len(list(lora.parameters())) == 2 * len(lora.layers)


def test_the_names_of_the_files():
    lora = LoRA({"blocks.0.attn1.to_q": torch.nn.Linear(4, 4)}, 2, generator(), alpha=1.0)
    lora.up[0].data.fill_(2.0)
    host = to_host(lora.state())
    assert set(host) == {
        f"diffusion_model.blocks.0.attn1.to_q.{x}" for x in ("lora_up.weight", "lora_down.weight", "alpha")
    }
    theirs = to_diffusers(lora.state(), "transformer")
    assert set(theirs) == {f"transformer.blocks.0.attn1.to_q.lora_{x}.weight" for x in "AB"}
    back = from_diffusers(theirs, "transformer")
    product = back["blocks.0.attn1.to_q.lora_up.weight"] @ back["blocks.0.attn1.to_q.lora_down.weight"]
    assert torch.allclose(product, 0.5 * lora.up[0] @ lora.down[0])  # alpha / rank is folded in
    assert float(back["blocks.0.attn1.to_q.alpha"]) == 2.0
