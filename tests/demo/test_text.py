"""The embedded tokenizer and text encoder: nothing is unknown, and what is stored is what the code makes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from rewind.demo import captions, text
from rewind.demo.keys import text_to_checkpoint
from rewind.demo.models import build_unet
from rewind.pipelines.text import encode_prompts


@pytest.fixture(scope="module")
def tokenizer():
    return text.load_tokenizer()


def test_the_stored_files_are_what_the_code_writes(tmp_path):
    text.write_tokenizer(tmp_path / "tokenizer")
    written = {file.name: file.read_bytes() for file in (tmp_path / "tokenizer").iterdir()}
    assert written == {file.name: file.read_bytes() for file in text.TOKENIZER.iterdir()}


def test_every_word_of_the_captions_is_one_token(tokenizer):
    start, end = (tokenizer.convert_tokens_to_ids(token) for token in (text.START, text.END))
    found = [tokenizer(word).input_ids for word in text.words()]
    assert all(len(ids) == 3 and ids[0] == start and ids[-1] == end for ids in found)
    assert len({ids[1] for ids in found}) == len(text.words())


def test_words_are_those_of_the_captions():
    """Every caption, with everything said, is made of them."""
    generator = torch.Generator().manual_seed(0)
    drawn = captions.draw_words(200, generator, styled=0.5)
    used = {word for i in range(200) for word in captions.caption(drawn, i).replace(",", " , ").split()}
    bare = set(captions.caption(drawn, 0, False, False, False, False).replace(",", " , ").split())
    assert used | bare == set(text.words())


@pytest.mark.parametrize("word", ["sks", "zażółć", "日本語", "😀", "a\u0301", "red-ish", "1234", "\x7f", "§±"])
def test_any_other_text_falls_into_bytes_and_comes_back(tokenizer, word):
    ids = tokenizer(word).input_ids
    assert ids.count(tokenizer.convert_tokens_to_ids(text.END)) == 1, "the end stands for unknown text too"
    pieces = "".join(tokenizer.convert_ids_to_tokens(ids[1:-1])).replace("</w>", "")
    letters = {letter: byte for byte, letter in _letters().items()}
    assert bytes(letters[piece] for piece in pieces).decode() == _normal(word)


def _letters() -> dict[int, str]:
    """The letter that stands for each byte, by the rule of byte-level vocabularies, from its definition."""
    printable = {byte for byte in range(256) if 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174}
    others = iter(range(256, 512))
    return {byte: chr(byte if byte in printable else next(others)) for byte in range(256)}


def _normal(word: str) -> str:
    import unicodedata

    return unicodedata.normalize("NFC", word).lower()


def test_every_byte_is_in_the_vocabulary_inside_and_at_the_end_of_a_word():
    table, _ = text.vocabulary()
    assert all(letter in table and f"{letter}</w>" in table for letter in _letters().values())
    assert sorted(table.values()) == list(range(len(table)))


def test_prompts_are_padded_with_the_end_and_cut_at_the_length(tokenizer):
    config = text.TextConfig()
    end = tokenizer.convert_tokens_to_ids(text.END)
    ids = text.tokens(tokenizer, ["", "a red circle", "a " * 100])
    assert ids.shape == (3, config.length)
    assert ids[0, 1:].tolist() == [end] * (config.length - 1)
    assert (ids[1] != end).sum() == 4 and ids[2, -1] == end and (ids[2] != end).sum() == config.length - 1
    assert text.load_tokenizer(replace(config, length=8)).model_max_length == 8


def test_no_caption_is_cut():
    generator = torch.Generator().manual_seed(1)
    drawn, tokenizer = captions.draw_words(300, generator, styled=0.7), text.load_tokenizer()
    longest = max(len(tokenizer(captions.caption(drawn, i, token="abcde")).input_ids) for i in range(300))
    assert longest <= text.TextConfig().length


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights as they are exported, and the text encoder they are of."""
    torch.manual_seed(3)
    unet, text_encoder = build_unet(), text.build_text_encoder().eval()
    for parameter in text_encoder.parameters():
        parameter.data = parameter.data.half().float()
    parts = {"unet": unet.state_dict(), "text_encoder": text_encoder.state_dict()}
    file = tmp_path_factory.mktemp("weights") / "text.safetensors"
    save_file({name: tensor.half().contiguous() for name, tensor in text_to_checkpoint(parts).items()}, file)
    return file, unet, text_encoder


def test_what_is_exported_is_loaded(weights, tokenizer):
    file, unet, text_encoder = weights
    loaded, vae, its_encoder, its_tokenizer = text.load_text_components(file)
    for module in (loaded, vae, its_encoder):
        assert not module.training
        assert all(p.dtype == torch.float32 and not p.requires_grad for p in module.parameters())
    for name, tensor in unet.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.half().float()), name
    prompts = ["a red circle moves up", ""]
    context = encode_prompts(its_tokenizer, its_encoder, prompts)
    assert context.shape == (2, 32, 64) and not context.requires_grad
    assert torch.equal(context, text_encoder(text.tokens(tokenizer, prompts)).last_hidden_state)
    assert not torch.allclose(context[0, 2], context[1, 2], atol=0.1)


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights at .*none.*: reinstall Rewind"):
        text.load_text_components(tmp_path / "none.safetensors")
