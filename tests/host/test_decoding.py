"""VAE Decode in Chunks beside the host's own decodes, on the embedded model's temporal decoder."""

from __future__ import annotations

import pytest
import tiny_models
import torch

NODE = "RewindChunkedDecode"
FRAMES = 12


@pytest.fixture(scope="module")
def vae(host):
    """With the embedded VAE's classes and random weights, whose frames depend on each other more than trained ones'."""
    config, keys = host.module("demo.models").ImageToVideoConfig(), host.module("demo.keys")
    weights = keys.split_checkpoint(tiny_models.checkpoint(host))["vae"]
    return host.module("nodes.host.models").build_vae(weights, config)


@pytest.fixture(scope="module")
def samples():
    return {"samples": torch.randn(FRAMES, 4, 6, 8, generator=torch.Generator().manual_seed(3))}


@pytest.fixture
def told(host, monkeypatch):
    texts = []
    monkeypatch.setattr(host.module("nodes.host.costs"), "tell", lambda node_id, node, text, **_: texts.append(text))
    return texts


def decode(host, vae, samples, **inputs):
    return host.run_node(NODE, samples=samples, vae=vae, **inputs)[0]


def test_all_at_once_is_the_hosts_own_decode(host, vae, samples, told):
    (wanted,) = host.run_node("VAEDecode", samples=samples, vae=vae)
    assert torch.equal(decode(host, vae, samples, frames_at_once=FRAMES), wanted)
    assert told == [f"12 frames at once; about {_size(host, vae, samples, 12)} on cpu (as ComfyUI reckons)"]


def _size(host, vae, samples, frames):
    size = frames * host.module("nodes.host.encoding").frame_bytes(vae, samples["samples"])
    return host.module("pipelines.evaluation.memory").in_words(size)


def test_chunks_overlap_and_go_over_into_each_other(host, vae, samples, told):
    with torch.inference_mode():
        first, second = vae.decode(samples["samples"][:7]), vae.decode(samples["samples"][5:])
    shown = decode(host, vae, samples, frames_at_once=7, overlap=2)
    assert torch.equal(shown[:5], first[:5]) and torch.equal(shown[7:], second[2:])
    for i, weight in ((5, 1 / 3), (6, 2 / 3)):
        torch.testing.assert_close(shown[i], torch.lerp(first[i], second[i - 5], weight), rtol=0, atol=1e-6)
    assert told[0].startswith("12 frames in 2 chunks of at most 7, neighbours share 2; about ")


def test_overlap_hides_the_seam_that_the_hosts_chunks_show(host, vae, samples, monkeypatch):
    """How much the decoder's error against the whole clip jumps from one frame to the next, at the joins."""
    (whole,) = host.run_node("VAEDecode", samples=samples, vae=vae)
    encoding = host.module("nodes.host.encoding")

    def jump(shown, joins):
        steps = ((shown - whole).diff(dim=0)).square().mean((1, 2, 3)).sqrt()
        return float(max(steps[i - 1] for i in joins))

    # Where memory is short the host cuts without overlap, here after 6 frames.
    import comfy.model_management as management

    per_frame = encoding.frame_bytes(vae, samples["samples"])
    with monkeypatch.context() as short:
        short.setattr(management, "get_free_memory", lambda *_, **__: 6.5 * per_frame)
        (cut,) = host.run_node("VAEDecode", samples=samples, vae=vae)
    assert torch.equal(cut, decode(host, vae, samples, frames_at_once=6, overlap=0)), "that is its cut"
    blended = decode(host, vae, samples, frames_at_once=7, overlap=2)
    assert jump(cut, [6]) > 1e-3
    assert jump(blended, [5, 6, 7]) < 0.8 * jump(cut, [6])


def test_what_does_not_fit_is_taken_in_smaller_chunks_and_told(host, vae, samples, told, monkeypatch):
    import comfy.model_management as management

    encoding = host.module("nodes.host.encoding")
    per_frame = encoding.frame_bytes(vae, samples["samples"])
    wanted = decode(host, vae, samples, frames_at_once=5, overlap=2)
    told.clear()
    monkeypatch.setattr(management, "get_free_memory", lambda *_, **__: 5.5 * per_frame)
    assert torch.equal(decode(host, vae, samples, frames_at_once=FRAMES, overlap=2), wanted)
    assert f"; 12 at once would take {_size(host, vae, samples, 12)}, more than can be had" in told[0]
    monkeypatch.setattr(management, "get_free_memory", lambda *_, **__: 0.5 * per_frame)
    assert decode(host, vae, samples, frames_at_once=FRAMES, overlap=2).shape == wanted.shape
    assert "12 frames in 12 chunks of at most 1" in told[1]


def test_the_host_is_asked_to_make_room_for_a_chunk(host, vae, samples, monkeypatch):
    import comfy.model_management as management

    asked, load = [], management.load_models_gpu
    monkeypatch.setattr(
        management,
        "load_models_gpu",
        lambda models, **rest: (asked.append(rest["memory_required"]), load(models, **rest))[1],
    )
    per_frame = host.module("nodes.host.encoding").frame_bytes(vae, samples["samples"])
    decode(host, vae, samples, frames_at_once=7, overlap=2)
    assert asked[0] == 7 * per_frame


def test_a_decoder_that_sees_frames_alone_needs_no_overlap(host, samples, told):
    import comfy.sd
    from comfy.ldm.models.autoencoder import AutoencoderKL

    widths = {"z_channels": 4, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1, 1, 1]}
    widths |= {"double_z": True, "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
    network = AutoencoderKL(embed_dim=4, ddconfig=widths)
    tiny_models.randomise(network, 1, 1.0, network.decoder.conv_out, 0.3)
    plain = comfy.sd.VAE(
        sd=network.state_dict(), config={"params": {"embed_dim": 4, "ddconfig": widths}}, dtype=torch.float32
    )
    (wanted,) = host.run_node("VAEDecode", samples=samples, vae=plain)
    torch.testing.assert_close(decode(host, plain, samples, frames_at_once=5, overlap=2), wanted, rtol=0, atol=1e-5)
    assert told[0].startswith("12 frames in 3 chunks of at most 4, neighbours share 0; ")


def test_encoding_needs_no_chunks(host, vae):
    """The encoder takes every frame for itself: cut anywhere, as the host cuts, it gives the same."""
    images = torch.rand(6, 48, 64, 3, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        whole, alone = vae.encode(images), torch.cat([vae.encode(image[None]) for image in images])
    torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-5)


def test_no_more_than_half_of_a_chunk_is_shared(host, vae, samples, told):
    shown = decode(host, vae, samples, frames_at_once=5, overlap=9)
    assert torch.equal(shown, decode(host, vae, samples, frames_at_once=5, overlap=2))
    assert told[0] == told[1] and "neighbours share 2" in told[0]


def test_a_vae_that_takes_a_clip_as_a_whole_is_sent_to_the_hosts_own_node(host, vae, samples):
    with pytest.raises(ValueError, match=r"VAE Decode \(Tiled\) decodes it in overlapping chunks"):
        decode(host, vae, {"samples": samples["samples"][None].movedim(1, 2)})
    if host.release >= (0, 33):
        with pytest.raises(ValueError, match="by its temporal_size"):
            decode(host, tiny_models.wan_vae(), samples)


def test_cancel_ends_it_between_chunks(host, vae, samples, monkeypatch):
    import comfy.model_management as management

    decoded, original = [], vae.decode

    def decode_and_cancel(part):
        decoded.append(len(part))
        management.interrupt_current_processing()
        return original(part)

    monkeypatch.setattr(vae, "decode", decode_and_cancel)
    with pytest.raises(management.InterruptProcessingException):
        decode(host, vae, samples, frames_at_once=4, overlap=1)
    management.interrupt_current_processing(False)
    assert len(decoded) == 1
