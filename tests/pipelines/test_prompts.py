"""The rare word finds its place in the prompt, once."""

from __future__ import annotations

import pytest

from rewind.pipelines.dreamix.prompts import holds, with_token


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("a shape moves up", "a sks shape moves up"),
        ("An owl flies", "An sks owl flies"),
        ("the dog leaps", "the sks dog leaps"),
        ("\n  a   shape moves ", "a   sks shape moves"),
        ("dogs leap over a wall", "sks dogs leap over a wall"),
        ("another dog", "sks another dog"),
        ("theatre at night", "sks theatre at night"),
        ("a", "sks a"),
        ("", "sks"),
    ],
)
def test_before_the_prompt_is_behind_a_leading_article(prompt, expected):
    assert with_token(prompt, "sks") == expected


@pytest.mark.parametrize("prompt", ["a sks shape moves up", "a SKS shape", "moves like sks, slowly", "(sks:1.2) dog"])
def test_a_token_that_is_there_is_not_added_again(prompt):
    assert with_token(prompt, "sks") == with_token(prompt, "sks", "as written") == prompt


def test_a_part_of_a_word_is_not_the_token():
    assert not holds("a flasks shape", "sks") and not holds("sks2", "sks")
    assert with_token("tasks are done", "sks") == "sks tasks are done"
    with pytest.raises(ValueError, match="does not hold the token"):
        with_token("tasks are done", "sks", "as written")


def test_signs_in_a_token_are_taken_as_they_are():
    assert with_token("a dog", "<s*>") == "a <s*> dog"
    assert with_token("a <s*> dog", "<s*>", "as written") == "a <s*> dog"
    assert not holds("a ss dog", "s*")


@pytest.mark.parametrize(
    "token, place, message",
    [
        ("", "before the prompt", "empty"),
        ("a word", "before the prompt", "without spaces"),
        (" sks", "as written", "without spaces"),
        ("sks", "behind the prompt", "one of before the prompt, as written"),
        ("sks", "as written", 'choose "before the prompt"'),
    ],
)
def test_what_cannot_be_is_refused(token, place, message):
    with pytest.raises(ValueError, match=message):
        with_token("a shape moves up", token, place)
