"""Prompts to the cross-attention context of a video model, by transformers' tokenizer and text encoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def encode_prompts(tokenizer: Any, text_encoder: Any, prompts: list[str]) -> Tensor:
    """The context [n, length, width] of n prompts: the last hidden state, of prompts padded to the tokenizer's length.

    tokenizer, text_encoder: transformers' CLIPTokenizer and CLIPTextModel, or what is called like them. A prompt of
    more than `length` tokens is cut, and a weight as in "(red:1.2)" is text like any other; ComfyUI encodes a long
    prompt in pieces, and weighs.
    """
    ids = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return text_encoder(ids.to(text_encoder.device)).last_hidden_state
