# SPDX-License-Identifier: Apache-2.0
"""What tokenizers are made of: special tokens, the byte alphabet, checked texts and ids."""

import functools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from lm.errors import UserError

CONTROL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
_MARKUP = ("think", "tool_call", "tool_response")
SPECIAL_TOKENS = CONTROL_TOKENS + tuple(t for m in _MARKUP for t in (f"<{m}>", f"</{m}>"))


@functools.cache
def byte_alphabet() -> tuple[str, ...]:
    """The character that byte-level BPE files write for each byte: itself where it is printable."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return tuple(chr(byte if byte in printable else next(others)) for byte in range(256))


@functools.cache
def byte_values() -> dict[str, int]:
    """The inverse of `byte_alphabet`."""
    return {char: byte for byte, char in enumerate(byte_alphabet())}


def added_token(content: str, token_id: int) -> dict[str, Any]:
    """An entry of tokenizer.json's added_tokens; `skip_special` drops control tokens only."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": content, **flags, "special": content in CONTROL_TOKENS}


def any_of(tokens: Sequence[str]) -> re.Pattern[str]:
    """Captures the longest token at the leftmost place; never matches when there are none."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")


def unique(tokens: Sequence[str]) -> tuple[str, ...]:
    """The tokens in order without repetitions; UserError for an empty one."""
    if isinstance(tokens, str):
        raise TypeError("tokens must be a sequence of strings, not one string")
    if "" in tokens:
        raise UserError("an empty string cannot be a token")
    return tuple(dict.fromkeys(tokens))


def id_list(ids: Sequence[int] | np.ndarray) -> list[int]:
    """Plain integers; ValueError for a negative one."""
    ids = np.asarray(ids, np.int64).reshape(-1)
    if ids.size and ids.min() < 0:
        raise ValueError(f"negative token id {ids.min()}")
    return ids.tolist()


def utf8(text: str) -> bytes:
    """The bytes of a text; UserError for a lone surrogate: JSON can carry one, UTF-8 cannot."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        reason = f"lone surrogate {text[error.start]!r} at character {error.start}"
        raise UserError(f"text is not valid Unicode: {reason}") from None
