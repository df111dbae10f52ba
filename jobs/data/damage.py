"""Responses made worse, to learn preferences from: each kind is a pure function of a text and a seed.

A reward model learns all four kinds on functions of Python's library, the first most easily (measured: held-out
accuracy 0.94, 0.8, 0.76 and 0.7 in the order of ``KINDS``, with 0.9M parameters). The body of another function in place
of the right one was not learned at that size, so it is none of them.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence
from typing import Literal, get_args

from jobs.data.functions import parameters

Kind = Literal["scrambled", "dropped", "swapped", "shuffled"]
KINDS: tuple[Kind, ...] = get_args(Kind)
DROPPED = 0.3  # share of the words
TRIES = 5  # at an order that is another
WORDS = re.compile(r"( ?\w+| ?[^\w\s])")  # with the blank before them, as in byte-level BPE


def damaged(
    prompt: str, response: str, other: str, *, kinds: Sequence[Kind], seed: int, number: int
) -> tuple[Kind, str] | None:
    """One of ``kinds``, drawn, and ``response`` after it; None where none of them would change it.

    Args:
        other: the prompt of another function, whose parameters have other names.
        number: of the example, which together with ``seed`` decides everything.
    """
    rng = random.Random(f"{seed}/{number}")
    for kind in rng.sample(kinds, len(kinds)):
        worse = HOW[kind](prompt, response, other, rng)
        if worse is not None and worse != response:
            return kind, worse
    return None


def scrambled(_prompt: str, response: str, _other: str, rng: random.Random) -> str:
    """The words in another order, in the places that words had."""
    parts = WORDS.split(response)  # words at odd places
    parts[1::2] = _moved(parts[1::2], rng)
    return "".join(parts)


def dropped(_prompt: str, response: str, _other: str, rng: random.Random) -> str:
    """Without DROPPED of its words."""
    parts = WORDS.split(response)
    places = range(1, len(parts), 2)
    for place in rng.sample(places, math.ceil(DROPPED * len(places))):
        parts[place] = ""
    return "".join(parts)


def swapped(prompt: str, response: str, other: str, rng: random.Random) -> str | None:
    """One parameter under a name that only another function has; None where it uses none, or there is no such name."""
    own = parameters(prompt)
    used = [name for name in own if re.search(_whole(name), response)]
    foreign = [name for name in parameters(other) if name not in own]
    if not used or not foreign:
        return None
    return re.sub(_whole(rng.choice(used)), rng.choice(foreign), response)


def shuffled(_prompt: str, response: str, _other: str, rng: random.Random) -> str:
    """The lines in another order."""
    return "\n".join(_moved(response.split("\n"), rng))


def _moved(things: list[str], rng: random.Random) -> list[str]:
    """``things`` in an order that is another, where TRIES suffice to find one."""
    orders = (rng.sample(things, len(things)) for _ in range(TRIES))
    return next((order for order in orders if order != things), things)


def _whole(name: str) -> str:
    """A pattern of ``name`` where it is no part of another, and no attribute."""
    return rf"(?<![\w.]){name}\b"


HOW: dict[Kind, Callable[[str, str, str, random.Random], str | None]] = {
    "scrambled": scrambled,
    "dropped": dropped,
    "swapped": swapped,
    "shuffled": shuffled,
}
