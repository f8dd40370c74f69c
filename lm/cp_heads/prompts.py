# SPDX-License-Identifier: Apache-2.0
"""Prompts for decoding from held-out data: the beginnings of its texts."""

import numpy as np

from lm import setup
from lm.data import documents
from lm.errors import UserError


def held_out(resolved: setup.Setup, length: int, count: int = 0) -> list[np.ndarray]:
    """The first `length` tokens of each validation text, or half of a shorter one; `count` of them
    (0: `data.eval_conversations`), from the start again where there are fewer.

    Raises UserError when there is none, and DataError.
    """
    source = setup.records(resolved.config.data, "validation")
    count = count or min(len(source), resolved.config.data.eval_conversations)
    found = []
    for index in range(len(source)):
        for ids in documents.tokens_of(source[index], resolved.template, resolved.tokenizer):
            if len(ids) > 1:
                found.append(np.asarray(ids[: min(length, len(ids) // 2)], np.int32))
        if len(found) >= count:
            break
    if not found:
        raise UserError(f"{resolved.config.data.source}: no held-out text of at least two tokens")
    return [found[i % len(found)] for i in range(count)]
