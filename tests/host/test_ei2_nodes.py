"""EI² Temporal Patch on the host's own text-to-image models: known answers, diffusers, and other patches."""

from __future__ import annotations

import one_shot
import pytest
import tiny_models
import torch
from one_shot import CFG, FAMILIES, PATCH, denoised, noisy, patch, prompt, random_weights

KINDS = ("FFAM", "sparse-causal", "first frame")


@pytest.fixture(scope="module")
def models(host):
    return {family: build() for family, build in FAMILIES.items()}


@pytest.fixture(scope="module")
def sd15(models):
    return models["sd15"]


@pytest.fixture(scope="module")
def weights(host, sd15):
    return random_weights(host, sd15)


def near(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def apart(a, b, least=2e-3):
    """Whether two estimates differ by more than rounding."""
    return float((a - b).abs().max()) > least


def ours(host, model):
    """Our patches on a MODEL: of self-attention by block, and of the middle."""
    patches, options = host.module("nodes.host.patches"), model.model_options["transformer_options"]
    attentions = options.get("patches_replace", {}).get("attn1", {})
    middle = options.get("patches", {}).get("middle_patch", [])
    return (
        {key: p for key, p in attentions.items() if isinstance(p, patches.FrameAttention)},
        [p for p in middle if isinstance(p, patches.TemporalPatch)],
    )


# --- what it leaves as it was ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_it_changes_a_copy_alone_and_at_strength_0_nothing(host, models, family):
    """Every family: FFAM and tuned modules do something; off, and on the input, all is bit for bit as it was."""
    model, x = models[family], noisy()
    tuned, before, plain = random_weights(host, model), one_shot.state(model), denoised(host, model, x)
    untrained, whole = patch(host, model), patch(host, model, weights=tuned)
    with_ffam, with_all = denoised(host, untrained, x), denoised(host, whole, x)
    assert apart(with_ffam, plain) and apart(with_all, with_ffam) and torch.isfinite(with_all).all()
    for off in (
        patch(host, model, strength=0.0),
        patch(host, model, strength=0.0, weights=tuned),
        patch(host, whole, strength=0.0),
    ):
        assert not off.patches and ours(host, off) == ({}, [])
        assert torch.equal(denoised(host, off, x), plain)
    assert torch.equal(denoised(host, model, x), plain) and not model.patches and not model.attachments
    assert model.model_options == {"transformer_options": {}}
    after = one_shot.state(whole)  # the host may keep the patched weights loaded; they are put back for another model
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(denoised(host, whole, x), with_all)


def test_it_does_not_stack(host, sd15, weights):
    """On a MODEL that carries one already, the new one takes its place: modules, queries' changes, attention."""
    x, other = noisy(), random_weights(host, sd15, seed=1, temporal="Tune-A-Video", attention="sparse-causal")
    first, second = patch(host, sd15, weights=weights), patch(host, sd15, weights=other)
    a, b = denoised(host, first, x), denoised(host, second, x)
    assert apart(a, b)
    again, instead = patch(host, first, weights=weights), patch(host, first, weights=other)
    assert torch.equal(denoised(host, again, x), a)
    assert torch.equal(denoised(host, instead, x), b), "the host must see that the weights are other ones"
    assert torch.equal(denoised(host, first, x), a), "what was patched again stays as it was"
    assert {len(patches) for patches in instead.patches.values()} == {1} and len(ours(host, instead)[1]) == 1
    bare = patch(host, first)
    assert not bare.patches and torch.equal(denoised(host, bare, x), denoised(host, patch(host, sd15), x))


def test_copies_of_a_patched_model_share_what_was_put_on(host, sd15, weights):
    """Every node behind it makes a copy; the tensors are not copied with it."""
    first = patch(host, sd15, weights=weights)
    second = first.clone()
    (attentions, (middle,)), (same, (also,)) = ours(host, first), ours(host, second)
    assert also is middle and all(same[key] is attentions[key] for key in attentions)
    (loaded,) = first.model_patches_models()
    assert [loaded] == second.model_patches_models()


# --- known answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(8, 8), (9, 5)])
@pytest.mark.parametrize("attention", KINDS)
def test_one_frame_and_a_still_clip_are_the_plain_model(host, sd15, attention, height, width):
    """The softmax over the same keys several times is that over them once; coarse ones are others, so factor 1."""
    patched = patch(host, sd15, attention=attention, coarse_factor=1)
    one = noisy(1, height, width)
    plain = denoised(host, sd15, one)
    near(denoised(host, patched, one), plain)
    near(denoised(host, patch(host, sd15, attention=attention, coarse_factor=2), one), plain)
    near(denoised(host, patched, one.expand(3, -1, -1, -1)), plain.expand(3, -1, -1, -1))
    moving = noisy(3, height, width)
    assert apart(denoised(host, patched, moving), denoised(host, sd15, moving))


def test_centred_modules_leave_a_still_clip_as_it_is(host, sd15):
    """Instance Centering takes everything from frames that are alike; LayerNorm does not."""
    still, x = noisy(1).expand(3, -1, -1, -1), {}
    for kind in ("STAM", "STAM with LayerNorm"):
        tuned = random_weights(host, sd15, temporal=kind, attention="own frame")
        patched = patch(host, sd15, weights=one_shot.modules_alone(tuned))
        x[kind] = denoised(host, patched, still)
    near(x["STAM"], denoised(host, sd15, still))
    assert apart(x["STAM with LayerNorm"], x["STAM"])


def test_frames_have_no_order_for_ffam_and_stam(host, sd15, weights):
    patched, x, order = patch(host, sd15, weights=weights), noisy(4, 9, 5), torch.tensor([2, 0, 3, 1])
    near(denoised(host, patched, x[order]), denoised(host, patched, x)[order])
    causal = patch(host, sd15, attention="sparse-causal")
    assert apart(denoised(host, causal, x[order]), denoised(host, causal, x)[order])


@pytest.mark.parametrize("family", FAMILIES)
def test_both_sides_of_guidance_are_clips_of_their_own(host, models, family):
    """The host puts them into one batch: guided is what each alone gives, put together."""
    model, x = models[family], noisy(3, 9, 5)
    patched, seen = patch(host, model, weights=random_weights(host, model)), []

    def look(apply_model, args):
        seen.append(len(args["cond_or_uncond"]))
        return apply_model(args["input"], args["timestep"], **args["c"])

    patched.set_model_unet_function_wrapper(look)
    positive, negative = (denoised(host, patched, x, prompt(model, seed)) for seed in (0, 1))
    guided = denoised(host, patched, x, prompt(model, 0), prompt(model, 1))
    assert seen == [1, 1, 2]
    near(guided, negative + CFG * (positive - negative))
    assert apart(positive, negative)


def test_windows_of_the_host_are_clips_of_their_own(host, sd15, weights):
    x, patched = noisy(6), patch(host, sd15, weights=weights)
    values = {"context_length": 3, "context_overlap": 0}
    if "causal_window_fix" in str(host.mappings["ContextWindowsManual"].INPUT_TYPES()):
        values["causal_window_fix"] = False  # it gives later windows a frame more
    (windowed,) = host.run_node("ContextWindowsManual", model=patched, **values)
    (around,) = host.run_node("ContextWindowsManual", model=sd15, **values)
    around = patch(host, around, weights=weights)
    halves = torch.cat([denoised(host, patched, half) for half in x.split(3)])
    near(denoised(host, windowed, x), halves)
    near(denoised(host, around, x), halves)
    assert apart(denoised(host, patched, x), halves)
    overlapping = {**values, "context_overlap": 1, "causal_window_fix": True}
    overlapping = {name: value for name, value in overlapping.items() if name in values}
    (windowed,) = host.run_node("ContextWindowsManual", model=patched, **overlapping)
    assert torch.isfinite(denoised(host, windowed, x, prompt(sd15), prompt(sd15, 1))).all()


def test_the_strength_is_in_between(host, sd15, weights):
    x = noisy()
    none, half, whole = (denoised(host, patch(host, sd15, weights=weights, strength=s), x) for s in (0.0, 0.5, 1.0))
    assert apart(half, none) and apart(half, whole)
    assert (half - none).norm() < (whole - none).norm() and (half - whole).norm() < (whole - none).norm()
    near(denoised(host, patch(host, sd15, weights=weights, strength=1e-6), x), none)


@pytest.mark.parametrize("place", ["input", "middle", "output"])
def test_the_chosen_blocks_alone_get_it(host, sd15, weights, place):
    patched = patch(host, sd15, weights=weights, blocks=place)
    attentions, (middle,) = ours(host, patched)
    wanted = {"input": {1, 3}, "middle": {0}, "output": {0, 1, 2, 3}}[place]
    assert attentions.keys() == {(place, number) for number in wanted}
    assert {name.partition("_")[0] for name in middle.inflation.temporal} == {place}
    assert len(middle.inflation.temporal) == len(wanted) and len(patched.patches) == 2 * len(wanted)
    assert {key.removeprefix("diffusion_model.").partition("_")[0] for key in patched.patches} == {place}
    assert len(patched.model_patches_models()[0].model) == len(wanted), "no others take memory"
    seen, x = [], noisy()
    for patch_ in (*attentions.values(), middle):
        patch_.inflation.observer = lambda name, x, y: seen.append(name)
    assert apart(denoised(host, patched, x), denoised(host, sd15, x))
    assert set(seen) == set(middle.inflation.temporal)


def test_as_tuned_is_the_attention_of_the_weights(host, sd15):
    """What the node's own inputs say counts otherwise, and where there are no weights."""
    x, tuned = noisy(), random_weights(host, sd15, attention="sparse-causal", factor=4)
    as_tuned = denoised(host, patch(host, sd15, weights=tuned, coarse_factor=1), x)
    near(as_tuned, denoised(host, patch(host, sd15, weights=tuned, attention="sparse-causal"), x), 0)
    assert apart(as_tuned, denoised(host, patch(host, sd15, weights=tuned, attention="FFAM"), x))
    fine, coarse = (denoised(host, patch(host, sd15, coarse_factor=factor), x) for factor in (1, 4))
    assert apart(fine, coarse, 1e-4)
    near(fine, denoised(host, patch(host, sd15, attention="FFAM", coarse_factor=1), x), 0)
    assert host.mappings[PATCH].INPUT_TYPES()["required"]["attention"][1]["options"][0] == "as tuned"


# --- against diffusers -----------------------------------------------------------------------------------------------

STRUCTURES = {  # the tiny families in diffusers' words
    "sd15": {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "block_out_channels": (32, 64)},
    "sd2": {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "block_out_channels": (32, 64)},
    "sdxl": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "block_out_channels": (32, 64, 64),
        "transformer_layers_per_block": (1, 2, 3),
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_blocks_have_diffusers_order_and_sizes(host, models, family):
    from diffusers import UNet2DConditionModel

    inflation, structure = host.module("pipelines.ei2.inflation"), STRUCTURES[family]
    up = tuple(name.replace("Down", "Up") for name in reversed(structure["down_block_types"]))
    with torch.device("meta"):
        theirs = UNet2DConditionModel(
            **structure, up_block_types=up, layers_per_block=1, cross_attention_dim=one_shot.width(models[family])
        )
    network = models[family].model.diffusion_model
    assert list(inflation.transformer_blocks(theirs)) == list(inflation.transformer_blocks(network))
    assert inflation.architecture(theirs) == inflation.architecture(network)


@pytest.fixture(scope="module")
def both(host, tmp_path_factory):
    """The embedded architecture with one set of random weights: the host's MODEL, and diffusers' behind its face."""
    setting = one_shot.demo(host, tmp_path_factory.mktemp("weights"))
    image, family = host.module("demo.text_to_image"), host.module("pipelines.ei2.family")
    network = image.build_image_unet().eval()
    read = host.module("demo.models").read_weights(setting.file)
    network.load_state_dict(host.module("demo.keys").image_from_checkpoint(read, image.TextToImageConfig()))
    return setting.model, family.TextToImage(network, None, None, None, image.alphas_cumprod())


@pytest.mark.parametrize(
    "settings, tuned, strength, place",
    [
        ({"temporal": "none"}, False, 1.0, "all"),
        ({"temporal": "none", "attention": "sparse-causal"}, False, 0.6, "all"),
        ({}, True, 1.0, "all"),
        ({"axes": "frames + space", "factor": 3}, True, 0.4, "output"),
        ({"temporal": "Tune-A-Video", "attention": "first frame"}, True, 1.0, "all"),
        ({"temporal": "STAM without spectral normalisation", "attention": "own frame"}, True, 1.0, "input"),
    ],
    ids=str,
)
def test_the_hosts_inflated_network_is_diffusers(host, both, settings, tuned, strength, place):
    model, family = both
    pipeline, inflation = host.module("pipelines.ei2.pipeline"), host.module("pipelines.ei2.inflation")
    weights = random_weights(host, model, **settings) if tuned else None
    x, sigma = noisy(3, 9, 5), float(model.get_model_object("model_sampling").sigmas[600])
    chosen = inflation.InflationSettings(**settings)
    about = pipeline.EI2Settings(patch_strength=strength, place=place)
    with torch.no_grad(), pipeline.EI2Pipeline(family).patched(len(x), weights, about, chosen):
        theirs = family.denoise(x, torch.full((len(x),), sigma), prompt(model)[0][0])
    given = {"attention": chosen.attention, "coarse_factor": chosen.factor, "weights": weights}
    given |= {"strength": strength, "blocks": place}
    near(denoised(host, patch(host, model, **given), x, sigma=sigma), theirs)
    with torch.no_grad():
        plain = family.denoise(x, torch.full((len(x),), sigma), prompt(model)[0][0])
    assert apart(theirs, plain)


# --- beside other patches --------------------------------------------------------------------------------------------

LAYER = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q"


def lora_on(model):
    """A LoRA by the host's own function, and the change of the weight that it is."""
    import comfy.sd

    up, down = (torch.randn(64, 4, generator=torch.Generator().manual_seed(seed)) / 4 for seed in (9, 10))
    lora = {f"{LAYER}.lora_up.weight": up, f"{LAYER}.lora_down.weight": down.T.contiguous()}
    return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0], up @ down.T


def test_it_adds_to_a_lora(host, sd15, weights):
    """In either order: the network with both changes in its own weights, and the modules."""
    x, (with_lora, change) = noisy(), lora_on(sd15)
    after, before = patch(host, with_lora, weights=weights), lora_on(patch(host, sd15, weights=weights))[0]
    baked = one_shot.sd15()
    for name, diff in weights.queries().items():
        baked.model.diffusion_model.get_parameter(f"{name}.weight").data.add_(diff)
    baked.model.get_parameter(f"{LAYER}.weight").data.add_(change)
    expected = denoised(host, patch(host, baked, weights=one_shot.modules_alone(weights)), x)
    near(denoised(host, after, x), expected)
    near(denoised(host, before, x), expected)
    assert apart(expected, denoised(host, patch(host, sd15, weights=weights), x))
    off = patch(host, after, strength=0.0)
    assert off.patches == with_lora.patches
    assert torch.equal(denoised(host, off, x), denoised(host, with_lora, x))


def test_a_controlnet_applies(host, sd15):
    net, image = tiny_models.controlnet(host), torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))

    def controlled(strength):
        values = {"positive": prompt(sd15), "negative": prompt(sd15, 1), "control_net": net, "image": image}
        return host.run_node(
            "ControlNetApplyAdvanced", **values, strength=strength, start_percent=0.0, end_percent=1.0
        )[:2]

    patched, x = patch(host, sd15), noisy()
    near(denoised(host, patched, x[:1], *controlled(1.0)), denoised(host, sd15, x[:1], *controlled(1.0)))
    with_both = denoised(host, patched, x, *controlled(1.0))
    near(denoised(host, patched, x, *controlled(1e-9)), denoised(host, patched, x, prompt(sd15), prompt(sd15, 1)))
    assert apart(with_both, denoised(host, sd15, x, *controlled(1.0)))
    assert apart(with_both, denoised(host, patched, x, prompt(sd15), prompt(sd15, 1)))


def test_patches_of_cross_attention_run_as_they_would(host, sd15, weights):
    """As an IP-Adapter replaces it: attention to the text, and something added to what that gives."""
    from comfy.ldm.modules.attention import optimized_attention

    x, plain = noisy(), patch(host, sd15, weights=weights)
    for added in (0.0, 1.0):
        seen = []

        def attend(q, k, v, extra, added=added, seen=seen):
            seen.append((len(q), extra["block"]))
            return optimized_attention(q, k, v, extra["n_heads"], attn_precision=extra["attn_precision"]) + added

        adapter = sd15.clone()
        adapter.set_model_attn2_replace(attend, "input", 1)
        result = denoised(host, patch(host, adapter, weights=weights), x)
        assert seen == [(3, ("input", 1))]
        assert apart(result, denoised(host, plain, x)) == bool(added)


def test_patches_of_what_self_attention_gives_run_behind_it(host, sd15):
    """One that takes all of it away leaves nothing to tell frames together from frames alone."""
    x, mute = noisy(), sd15.clone()
    mute.set_model_attn1_output_patch(lambda n, extra: 0 * n)
    assert torch.equal(denoised(host, patch(host, mute), x), denoised(host, mute, x))
    assert apart(denoised(host, mute, x), denoised(host, sd15, x))


def grounding(model):
    """A model as GLIGEN's is: it rides on the CONDITIONING, and makes a middle patch of its own for every batch."""
    import comfy.model_patcher

    class Boxes(torch.nn.Module):
        def set_position(self, shape, params, device):
            return lambda x, extra: 1.5 * x

    patcher = comfy.model_patcher.ModelPatcher(Boxes(), load_device=model.load_device, offload_device="cpu")
    return [[prompt(model)[0][0], {**prompt(model)[0][1], "gligen": ("position", patcher, [])}]]


def test_other_middle_patches_keep_their_place(host, sd15, weights):
    x = noisy()

    def louder(x, extra):
        return 1.5 * x

    before = sd15.clone()
    before.set_model_patch(louder, "middle_patch")
    before = patch(host, before, weights=weights)
    after = patch(host, sd15, weights=weights)
    after.set_model_patch(louder, "middle_patch")
    first, second = (denoised(host, model, x) for model in (before, after))
    assert apart(first, second) and apart(first, denoised(host, patch(host, sd15, weights=weights), x))
    near(denoised(host, patch(host, sd15, weights=weights), x, grounding(sd15)), second)
    near(denoised(host, patch(host, before, weights=weights), x), first, 0)
    off = patch(host, after, strength=0.0)
    assert off.model_options["transformer_options"]["patches"]["middle_patch"] == [louder]


def test_guidance_by_perturbed_attention_still_perturbs(host, sd15):
    """The host's node takes the self-attention of the middle away, in a pass of its own."""
    patched, x = patch(host, sd15), noisy()
    (guided,) = host.run_node("PerturbedAttentionGuidance", model=patched, scale=3.0)
    perturbed = patched.clone()
    perturbed.set_model_attn1_replace(lambda q, k, v, extra: v, "middle", 0)
    plain, without = denoised(host, patched, x), denoised(host, perturbed, x)
    assert apart(plain, without, 1e-3)
    near(denoised(host, guided, x), plain + 3 * (plain - without), 1e-3)
