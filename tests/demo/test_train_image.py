"""The text-to-image model's training: its loss is v's for a network of eps, captions lose their motion, it resumes."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from rewind.demo import captions, text, train, train_image
from rewind.demo.keys import image_to_checkpoint
from rewind.demo.text_to_image import MOTION, build_image_unet, load_image_components, without_motion

N, LENGTH, END = 6, 32, 605
EMPTY = torch.full((LENGTH,), END)
MOVES = torch.tensor([597, 598])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def batch():
    return {
        "latents": torch.randn(N, 4, 12, 12, generator=generator()),
        "mask": torch.rand(N, 12, 12, generator=generator(2)),
        "tokens": torch.randint(599, (N, LENGTH), generator=generator(3)),
    }


class KnowsTheAnswer:
    """Answers with the noise, told the level by the schedule's time alone; mistaken by `offset` in units of v."""

    def __init__(self, clean, offset=0.0):
        self.clean, self.offset, self.sigmas, self.contexts = clean, offset, [], []

    def __call__(self, model_input, time, context, return_dict):
        levels = train_image.LEVELS.log_sigmas
        before = time.double().floor().clamp(max=len(levels) - 2).long()
        s = torch.lerp(levels[before], levels[before + 1], time.double() - before).exp()
        self.sigmas += s.tolist()
        self.contexts.append(context)
        s = s[:, None, None, None]
        scale = torch.sqrt(s**2 + 1)
        noise = (model_input * scale - self.clean) / s
        return ((noise + self.offset / scale).float(),)


def text_encoder(tokens):
    """A context that is the tokens."""
    return SimpleNamespace(last_hidden_state=tokens[..., None].float())


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_zero_for_the_network_that_knows_the_noise_and_the_error_of_v_squared_else(batch):
    for offset, expected in ((0.0, 0.0), (0.5, 0.25)):
        unet = KnowsTheAnswer(batch["latents"], offset)
        loss = train_image.text_to_image_loss(unet, text_encoder, batch, MOVES, EMPTY, generator())
        assert float(loss) == pytest.approx(expected, abs=1e-3)


def test_the_object_counts_five_times(batch):
    here = torch.zeros(12, 12)
    here[4:8, 4:8] = 1
    mistaken = KnowsTheAnswer(batch["latents"], 0.5 * here)
    loss = train_image.text_to_image_loss(
        mistaken, text_encoder, batch | {"mask": here.expand(N, -1, -1)}, MOVES, EMPTY, generator()
    )
    assert float(loss) == pytest.approx(0.25 * 5 * 16 / (144 + 4 * 16), abs=1e-3)


def test_the_noise_covers_the_schedule_and_captions_lose_motion_or_all_their_words(batch):
    unet, draw = KnowsTheAnswer(batch["latents"]), generator(4)
    for _ in range(400):
        train_image.text_to_image_loss(unet, text_encoder, batch, MOVES, EMPTY, draw)
    sigmas, (low, high) = torch.tensor(unet.sigmas), train_image.LEVELS.sigma_range
    assert low * 0.999 <= sigmas.min() < 1.1 * low and 0.9 * high < sigmas.max() <= high * 1.001
    assert abs(sigmas.log().median() - train_image.P_MEAN) < 0.1
    tokens = torch.stack(unet.contexts)[..., 0].long()  # [calls, n, length]
    dropped = (tokens == EMPTY).all(-1)
    assert 0.07 < dropped.float().mean() < 0.13
    still = torch.stack([train_image.drop_tokens(row[None], MOVES, END)[0] for row in batch["tokens"]])
    as_said, without = (tokens == batch["tokens"]).all(-1), (tokens == still).all(-1)
    assert torch.equal(as_said | without, ~dropped), "a picture has its own caption"
    told_apart = (still != batch["tokens"]).any(-1)
    assert told_apart.any() and (without[:, told_apart].float().mean() - 0.45).abs() < 0.05


def test_noise_levels_stay_in_the_schedules_range_and_some_are_spread_over_all_of_it():
    low, high = train_image.LEVELS.sigma_range
    levels = torch.cat([train_image.draw_levels(64, draw) for draw in [generator(1)] for _ in range(200)])
    assert low <= levels.min() and levels.max() <= high * (1 + 1e-6)
    far = 2 * train_image.P_STD  # beyond this lie 2.3 % of the normal part, and of the uniform one what is left of it
    below = (levels.log() < train_image.P_MEAN - far).float().mean()
    share = (train_image.P_MEAN - far - math.log(low)) / math.log(high / low)
    assert float(below) == pytest.approx(0.85 * 0.0228 + 0.15 * share, abs=0.008)


# --- what is drawn ----------------------------------------------------------------------------------------------------


def test_a_picture_is_a_frame_of_a_clip_with_its_mask_and_one_of_its_captions():
    clips, frames, variants = 5, 8, 4
    number = torch.arange(clips * frames).reshape(clips, frames, 1, 1)
    said = torch.arange(clips * variants).reshape(clips, variants, 1).expand(-1, -1, LENGTH)
    data = {
        "latents": number[:, :, None].expand(-1, -1, 4, 12, 12).half(),
        "mask": number.expand(-1, -1, 12, 12).half(),
        "tokens": said.short(),
    }
    found = train_image.draw_pictures(data, 400, generator())
    assert found["latents"].shape == (400, 4, 12, 12) and found["tokens"].shape == (400, LENGTH)
    which = found["latents"][:, 0, 0, 0].long()
    assert torch.equal(which, found["mask"][:, 0, 0].long())
    assert torch.equal(which // frames, found["tokens"][:, 0] // variants)
    assert len(which.unique()) == clips * frames and len(found["tokens"][:, 0].unique()) == clips * variants


def test_tokens_lose_the_words_of_motion_as_captions_do():
    tokenizer = text.load_tokenizer()
    words = captions.draw_words(40, generator(5), styled=0.5)
    says = [
        {"colour": i % 2 > 0, "speed": i % 3 > 0, "hue": i % 5 > 0, "token": "sks" * (i % 7 == 0)} for i in range(40)
    ]
    said = [captions.caption(words, i, **said) for i, said in enumerate(says)]
    assert any(", " in caption for caption in said)
    motion = train_image.motion_tokens(tokenizer)
    assert len(set(motion.tolist())) == len(MOTION)
    found = train_image.drop_tokens(text.tokens(tokenizer, said), motion, END)
    assert torch.equal(found, text.tokens(tokenizer, [without_motion(caption) for caption in said]))
    assert torch.equal(text.tokens(tokenizer, [""])[0, 1:], EMPTY[1:])


# --- the run ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "captioned").mkdir()
    clips = {
        "latents": torch.randn(4, 8, 4, 12, 12, generator=generator()).half(),
        "mask": torch.zeros(4, 8, 12, 12).half(),
        "tokens": torch.randint(600, (4, 4, LENGTH), generator=generator(1)).short(),
    }
    torch.save(clips, tmp_path / "captioned" / "0000.pt")
    return tmp_path


def run(folder, steps=1, *words):
    arguments = ["--steps", str(steps), "--batch", "1", "--workers", "1", "--folder", str(folder), *words]
    train.main(["text-to-image", *arguments])


def test_it_trains_the_unet_alone_and_resumes(folder):
    run(folder)
    first = torch.load(folder / "text_to_image.pt")
    assert first["step"] == 1 and first["raw"].keys() == {"unet"}
    run(folder, 2)
    second = torch.load(folder / "text_to_image.pt")
    assert second["step"] == 2 and len(second["optimizer"]["state"]) == len(first["raw"]["unet"])
    moved = max(float((second["raw"]["unet"][key] - now).abs().max()) for key, now in first["raw"]["unet"].items())
    assert 0 < moved < 1e-4, "one step of a warm-up away"
    assert {file.name for file in folder.iterdir()} == {"captioned", "text_to_image.pt"}


def test_it_goes_on_from_an_exported_file(folder):
    unet, start = build_image_unet(), folder / "exported.safetensors"
    save_file(image_to_checkpoint(unet.state_dict()), start)
    run(folder, 1, "--start", str(start))
    raw = torch.load(folder / "text_to_image.pt")["raw"]["unet"]
    furthest = max(float((raw[name] - tensor).abs().max()) for name, tensor in unet.state_dict().items())
    assert 0 < furthest < 1e-4, "one step of a warm-up away"


def test_the_moving_average_is_exported_in_half_precision_and_its_parts_are_shared(folder, monkeypatch):
    average, file = build_image_unet().state_dict(), folder / "exported.safetensors"
    torch.save({"ema": {"unet": average}, "raw": None, "step": 7}, folder / "text_to_image.pt")
    monkeypatch.setattr(train_image, "IMAGE_WEIGHTS", file)
    train.main(["export-text-to-image", "--folder", str(folder)])
    assert file.stat().st_size < 14e6
    unet, vae, encoder, _ = load_image_components(file)
    for key, tensor in average.items():
        assert torch.equal(unet.state_dict()[key], tensor.half().float()), key
    _, its_vae, its_encoder, _ = text.load_text_components()
    for ours, theirs in ((vae, its_vae), (encoder, its_encoder)):
        shared = theirs.state_dict()
        assert all(torch.equal(tensor, shared[key]) for key, tensor in ours.state_dict().items())
