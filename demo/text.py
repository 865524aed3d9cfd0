"""The tokenizer and the text encoder of the embedded text models: CLIP's own kinds, only small.

The tokenizer is CLIP's byte-pair encoding with a vocabulary of the captions' words; any other text falls into bytes, so
nothing a user types is unknown. Its files, `demo/tokenizer`, are read by the host and by transformers alike and are
written by `python -m rewind.demo.text`. transformers is imported when something is built, not before.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

from . import captions
from . import world as W
from .models import TEXT_WEIGHTS, build_unet, load_components, read_weights

TOKENIZER = Path(__file__).with_name("tokenizer")
START, END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class TextConfig:
    """Sizes of the text encoder. `hidden` is the width of the cross-attention context."""

    hidden: int = 64
    layers: int = 2
    heads: int = 2
    length: int = 32  # tokens of a prompt, with its start and end

    def clip_text(self) -> dict:
        """The text encoder's configuration, in the words that the host and transformers share."""
        vocabulary = json.loads((TOKENIZER / "vocab.json").read_text(encoding="utf-8"))
        return {
            "model_type": "clip_text_model",
            "hidden_size": self.hidden,
            "intermediate_size": 4 * self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "max_position_embeddings": self.length,
            "projection_dim": self.hidden,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
            "vocab_size": len(vocabulary),
            "bos_token_id": vocabulary[START],
            "eos_token_id": vocabulary[END],
            "pad_token_id": vocabulary[END],
        }


def words() -> list[str]:
    """Every word of the captions, in alphabetical order."""
    said = ["a", "shape", "moves", "on", "background", ",", *W.COLOURS, *W.SHAPES]
    said += [*captions.DIRECTIONS, *captions.SPEEDS, *captions.HUES]
    return sorted({*said, *" ".join(captions.STYLES).replace(",", " ").split()})


def _bytes() -> list[str]:
    """The 256 bytes as the characters that stand for them in byte-level vocabularies."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def vocabulary() -> tuple[dict[str, int], list[str]]:
    """The vocabulary (token -> index) and the merges of the byte-pair encoding, in order.

    A word is merged from its first letter on: "red" as "r e" and "re d</w>". The pairs are applied in the list's order,
    so longer beginnings go first and, of the pairs of letters, those that begin a word before those inside one: "are"
    in "square" is then never merged before its "sq".
    """
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in words()]
    merges = list(dict.fromkeys((tuple(p[:i]), p[i]) for p in spelled for i in range(1, len(p))))
    pairs = {(left[0], piece) for left, piece in merges if len(left) == 1}
    before: dict[tuple[str, str], set] = {}
    for pieces in spelled:
        first, *inside = zip(pieces, pieces[1:]) if len(pieces) > 1 else [None]
        for pair in pairs & set(inside) - {first}:
            before.setdefault(pair, set()).add(first)
    rank = {pair: i for i, pair in enumerate(TopologicalSorter(before).static_order())}
    merges.sort(key=lambda merge: (-len(merge[0]), rank.get((merge[0][0], merge[1]), -1)))
    lines = [f"{''.join(left)} {piece}" for left, piece in merges]
    letters = _bytes()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(line.replace(" ", "") for line in lines)]
    tokens = [*dict.fromkeys(tokens), START, END]
    return {token: index for index, token in enumerate(tokens)}, lines


def write_tokenizer(folder: Path = TOKENIZER) -> None:
    """Write the tokenizer's files."""
    table, merges = vocabulary()
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    config = {"tokenizer_class": "CLIPTokenizer", "do_lower_case": True, "errors": "replace", **special}
    folder.mkdir(exist_ok=True)
    for name, value in (("vocab", table), ("special_tokens_map", special), ("tokenizer_config", config)):
        text = json.dumps(value, indent=0 if name == "vocab" else 2, ensure_ascii=False)
        (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


def load_tokenizer(config: TextConfig = TextConfig()):
    """transformers' CLIPTokenizer with the embedded vocabulary."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=config.length)


def tokens(tokenizer, prompts: list[str]):
    """Token indices [n, length] of prompts, padded with the end as CLIP's are; a longer prompt is cut."""
    return tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def build_text_encoder(config: TextConfig = TextConfig()):
    """transformers' CLIPTextModel with fresh weights."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**config.clip_text()))


def load_text_components(path: Path = TEXT_WEIGHTS, config: TextConfig = TextConfig()):
    """The embedded text-to-video model as (unet, vae, text_encoder, tokenizer): diffusers' and transformers' modules in
    float32, in eval mode. Its VAE is the image-to-video model's, from that model's file.

    Raises FileNotFoundError where weights are missing (a source tree without `demo/rewind_demo_t2v.safetensors`).
    """
    from .keys import TEXT_MODEL, text_from_checkpoint

    parts = text_from_checkpoint(read_weights(path))
    unet, text_encoder = build_unet(), build_text_encoder(config)
    unet.load_state_dict(parts["unet"])
    prefix = TEXT_MODEL if any(name.startswith(TEXT_MODEL) for name in text_encoder.state_dict()) else ""
    text_encoder.load_state_dict({prefix + name: tensor for name, tensor in parts["text_encoder"].items()})
    for module in (unet, text_encoder):
        module.eval().requires_grad_(False)
    return unet, load_components()[1], text_encoder, load_tokenizer(config)


if __name__ == "__main__":
    write_tokenizer()
