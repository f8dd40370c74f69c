# SPDX-License-Identifier: Apache-2.0
"""What keys and values are made of: English words (wonderwords), numbers, uuids, letters."""

import functools
import importlib.util
import pathlib
import random
import string
from collections.abc import Callable


@functools.cache
def listed(kind: str) -> tuple[str, ...]:
    """The "noun", "adjective" or "verb" list: 6786, 912 and 1042 lines."""
    # the package itself reads its lists, when it is imported, in a way that Python gives up
    (place,) = importlib.util.find_spec("wonderwords").submodule_search_locations
    file = pathlib.Path(place) / "assets" / f"{kind}list.txt"
    return tuple(file.read_text(encoding="utf-8").splitlines())


@functools.cache
def vocabulary() -> tuple[str, ...]:
    """Every listed word once, in alphabetical order."""
    return tuple(sorted({*listed("noun"), *listed("adjective"), *listed("verb")}))


def pair(rng: random.Random) -> str:
    """An adjective and a noun, joined by a hyphen."""
    return f"{rng.choice(listed('adjective'))}-{rng.choice(listed('noun'))}"


def number(rng: random.Random) -> str:
    """Seven digits, the first of them not 0."""
    return str(rng.randint(1_000_000, 9_999_999))


def uuid(rng: random.Random) -> str:
    """A version 4 uuid: 122 random bits and the 6 that say so."""
    bits = rng.getrandbits(128)
    bits = bits & ~(0xF << 76) | (4 << 76)
    bits = bits & ~(3 << 62) | (2 << 62)
    digits = f"{bits:032x}"
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def digits(rng: random.Random, count: int) -> str:
    """Digits that may begin with 0."""
    return "".join(rng.choices(string.digits, k=count))


def letters(rng: random.Random, count: int, alphabet: str = string.ascii_lowercase) -> str:
    """A word without a meaning."""
    return "".join(rng.choices(alphabet, k=count))


def distinct(make: Callable[[], str], count: int, taken: set[str] | None = None) -> list[str]:
    """`count` different strings that are not `taken`, which grows by them.

    Drawing again keeps every answer unique in its text; the published generators leave that to
    chance.
    """
    taken = set() if taken is None else taken
    out: list[str] = []
    while len(out) < count:
        made = make()
        if made not in taken:
            taken.add(made)
            out.append(made)
    return out
