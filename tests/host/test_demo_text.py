"""The embedded text-to-video model's two faces: the host's classes and diffusers' give the same on the same weights."""

from __future__ import annotations

import pytest
import tiny_models
import torch

FRAMES = 3
EXACT, CLOSE = {"rtol": 0, "atol": 1e-5}, {"rtol": 0, "atol": 2e-4}
PROMPTS = [
    "",
    "a red circle moves right quickly on a blue background, at night",
    "A Sks  SHAPE moves up",
    "Zażółć, 日本",
]


@pytest.fixture(scope="module", params=["random", "stored"])
def file(host, request, tmp_path_factory):
    """The model's file: random weights as they would be shipped, and what is shipped."""
    return tiny_models.model_file(host, "rewind_demo_t2v", request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def ours(host, file):
    """MODEL, CLIP and VAE of the host."""
    return host.module("nodes.host.models").load_demo_text_models(file)


@pytest.fixture(scope="module")
def theirs(host, file):
    """unet, vae, text_encoder and tokenizer of diffusers and transformers."""
    return host.module("demo.text").load_text_components(file)


def encoded(host, clip, prompt):
    return host.run_node("CLIPTextEncode", clip=clip, text=prompt)[0]


@pytest.fixture
def encode(host, ours):
    """CLIP Text Encode on the host's CLIP."""
    return lambda prompt: encoded(host, ours[1], prompt)


def headless(host, theirs, *prompts):
    _, _, text_encoder, tokenizer = theirs
    return host.module("pipelines.text").encode_prompts(tokenizer, text_encoder, list(prompts))


# --- the text encoder ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_tokens_are_the_same(host, ours, theirs, prompt):
    (chunk,) = ours[1].tokenize(prompt)["l"]
    (wanted,) = host.module("demo.text").tokens(theirs[3], [prompt])
    assert [token for token, *_ in chunk] == wanted.tolist()


def test_the_text_encoders_are_one(host, theirs, encode):
    for prompt in PROMPTS:
        ((context, extra),) = encode(prompt)
        assert "concat_latent_image" not in extra and torch.isfinite(extra["pooled_output"]).all()
        torch.testing.assert_close(context, headless(host, theirs, prompt), **EXACT)
    contexts = headless(host, theirs, *PROMPTS)
    assert float((contexts[1] - contexts[2]).abs().max()) > 0.1, "prompts tell something apart"


def test_weights_in_a_prompt_move_its_tokens_away_from_the_empty_prompt(host, theirs, encode):
    plain, empty = headless(host, theirs, "a red circle", "")
    weighted = encode("a (red:1.5) circle")[0][0][0]
    torch.testing.assert_close(weighted[2], empty[2] + 1.5 * (plain[2] - empty[2]), **EXACT)
    others = [i for i in range(len(plain)) if i != 2]
    torch.testing.assert_close(weighted[others], plain[others], **EXACT)


def test_a_long_prompt_is_encoded_in_pieces_by_the_host_and_cut_without_it(host, theirs, encode):
    prompt = ", ".join(["a red circle moves right"] * 6)
    assert encode(prompt)[0][0].shape == (1, 64, 64)
    assert headless(host, theirs, prompt).shape == (1, 32, 64)


@torch.inference_mode()
def test_the_hosts_nodes_for_prompts_work(host, ours, theirs, encode):
    """CLIP Set Last Layer against transformers' hidden states, and Conditioning Concat."""
    (earlier,) = host.run_node("CLIPSetLastLayer", clip=ours[1], stop_at_clip_layer=-2)
    _, _, text_encoder, tokenizer = theirs
    ids = host.module("demo.text").tokens(tokenizer, ["a red circle"])
    inner = getattr(text_encoder, "text_model", text_encoder)
    wanted = inner.final_layer_norm(text_encoder(ids, output_hidden_states=True).hidden_states[-2])
    torch.testing.assert_close(encoded(host, earlier, "a red circle")[0][0], wanted, **EXACT)
    both = host.run_node("ConditioningConcat", conditioning_to=encode("a red"), conditioning_from=encode("circle"))
    assert torch.equal(both[0][0][0], torch.cat([encode("a red")[0][0], encode("circle")[0][0]], 1))


# --- the video model -------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_the_denoisers_are_one(host, ours, theirs, encode):
    """The host's whole path (scalings, zeros for a first frame, ids that nobody names) against the headless one."""
    model, unet = ours[0], theirs[0]
    x = torch.randn(FRAMES, 4, 12, 12, generator=torch.Generator().manual_seed(4))
    context = headless(host, theirs, PROMPTS[1])
    added = torch.tensor([host.module("pipelines.dreamix.families").PLAIN_IDS])
    denoiser = host.module("pipelines.videoshop.pipeline").SVDDenoiser(unet, torch.zeros_like(x), context, added)
    for sigma in (40.0, 2.0):
        sampling = host.module("nodes.host.sampling")
        guider = sampling.guider(model, encode(PROMPTS[1]))
        once = sampling.DirectSampler(lambda denoiser, x, sigmas, **_: denoiser(x, sigmas[:1].expand(len(x))))
        latent = model.model.process_latent_out(x)
        result = sampling.sample(guider, once, torch.tensor([sigma, 0.0]), latent, torch.zeros_like(x), 0)
        found = model.model.process_latent_in(result)
        torch.testing.assert_close(found, denoiser(x, torch.full((FRAMES,), sigma)), **CLOSE)
    assert not torch.allclose(found, x, atol=0.05), "the network does something"


def test_a_prompt_becomes_a_clip(host, ours, encode):
    """CLIP Text Encode, KSampler on an empty latent of 8 images, VAE Decode: the host's nodes alone."""
    model, _, vae = ours
    (latent,) = host.run_node("EmptyLatentImage", width=96, height=96, batch_size=8)

    def clip(prompt):
        inputs = {"model": model, "latent_image": latent, "seed": 1, "steps": 2, "cfg": 3.0}
        names = {"sampler_name": "euler", "scheduler": "karras"}
        samples = host.run_node("KSampler", positive=encode(prompt), negative=encode(""), **inputs, **names)[0]
        return host.run_node("VAEDecode", samples=samples, vae=vae)[0]

    first, again, other = clip("a red circle"), clip("a red circle"), clip("a blue square moves up")
    assert first.shape == (8, 96, 96, 3) and torch.isfinite(first).all()
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_host_makes_equal_copies_of_the_model(host, ours):
    """As its training, its weight hooks and its nodes for several GPUs ask for."""
    model = ours[0]
    make, arguments = model.cached_patcher_init
    copies = [make(*arguments), make(*arguments, disable_dynamic=True)]
    if host.release >= (0, 33):
        copies.append(model.clone(force_deepcopy=True))
    weights = model.model.diffusion_model.state_dict()
    takes_first_frame = host.module("nodes.host.checks").takes_first_frame
    for copy in copies:
        copied = copy.model.diffusion_model.state_dict()
        assert copy.model is not model.model and copied.keys() == weights.keys()
        assert all(torch.equal(weights[name], copied[name]) for name in weights)
        assert not takes_first_frame(copy)


@torch.inference_mode()
def test_the_node_loads_what_is_stored(host):
    tiny_models.ensure_weights(host, host.pack)
    model, clip, vae = host.run_node("RewindDemoTextToVideo")
    _, _, its_vae = host.run_node("RewindDemoImageToVideo")
    builders, models = host.module("nodes.host.models"), host.module("demo.models")
    stored = builders.load_demo_unet(models.TEXT_WEIGHTS, models.ImageToVideoConfig()).model.state_dict()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.model.state_dict().items())
    assert clip.encode_from_tokens(clip.tokenize("a circle")).shape == (1, 32, 64)
    image = torch.rand(2, 96, 96, 3)
    assert torch.equal(vae.encode(image), its_vae.encode(image))


def test_files_that_cannot_be_are_refused(host, tmp_path):
    builders, weights = host.module("nodes.host.models"), tiny_models.text_checkpoint(host)
    with pytest.raises(FileNotFoundError, match="reinstall Rewind"):
        builders.load_demo_text_models(tmp_path / "none.safetensors")
    without = {name: tensor for name, tensor in weights.items() if not name.endswith("layers.1.mlp.fc1.bias")}
    with pytest.raises(ValueError, match=r"missing.*layers\.1\.mlp\.fc1\.bias"):
        builders.load_demo_text_models(tiny_models.save_weights(without, tmp_path / "without.safetensors"))
    (name,) = (name for name in weights if name.endswith("token_embedding.weight"))
    short = weights | {name: weights[name][:100]}
    with pytest.raises(ValueError, match=r"embedding is \(100, 64\), not \(606, 64\)"):
        builders.load_demo_text_models(tiny_models.save_weights(short, tmp_path / "short.safetensors"))


# --- the Videoshop wing on it ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def contracting(host):
    """MODEL and CLIP with random weights, on which an inversion's fixed point is found."""
    builders, config = host.module("nodes.host.models"), host.module("demo.models").ImageToVideoConfig()
    parts = host.module("demo.keys").split_checkpoint(tiny_models.text_checkpoint(host))
    return builders.build_model(parts["unet"], config, by_text=True), builders.build_clip(parts["text_encoder"])


def test_a_clip_is_inverted_and_comes_back_under_a_prompt(host, contracting):
    model, clip = contracting
    positive, negative = encoded(host, clip, "a red circle moves right"), encoded(host, clip, "")
    latent = {"samples": torch.randn(FRAMES, 4, 12, 12, generator=torch.Generator().manual_seed(6))}
    sigmas = tiny_models.sigmas(model, 6, "karras")
    inverted, *_, inversion = host.run_node(
        "RewindEDMInversion", model=model, positive=positive, latent=latent, sigmas=sigmas, refine=8
    )
    guidance = {"first_guidance": 1.0, "last_guidance": 1.0}
    pair = {"positive": positive, "negative": negative}
    (back,) = host.run_node("RewindSVDDenoise", model=model, inversion=inversion, **pair, **guidance)
    spread = float(latent["samples"].std())
    assert float((back["samples"] - latent["samples"]).abs().mean()) < 0.02 * spread
    assert float((inverted["samples"] - latent["samples"]).abs().mean()) > 5 * spread


def test_conditions_of_the_other_model_are_refused(host, contracting):
    """The embedded models are of one class and one width: only what a CONDITIONING holds tells which it is for."""
    by_text_model, clip = contracting
    latent = {"samples": torch.randn(FRAMES, 4, 12, 12)}
    by_picture = [[torch.ones(1, 1, 64), {"concat_latent_image": torch.zeros(1, 4, 12, 12)}]]
    wide = [[torch.ones(1, 77, 768), {}]]
    for model, positive, message in (
        (by_text_model, by_picture, "a text alone tells this MODEL: connect CLIP Text Encode"),
        (by_text_model, wide, "width 768, this MODEL takes 64: connect the CLIP that came with the MODEL"),
        (tiny_models.svd(host), encoded(host, clip, "a circle"), "positive holds no first frame: connect Videoshop"),
        (tiny_models.svd(host), wide, "connect the CLIP_VISION that came with the MODEL"),
    ):
        sigmas = tiny_models.sigmas(model, 2, "karras")
        with pytest.raises(ValueError, match=message):
            host.run_node("RewindEDMInversion", model=model, positive=positive, latent=latent, sigmas=sigmas)
