# SPDX-License-Identifier: Apache-2.0
"""The other domain of `mismatch.py`: prose of ``pydoc_data.topics``, split by a fixed rule, and openings of it."""

from __future__ import annotations

import re
from pydoc_data.topics import topics

from vllm_hidden_transfer.evaluation.preparation import spread

HELD_OUT_EVERY, HELD_OUT_FROM = 10, 6
"""Every tenth topic by name from the seventh on is held out: a tenth of the text that the others hardly repeat."""
OPENING_WORDS = 30
"""Words of a prompt, about 40 tokens."""
_LEAST_WORDS = 45
_NO_PROSE = re.compile(r"::|\*\*\*|___|>>>|\||\+--")


def split_topics() -> tuple[dict[str, str], dict[str, str]]:
    """Text by topic: to train on, and held out. Topics quote each other, so paragraphs are kept apart too."""
    names = sorted(topics)
    held_out = {name: topics[name] for name in names[HELD_OUT_FROM::HELD_OUT_EVERY]}
    known = held_out_paragraphs(held_out)
    train = {
        name: "\n\n".join(each for each in _paragraphs(topics[name]) if squeezed(each) not in known)
        for name in names
        if name not in held_out
    }
    return train, held_out


def held_out_paragraphs(held_out: dict[str, str]) -> set[str]:
    """All paragraphs of the held-out topics, white space squeezed."""
    return {squeezed(each) for text in held_out.values() for each in _paragraphs(text)}


def openings(held_out: dict[str, str], count: int) -> list[dict[str, str]]:
    """At most `count` prompts, evenly spread over the held-out prose: the first words of paragraphs, as they stand."""
    found = [
        {"id": f"{name}-{number}", "kind": "prose", "prompt": _opening(paragraph)}
        for name, text in held_out.items()
        for number, paragraph in enumerate(_paragraphs(text))
        if _is_prose(paragraph)
    ]
    return spread(found, count)


def squeezed(text: str) -> str:
    """The text with single spaces."""
    return re.sub(r"\s+", " ", text).strip()


def _paragraphs(text: str) -> list[str]:
    return [each for each in text.split("\n\n") if each.strip()]


def _is_prose(paragraph: str) -> bool:
    whole = squeezed(paragraph)
    return (
        len(whole.split()) >= _LEAST_WORDS
        and whole[0].isupper()
        and _NO_PROSE.search(whole) is None
    )


def _opening(paragraph: str) -> str:
    """The first words with their own line breaks."""
    found = re.match(rf"\s*((?:\S+\s+){{{OPENING_WORDS}}})", paragraph)
    assert found is not None
    return found[1].rstrip()
