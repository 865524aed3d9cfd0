"""The text-to-video model's training: its loss is EDM's, captions are dropped for guidance, and it resumes."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from rewind.demo import captions, text, train, train_text
from rewind.demo.keys import text_to_checkpoint
from rewind.demo.models import WEIGHTS, build_unet, load_components
from rewind.demo.trainer import DRIFT_WEIGHT, drift
from rewind.pipelines.denoiser import edm_scalings
from rewind.pipelines.dreamix.families import PLAIN_IDS


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


N, LENGTH = 6, 32
EMPTY = torch.full((LENGTH,), 605)


@pytest.fixture
def batch():
    return {
        "latents": torch.randn(N, 8, 4, 12, 12, generator=generator()),
        "mask": torch.rand(N, 8, 12, 12, generator=generator(2)),
        "tokens": torch.randint(600, (N, 4, LENGTH), generator=generator(3)).short(),
    }


class KnowsTheAnswer:
    """Answers with the network output that makes D the clean latents, by the samplers' own scalings."""

    def __init__(self, clean, offset=0.0):
        self.clean, self.offset, self.images, self.contexts, self.ids = clean, offset, [], [], []

    def __call__(self, model_input, timestep, context, added, return_dict):
        c_skip, c_out, c_in, _ = (c[:, None, None, None, None] for c in edm_scalings(torch.exp(4 * timestep.double())))
        self.images.append(model_input[:, :, 4:])
        self.contexts.append(context)
        self.ids.append(added)
        x = model_input[:, :, :4] / c_in
        return ((self.clean - c_skip * x) / c_out + self.offset,)


def text_encoder(tokens):
    """A context that is the tokens."""
    return SimpleNamespace(last_hidden_state=tokens[..., None].float())


def test_the_loss_is_zero_for_the_network_that_knows_the_answer_and_the_error_squared_else(batch):
    for offset, expected in ((0.0, 0.0), (0.5, 0.25)):
        unet = KnowsTheAnswer(batch["latents"], offset)
        loss = train_text.text_to_video_loss(unet, text_encoder, batch, EMPTY, generator())
        assert float(loss) == pytest.approx(expected, abs=1e-3)


def test_a_text_in_the_place_of_the_picture_as_the_host_gives_it(batch):
    """No first frame, the host's ids, one of the clip's captions, the empty one now and then."""
    unet, draw = KnowsTheAnswer(batch["latents"]), generator(4)
    for _ in range(300):
        train_text.text_to_video_loss(unet, text_encoder, batch, EMPTY, draw)
    assert not torch.cat(unet.images).any()
    assert torch.equal(torch.cat(unet.ids), torch.tensor(PLAIN_IDS).expand(300 * N, -1))
    tokens = torch.stack(unet.contexts)[..., 0].long()  # [calls, n, length]
    dropped = (tokens == EMPTY).all(-1)
    assert 0.07 < dropped.float().mean() < 0.13
    chosen = (tokens[:, :, None] == batch["tokens"].long()).all(-1)  # [calls, n, variants]
    assert torch.equal(chosen.any(-1), ~dropped), "a clip has its own captions"
    assert (chosen.float().mean((0, 1)) - 0.225).abs().max() < 0.04


def test_the_cache_holds_clips_with_the_captions_that_were_drawn_for_them(tmp_path, monkeypatch):
    monkeypatch.setattr(
        train, "encode", lambda vae, x: x.mean(2, keepdim=True).expand(-1, -1, 4, -1, -1)[..., :12, :12]
    )
    monkeypatch.setattr(train, "load_vae", lambda folder: torch.nn.Identity())
    args = SimpleNamespace(folder=tmp_path, clips=256)
    train_text.make_cache(args, 0, torch.device("cpu"))
    (file,) = (tmp_path / "captioned").iterdir()
    stored = torch.load(file)
    assert stored["latents"].shape == (256, 8, 4, 12, 12) and stored["mask"].shape == (256, 8, 12, 12)
    assert stored["tokens"].shape == (256, train_text.VARIANTS, LENGTH)
    words = captions.draw_words(256, generator(8_000_000))
    tokenizer = text.load_tokenizer()
    for i in range(0, 256, 16):
        said = tokenizer.batch_decode(stored["tokens"][i].long(), skip_special_tokens=True)
        assert len(set(said)) > 1 and all(f"moves {captions.DIRECTIONS[words.direction[i]]}" in one for one in said)
    before = file.stat().st_mtime_ns
    train_text.make_cache(args, 0, torch.device("cpu"))
    assert file.stat().st_mtime_ns == before, "what is there is kept"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "captioned").mkdir()
    n = 4
    torch.save(
        {
            "latents": torch.randn(n, 8, 4, 12, 12, generator=generator()).half(),
            "mask": torch.zeros(n, 8, 12, 12).half(),
            "tokens": torch.randint(600, (n, 4, LENGTH), generator=generator(1)).short(),
        },
        tmp_path / "captioned" / "0000.pt",
    )
    return tmp_path


def run(folder, command, steps=1):
    train.main([command, "--steps", str(steps), "--batch", "1", "--workers", "1", "--folder", str(folder)])


def test_it_starts_from_the_image_to_video_model_and_resumes(folder, monkeypatch):
    monkeypatch.setattr(train_text, "teach_words", partial(train_text.teach_words, steps=1))
    run(folder, "text-to-video")
    first = torch.load(folder / "text_to_video.pt")
    assert first["step"] == 1 and first["raw"].keys() == {"unet", "text_encoder", "readers"}
    shipped = load_components(WEIGHTS)[0].state_dict()
    furthest = max(float((first["raw"]["unet"][name] - tensor).abs().max()) for name, tensor in shipped.items())
    assert 0 < furthest < 1e-4, "one step of a warm-up away"
    run(folder, "text-to-video", steps=2)
    second = torch.load(folder / "text_to_video.pt")
    assert second["step"] == 2
    moved = [
        name
        for name, tensor in second["raw"]["text_encoder"].items()
        if not torch.equal(tensor, first["raw"]["text_encoder"][name])
    ]
    assert not moved and len(second["optimizer"]["state"]) > 0


def test_it_goes_on_from_an_exported_file(folder):
    unet, encoder = build_unet(), text.build_text_encoder()
    start = folder / "exported.safetensors"
    save_file(text_to_checkpoint({"unet": unet.state_dict(), "text_encoder": encoder.state_dict()}), start)
    train.main(
        [
            "text-to-video",
            "--steps",
            "1",
            "--batch",
            "1",
            "--workers",
            "1",
            "--folder",
            str(folder),
            "--start",
            str(start),
        ]
    )
    raw = torch.load(folder / "text_to_video.pt")["raw"]
    furthest = max(float((raw["unet"][name] - tensor).abs().max()) for name, tensor in unet.state_dict().items())
    assert 0 < furthest < 1e-4, "one step of a warm-up away"
    assert all(torch.equal(raw["text_encoder"][name], tensor) for name, tensor in encoder.state_dict().items())


def test_the_text_encoder_learns_to_tell_what_captions_say():
    torch.manual_seed(0)
    encoder, tokenizer = text.build_text_encoder(), text.load_tokenizer()
    chance = sum(math.log(n) for n in (6, 3, 4, 2, 4)) + 1.0  # of the styles, half of the clips have none
    assert train_text.teach_words(encoder, tokenizer, generator(), steps=60) < 0.6 * chance


def test_the_drift_tells_where_things_move_and_is_none_where_they_stand():
    clips = torch.zeros(4, 8, 1, 12, 12)
    for i, (right, down) in enumerate(((1, 0), (0, 1), (-1, 0), (0, 0))):
        for t in range(8):
            clips[i, t, 0, 6 + down * (t - 4), 6 + right * (t - 4)] = 1
    found = drift(clips)[:, 0]
    # sum_t (t - 3.5) t over the ramps' norms: 42 / (sqrt(42) sqrt(143) sqrt(12)).
    moved = 42 / math.sqrt(42 * 143 * 12)
    wanted = torch.tensor([[moved, 0], [0, moved], [-moved, 0], [0, 0]])
    assert torch.allclose(found, wanted, atol=1e-5)


def test_the_best_network_is_the_same_with_the_drift_weighed(batch):
    """The network that knows has no loss either way; a mistake in the drift alone costs what its weight says."""
    unet = KnowsTheAnswer(batch["latents"])
    assert float(train_text.text_to_video_loss(unet, text_encoder, batch, EMPTY, generator())) < 1e-5
    shape = batch["latents"].shape
    time, space = torch.arange(8.0) - 3.5, torch.arange(12.0) - 5.5
    moving = (time / time.norm())[:, None, None, None] * (space / space.norm() / 12**0.5)
    mistaken = KnowsTheAnswer(batch["latents"], moving.expand(shape))
    plain = {**batch, "mask": torch.zeros_like(batch["mask"])}
    loss = float(train_text.text_to_video_loss(mistaken, text_encoder, plain, EMPTY, generator()))
    assert loss == pytest.approx(1 / (8 * 12 * 12) + DRIFT_WEIGHT / 2, rel=1e-2)


def test_the_readers_ask_how_far_along_the_captions_direction_a_place_lies():
    """No loss for features that tell it; every transformer's features are seen; a caption without a direction asks
    nothing."""
    tokenizer, unet = text.load_tokenizer(), build_unet()
    readers = train_text.WayReaders(unet, tokenizer)
    tokens = text.tokens(tokenizer, ["a circle moves right", "a circle moves up", "a circle"])
    with torch.no_grad():
        unet(torch.zeros(3, 8, 8, 12, 12), torch.zeros(3), torch.zeros(3, 1, 64), torch.zeros(3, 3))
    shapes = [tuple(readers.seen[i].shape) for i in range(len(readers.readers))]
    assert all(shape[0] == 3 * 8 for shape in shapes) and {shape[-1] for shape in shapes} == {12, 6}
    assert float(readers.loss(tokens, 8).detach()) > 0.05 and not readers.seen
    for i, (_, channels, height, width) in enumerate(shapes):
        features = torch.zeros(3, 8, channels, height, width)
        features[0, :, 0] = torch.linspace(-1, 1, width)
        features[1, :, 0] = -torch.linspace(-1, 1, height)[:, None]
        features[2] = 99.0  # of the caption that names none
        features[:2, :, 1] = features[:2, :, 0] * torch.linspace(-1, 1, 8)[:, None, None]
        readers.seen[i] = features.flatten(0, 1)
        readers.readers[i].weight.data = torch.eye(2, channels)[:, :, None, None]
        readers.readers[i].bias.data.zero_()
    assert float(readers.loss(tokens, 8).detach()) < 1e-10


def test_the_moving_averages_are_exported_in_half_precision(folder, monkeypatch):
    modules = {"unet": build_unet(), "text_encoder": text.build_text_encoder()}
    averages = {name: module.state_dict() for name, module in modules.items()}
    torch.save({"ema": averages, "raw": None, "step": 7}, folder / "text_to_video.pt")
    file = folder / "exported.safetensors"
    monkeypatch.setattr(train_text, "TEXT_WEIGHTS", file)
    train_text.export(SimpleNamespace(folder=folder), 0, torch.device("cpu"))
    unet, _, encoder, _ = text.load_text_components(file)
    for module, name in ((unet, "unet"), (encoder, "text_encoder")):
        for key, tensor in averages[name].items():
            assert torch.equal(module.state_dict()[key], tensor.half().float()), key
    assert file.stat().st_size < 22e6
