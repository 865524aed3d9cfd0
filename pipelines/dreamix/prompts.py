"""Where the rare word of the fine-tuning goes in the edit prompt (Dreamix, arXiv 2302.01329).

The model is fine-tuned on the bare token. Whether the paper's edit prompts hold it is not told; UniTune, by which
Dreamix is inspired, puts it before the prompt, and so do we, behind a leading article: "a shape moves up" becomes
"a sks shape moves up", as the embedded model's captions are written.
"""

from __future__ import annotations

import re

PLACES = ("before the prompt", "as written")
_ARTICLE = re.compile(r"(?:an?|the)\s+", re.IGNORECASE)


def check_token(token: str) -> None:
    """ValueError unless the token is one word."""
    if not token:
        raise ValueError("the token is empty: give a rare word, such as sks")
    if any(letter.isspace() for letter in token):
        raise ValueError(f'the token is "{token}": it must be one word without spaces, such as sks')


def holds(prompt: str, token: str) -> bool:
    """Whether the token is a word of the prompt. Upper case counts as lower, as to most text encoders."""
    return re.search(rf"(?<!\w){re.escape(token)}(?!\w)", prompt, re.IGNORECASE) is not None


def with_token(prompt: str, token: str, place: str = PLACES[0]) -> str:
    """The edit prompt with the token in it, without white space around it.

    place: "before the prompt" puts the token behind a leading a, an or the, else first, and changes nothing where the
    prompt holds it already; "as written" leaves the place to the user. An empty prompt becomes the token alone.
    Raises ValueError for a token that is not one word, for another place, or where the prompt "as written" lacks it: it
    would edit as if nothing had been learnt.
    """
    check_token(token)
    if place not in PLACES:
        raise ValueError(f'the token\'s place is "{place}"; it must be one of {", ".join(PLACES)}')
    prompt = prompt.strip()
    if holds(prompt, token):
        return prompt
    if place == "as written":
        raise ValueError(
            f'the prompt does not hold the token "{token}", under which the clip is learnt: write it where it belongs, '
            f'or choose "{PLACES[0]}"'
        )
    article = _ARTICLE.match(prompt)
    start = article.end() if article else 0
    return f"{prompt[:start]}{token} {prompt[start:]}".strip()
