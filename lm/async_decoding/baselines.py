# SPDX-License-Identifier: Apache-2.0
"""Two other ways to write an answer in parallel, trained on the same programs: in the style of
Skeleton-of-Thought (arXiv 2307.15337) and of APAR (arXiv 2401.06761).

| | main | a block | reads blocks |
|---|---|---|---|
| `sot` | a topic for every point, then the end | a point, the skeleton before it | no |
| `apar` | text; a fork where a detail belongs | a detail, main up to its fork before it | no |

Neither can wait. What a later part needs is therefore written in main under `apar`, and an answer
with such a part is written without a skeleton under `sot`, as if a router had said so: both keep
their quality and lose speed, where forking everything would lose the answer. The fork is `"/>`, its
child begins with `">`, and a skeleton's topic with `<promise topic="`: tags that the vocabulary
has, and that text never holds here: where HTML ends in `">`, two tokens say so.

APAR trains chains from the root to one leaf, with the loss behind the last child token. All chains
of an answer are one layout here: blocks share main up to their forks and see nothing else, so that
every trained token has the context that its chain gives it, and is trained once.
"""

import dataclasses
import re
import time
from collections.abc import Sequence

import jax
import numpy as np

from lm import generate
from lm.async_decoding import assembly, language, quality
from lm.async_decoding.answers import Answer, Thread
from lm.async_decoding.assembly import Assembly
from lm.async_decoding.language import Program, Promise, Sync, Text
from lm.async_decoding.programs import EncodedProgram
from lm.async_decoding.threads import APAR_SCHEME
from lm.config import SamplingConfig
from lm.prompting import Speaker
from lm.text.tokenizers import Tokenizer

FORK, CHILD, CLOSE = language.PROMISE_END, language.ASYNC_BODY, language.ASYNC_END
SCHEME = APAR_SCHEME  # of positions
_LEAD = re.compile(r"\s*\S+?(?=[\s:.,;!?]|\Z)")
_WORD = re.compile(r"\w+")


def encode(
    program: Program, prompt: np.ndarray, tokenizer: Tokenizer, end: int, form: str
) -> EncodedProgram:
    """An answer in the form "sot" or "apar"; arguments as of `programs.encode`."""
    points = skeleton(program) if form == "sot" else None
    if points is not None:
        return _encode_skeleton(points, prompt, tokenizer, end)
    program = inlined(program) if form == "apar" else language.plain(language.render(program))
    return _encode_forks(program, prompt, tokenizer, end)


# --- Skeleton-of-Thought


def skeleton(program: Program) -> list[tuple[str, str]] | None:
    """(topic, text) of each point; None for an answer that is written without a skeleton: one in
    which something waits, or of a single point."""
    if any(isinstance(item, Sync) for item in program.items) or len(program.items) < 2:
        return None
    texts = iter(program.threads)
    points = []
    for item in program.items:
        if isinstance(item, Promise):
            points.append((item.topic, next(texts)))
        else:
            word = _WORD.search(item.text)
            points.append(("part" if word is None else word[0], item.text))
    return points


def _encode_skeleton(points, prompt, tokenizer, end) -> EncodedProgram:
    ids = language.tag_ids(tokenizer)
    topics = language.encode_texts([topic for topic, _ in points], tokenizer)
    main = [token for topic in topics for token in (ids[language.PROMISE], *topic.tolist())]
    return EncodedProgram(
        prompt=np.asarray(prompt, np.int32),
        main=np.array([*main, end], np.int32),
        forks=np.full(len(points), len(main) - 1, np.int64),  # all see the whole skeleton
        syncs=np.zeros(0, np.int64),
        tokens=np.full(len(points), language.MAX_TOKENS, np.int64),
        openings=tuple(_opening(topic, ids) for topic in topics),
        blocks=tuple(language.encode_texts([text for _, text in points], tokenizer)),
        close=ids[CLOSE],
    )


def _opening(topic: np.ndarray, ids) -> np.ndarray:
    return np.array([ids[language.ASYNC], *topic.tolist(), ids[CHILD]], np.int32)


def sot_answers(
    speaker: Speaker, prompts: Sequence[str], sampling: SamplingConfig, seed: int
) -> list[Answer]:
    """Answers of a model that was trained on skeletons: the skeletons as one batch, then all points
    of all of them as another, each with its prompt and skeleton prefilled again.

    Steps are those of the skeleton and of its longest point, what is prefilled not counted; seconds
    are those of both batches, the prompts' prefill not counted.
    """
    tokenizer, ids = speaker.tokenizer, language.tag_ids(speaker.tokenizer)
    encoded = [quality.encode_prompt(p, speaker.template, tokenizer) for p in prompts]
    keys = jax.random.split(jax.random.key(seed))
    first, seconds = _generate(speaker, encoded, sampling, keys[0], speaker.stop_ids, prefill=False)
    found = [topics_of(g.tokens, tokenizer, speaker.stop_ids) for g in first]
    openings = [
        [_opening(topic, ids) for topic in language.encode_texts(topics, tokenizer)]
        for topics in found
    ]
    wanted = [
        np.concatenate([prompt, g.tokens, opening])
        for prompt, g, own in zip(encoded, first, openings, strict=True)
        for opening in own
    ]
    stops = (ids[CLOSE], *speaker.stop_ids)
    second, more = _generate(speaker, wanted, sampling, keys[1], stops)
    points = iter(second)
    out = []
    for prompt, g, own in zip(prompts, first, openings, strict=True):
        main = _ended(g, speaker.stop_ids[0])
        threads = [Thread(main, 0, np.arange(1, len(main) + 1))]
        for opening in own:
            point = next(points)
            text = _ended(point, ids[CLOSE])
            steps = len(main) + np.arange(1, len(text) + 1)
            threads.append(Thread(np.concatenate([opening, text]), len(opening), steps))
        out.append(_answer(prompt, threads, seconds + more, tokenizer, speaker.stop_ids, "sot"))
    return out


def topics_of(main: np.ndarray, tokenizer: Tokenizer, stop_ids: Sequence[int]) -> list[str]:
    """The points of a skeleton; none where the model wrote an answer instead."""
    pieces = language.pieces_of_ids(main, tokenizer, stop_ids)
    if not pieces or pieces[0].kind != language.PROMISE:
        return []
    return [piece.text for piece in pieces if piece.kind == language.TEXT]


# --- APAR


def inlined(program: Program) -> Program:
    """The program with everything that something waits for in main, without syncs: only parts that
    are open at the end stay apart."""
    last = max((i for i, x in enumerate(program.items) if isinstance(x, Sync)), default=-1)
    blocks = iter(program.threads)
    items: list[language.Item] = []
    threads: list[str] = []
    for position, item in enumerate(program.items):
        if isinstance(item, Sync):
            continue
        text = next(blocks) if isinstance(item, Promise) else item.text
        if isinstance(item, Promise) and position > last and split_lead(item.topic, text)[1]:
            items.append(item)
            threads.append(text)
        elif items and isinstance(items[-1], Text):
            items[-1] = Text(items[-1].text + text)
        else:
            items.append(Text(text))
    return Program(tuple(items), tuple(threads))


def split_lead(topic: str, text: str) -> tuple[str, str]:
    """What main says of a part before it forks, and the detail: the topic where the part begins
    with it, else the first word."""
    if text.startswith(topic):
        return topic, text[len(topic) :]
    found = _LEAD.match(text)
    lead = found[0] if found else ""
    return lead, text[len(lead) :]


def _encode_forks(program, prompt, tokenizer, end) -> EncodedProgram:
    ids = language.tag_ids(tokenizer)
    blocks = iter(program.threads)
    main: list[int] = []
    forks, details = [], []
    for item in program.items:
        if isinstance(item, Promise):
            lead, detail = split_lead(item.topic, next(blocks))
            main += [*language.encode_prompt(lead, tokenizer).tolist(), ids[FORK]]
            forks.append(len(main) - 1)
            details.append(detail)
        else:
            main += language.encode_prompt(item.text, tokenizer).tolist()
    return EncodedProgram(
        prompt=np.asarray(prompt, np.int32),
        main=np.array([*main, end], np.int32),
        forks=np.array(forks, np.int64),
        syncs=np.zeros(0, np.int64),
        tokens=np.full(len(forks), language.MAX_TOKENS, np.int64),
        openings=tuple(np.array([ids[CHILD]], np.int32) for _ in forks),
        blocks=tuple(language.encode_texts(details, tokenizer)),
        close=ids[CLOSE],
    )


def final_segments(
    threads: Sequence[np.ndarray],
    ended: Sequence[bool],
    tokenizer: Tokenizer,
    stop_ids: Sequence[int],
) -> list[tuple[int, str]]:
    """(thread, text): what can be read already of threads under "apar" that are being written, up
    to the first block that is unfinished, as far as that is written.

    ended: of each, whether nothing more will come.
    """
    main = language.pieces_of_ids(threads[0], tokenizer, stop_ids)
    segments, block, whole = [], 0, ended[0]
    for piece in main:
        if piece.kind == language.TEXT:
            segments.append((0, piece.text))
        elif piece.kind == FORK:
            block += 1
            began = block < len(threads)
            text = _text(threads[block], tokenizer, stop_ids) if began else ""
            segments.append((block, text))
            if not began or not ended[block]:
                whole = False
                break
    if segments and not whole:  # a character may need the tokens that follow
        segments[-1] = (segments[-1][0], segments[-1][1].rstrip("\ufffd"))
    return [(k, text) for k, text in segments if text]


# --- all of them


def plain_answers(
    speaker: Speaker, prompts: Sequence[str], sampling: SamplingConfig, seed: int
) -> list[Answer]:
    """Answers in one thread, by the loop that does nothing else: what speed-ups are over. Seconds
    are those of the batch after its prompts' prefill."""
    tokenizer = speaker.tokenizer
    encoded = [quality.encode_prompt(p, speaker.template, tokenizer) for p in prompts]
    key = jax.random.key(seed)
    found, seconds = _generate(speaker, encoded, sampling, key, speaker.stop_ids, prefill=False)
    out = []
    for prompt, g in zip(prompts, found, strict=True):
        main = _ended(g, speaker.stop_ids[0])
        thread = Thread(main, 0, np.arange(1, len(main) + 1))
        text = assembly.assemble_ids(main, [], tokenizer, speaker.stop_ids)
        out.append(Answer(prompt, text, (thread,), len(main), g.stopped, seconds))
    return out


def assemble(
    threads: Sequence[np.ndarray], tokenizer: Tokenizer, stop_ids: Sequence[int], form: str
) -> Assembly:
    """What a reader gets of a baseline's threads (main, then each block with its opening)."""
    main = language.pieces_of_ids(threads[0], tokenizer, stop_ids)
    blocks = [_text(ids, tokenizer, stop_ids) for ids in threads[1:]]
    if form == "sot" and blocks:
        return Assembly(tuple((k, text) for k, text in enumerate(blocks, 1) if text), {})
    segments, next_block = [], 0
    for piece in main:
        if piece.kind == language.TEXT:
            segments.append((0, piece.text))
        elif piece.kind == FORK and next_block < len(blocks):
            segments.append((next_block + 1, blocks[next_block]))
            next_block += 1
    return Assembly(tuple((k, text) for k, text in segments if text), {})


def _text(block: np.ndarray, tokenizer: Tokenizer, stop_ids: Sequence[int]) -> str:
    """The text of a block: what is behind its opening, without tags."""
    pieces = language.pieces_of_ids(block, tokenizer, stop_ids)
    kinds = [piece.kind for piece in pieces]
    begins = kinds.index(CHILD) + 1 if CHILD in kinds else 0
    return "".join(piece.text for piece in pieces[begins:] if piece.kind == language.TEXT)


def _answer(prompt, threads, seconds, tokenizer, stop_ids, form) -> Answer:
    ids = [thread.ids for thread in threads]
    finished = int(ids[0][-1]) in stop_ids if len(ids[0]) else False
    close = language.tag_ids(tokenizer)[CLOSE]
    finished = finished and all(block[-1] == close for block in ids[1:])
    steps = max(int(thread.steps[-1]) if len(thread.steps) else 0 for thread in threads)
    return Answer(
        prompt, assemble(ids, tokenizer, stop_ids, form), tuple(threads), steps, finished, seconds
    )


def _ended(found: generate.Generation, end: int) -> np.ndarray:
    """The tokens with the one that ended them; which of several is not kept."""
    return np.append(found.tokens, [end] * found.stopped).astype(np.int32)


def _generate(
    speaker: Speaker,
    prompts: Sequence[np.ndarray],
    sampling: SamplingConfig,
    key: jax.Array,
    stop_ids: Sequence[int],
    prefill: bool = True,
) -> tuple[list[generate.Generation], float]:
    """What every prompt is continued by, and the seconds, those of the prompts left out without
    `prefill`."""
    if not prompts:
        return [], 0.0
    speaker = dataclasses.replace(speaker, stop_ids=tuple(stop_ids))

    clock = [time.perf_counter()]
    options = {} if prefill else {"ready": lambda: clock.append(time.perf_counter())}
    (found,) = speaker.stream(prompts, sampling, key, chunk=sampling.max_new_tokens, **options)
    return found, time.perf_counter() - clock[-1]
