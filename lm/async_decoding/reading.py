# SPDX-License-Identifier: Apache-2.0
"""From the decoder's log to threads and text, on the host, while it writes and at the end."""

import numpy as np

from lm.async_decoding import assembly, baselines, language, tables
from lm.async_decoding.answers import Answer, Thread
from lm.async_decoding.threads import APAR, ASYNC, State
from lm.prompting import Speaker


def threads_of(
    state: State, row: int, speaker: Speaker, form: str = ASYNC
) -> tuple[tuple[Thread, ...], list[bool]]:
    """The threads of a request so far, and whether each has come to its end. Promises whose block
    has not begun are the last ones: they have no thread.

    state: of numpy arrays. form: of the `Rules` that it was written by.
    """
    count = int(state.decoded[row])
    tokens, owners, steps = (
        getattr(state.log, name)[row, :count] for name in ("tokens", "threads", "steps")
    )
    main = Thread(tokens[owners == 0], 0, steps[owners == 0])
    found, ended = [main], [bool(state.main.ended[row])]
    rows = state.rows
    writing = set(rows.thread[row][~rows.closing[row]].tolist())
    for number in range(1, int(state.started[row]) + 1):
        topic, size = (
            int(getattr(state.promises, name)[row, number - 1])
            for name in ("topic", "topic_length")
        )
        begin, body = (
            speaker.tokenizer.token_id(tag) for tag in (language.ASYNC, language.ASYNC_BODY)
        )
        opening = [body]
        if form == ASYNC:
            opening = [begin, *main.ids[topic : topic + size].tolist(), body]
        own = owners == number
        ids = np.concatenate([np.array(opening, np.int32), tokens[own]])
        found.append(Thread(ids, len(opening), steps[own]))
        ended.append(number not in writing)
    return tuple(found), ended


def final(state: State, row: int, speaker: Speaker, form: str = ASYNC) -> list[tuple[int, str]]:
    """(thread, text): what will not change any more, in reading order."""
    found, ended = threads_of(state, row, speaker, form)
    ids, stops = [thread.ids for thread in found], speaker.stop_ids
    if not tables.has_tags(speaker.tokenizer):
        text = assembly.sequential(ids[0], speaker.tokenizer, stops).text
        return [(0, text.rstrip("\ufffd"))]
    if form == APAR:
        return baselines.final_segments(ids, ended, speaker.tokenizer, stops)
    return assembly.final_segments(ids, ended, speaker.tokenizer, stops)


def answer(
    state: State,
    row: int,
    prompt: str,
    prompt_ids: np.ndarray,
    speaker: Speaker,
    seconds: float = 0.0,
    form: str = ASYNC,
) -> Answer:
    """The answer of a request that is done."""
    found, _ = threads_of(state, row, speaker, form)
    main, *blocks = (thread.ids for thread in found)
    tokenizer, stops = speaker.tokenizer, speaker.stop_ids
    if not tables.has_tags(tokenizer):
        text = assembly.sequential(main, tokenizer, stops)
    elif form == APAR:
        text = baselines.assemble([main, *blocks], tokenizer, stops, form)
    else:
        text = assembly.assemble_ids(main, blocks, tokenizer, stops, prompt=prompt_ids)
    whole = bool(state.main.ended[row] and state.closed[row] == state.made[row])
    return Answer(prompt, text, found, int(state.steps[row]), whole, seconds)
