# SPDX-License-Identifier: Apache-2.0
"""Questions for whatever continues prompts: tasks by length, or a file of the user's; and what the
answers are worth.

A method is a `Continue`: it is given batches of prompts that fit into a capacity. All batches of a
set of questions have one capacity, so that a method compiles once for them.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lm import prompting
from lm.errors import DataError, UserError
from lm.generate import Generation
from lm.long_context import longbench, samples, scoring
from lm.long_context.tasks import Task
from lm.progress import Progress
from lm.prompting import Speaker

# (prompts, tokens to generate, tokens of the context with those, their numbers) -> what each gave,
# the mean number of tokens that a step and layer of it read, and what its guard counted, [B] each
Continue = Callable[
    [Sequence[np.ndarray], int, int, Sequence[int]],
    tuple[list[Generation], np.ndarray, Mapping[str, np.ndarray]],
]
_SLACK = 8  # tokens by which a template's own may vary from one message to another
_MARK = "\ufdd0"  # no character of any text


@dataclasses.dataclass(frozen=True, eq=False)
class Questions:
    """Prompts of one kind, and how their answers are scored."""

    name: str
    length: int  # tokens of a context, those to generate included
    new_tokens: int
    prompts: tuple[np.ndarray, ...]  # int32 [n] each
    outputs: tuple[tuple[str, ...], ...]  # right answers; () without any
    score: Callable[[str, Sequence[str]], float]
    seed: int = 0
    contexts: tuple[int, ...] = ()  # tokens of each prompt before its question; () where not told


@dataclasses.dataclass(frozen=True, eq=False)
class Answers:
    """What a method wrote, and what it read for it."""

    tokens: list[np.ndarray]
    reads: np.ndarray  # [samples] tokens, mean per step and layer; NaN without a step
    guard: Mapping[str, np.ndarray]  # [samples] each: `guard.Report`; empty without a guard


def of_task(
    speaker: Speaker,
    task: Task,
    length: int,
    count: int,
    seed: int,
    *,
    chat: bool = False,
    essay: tuple[str, ...] = (),
    apart: bool = False,
    new_tokens: int = 0,
) -> Questions:
    """Samples of a task as prompts.

    Args:
      length: tokens, those to generate and those of the template included, or the one that opens
        plain text.
      chat: through the speaker's template, the beginning of the answer after the assistant's
        header; otherwise as plain text.
      apart: context and question are encoded each by itself, and `contexts` says where they meet.
      new_tokens: that an answer may take; 0: as many as the task says, which is the least.

    Raises UserError: fewer new tokens than the task's, a length below its smallest form, an essay
    that is missing.
    """
    opened = len(encode(speaker, "x", "", chat)) - len(speaker.tokenizer.encode("x"))
    spent = opened + (_SLACK if chat else 0)
    if 0 < new_tokens < task.new_tokens:
        raise UserError(
            f"tasks.eval_tokens={new_tokens}: an answer of {task.name} takes {task.new_tokens}"
        )
    spent += max(new_tokens - task.new_tokens, 0)
    essay = () if task.essay == "no" else essay
    made = samples.samples(task, length - spent, count, seed, speaker.tokenizer, essay)
    if apart:
        parts = [(x.input[: x.context], x.input[x.context :], x.answer_prefix) for x in made]
        prompts, contexts = _apart(speaker, parts, chat)
    else:
        prompts = tuple(encode(speaker, x.input, x.answer_prefix, chat) for x in made)
        contexts = ()
    found = Questions(
        task.name,
        length,
        new_tokens or task.new_tokens,
        prompts,
        tuple(x.outputs for x in made),
        task.score,
        seed,
        contexts,
    )
    _check(found)
    return found


def of_longbench(
    speaker: Speaker,
    path: pathlib.Path,
    *,
    chat: bool = False,
    capacity: int | None = None,
    apart: bool = False,
    templates: Mapping[str, str] | None = None,
) -> list[Questions]:
    """The datasets of a file in LongBench's format, each with its scorer and answer length.

    A question's classes are those of its dataset's first record. Raises UserError and DataError.
    """
    records = longbench.read(path, templates)
    found = []
    for name in dict.fromkeys(record.dataset for record in records):
        own = [record for record in records if record.dataset == name]
        if apart:
            parts = [(record.context, record.question, "") for record in own]
            prompts, contexts = _apart(speaker, parts, chat)
        else:
            prompts = tuple(speaker.prompt(x.context + x.question, chat=chat) for x in own)
            contexts = ()
        new_tokens = longbench.of(name).new_tokens
        length = capacity or max(len(prompt) for prompt in prompts) + new_tokens
        outputs = tuple(record.answers for record in own)
        score = functools.partial(longbench.score, name, own[0].classes)
        found.append(Questions(name, length, new_tokens, prompts, outputs, score, 0, contexts))
        _check(found[-1])
    return found


def _apart(
    speaker: Speaker, parts: Sequence[tuple[str, str, str]], chat: bool
) -> tuple[tuple[np.ndarray, ...], tuple[int, ...]]:
    """Prompts of (context, question, beginning of the answer), and the tokens of each context: with
    a template what it puts before the context is part of that."""
    prompts, contexts = [], []
    for context, question, prefix in parts:
        opened = speaker.rendered(context + question, chat=chat) + prefix
        # not where the context stands in it: templates trim what they are given, and write words
        # that a short one may be
        marked = speaker.rendered(context + _MARK + question, chat=chat)
        pairs = enumerate(zip(opened, marked, strict=False))
        end = next((i for i, (one, other) in pairs if one != other), len(opened))
        first, rest = (speaker.tokenizer.encode(x) for x in (opened[:end], opened[end:]))
        prompts.append(np.concatenate([first, rest]).astype(np.int32))
        contexts.append(len(first))
    return tuple(prompts), tuple(contexts)


def of_file(
    speaker: Speaker,
    path: pathlib.Path,
    new_tokens: int,
    *,
    chat: bool = False,
    capacity: int | None = None,
) -> Questions:
    """The user's prompts; see `read`.

    capacity: tokens of a context; None takes what the longest prompt needs.

    Raises UserError and DataError.
    """
    records = read(path)
    prompts = tuple(encode(speaker, text, prefix, chat) for text, prefix, _ in records)
    outputs = tuple(outputs for _, _, outputs in records)
    some = [bool(x) for x in outputs]
    if any(some) and not all(some):
        raise UserError(f"{path}: prompt {some.index(False)} has no references, others have")
    if capacity is None:
        capacity = max(len(prompt) for prompt in prompts) + new_tokens
    outputs = outputs if any(some) else ()
    found = Questions(path.stem, capacity, new_tokens, prompts, outputs, scoring.fraction_found)
    _check(found)
    return found


def read(path: pathlib.Path) -> list[tuple[str, str, tuple[str, ...]]]:
    """(text, beginning of the answer, right answers) of every line that is not blank.

    A line is a JSON object with a "prompt" and maybe "references" (a text or a list of texts), or
    with the "input", "answer_prefix" and "outputs" of generated samples; other lines are prompts as
    they are.

    Raises UserError when the file cannot be read or is empty, DataError for another object.
    """
    lines = prompting.read_lines(path)
    found = [_record(path, n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise UserError(f"{path}: no prompts: the file is empty")
    return found


def _record(path: pathlib.Path, number: int, line: str) -> tuple[str, str, tuple[str, ...]]:
    try:
        fields = json.loads(line) if line.lstrip().startswith("{") else None
    except ValueError:
        fields = None  # text that happens to begin with a brace
    if fields is None:
        return line, "", ()
    text = fields.get("prompt", fields.get("input"))
    prefix = fields.get("answer_prefix", "")
    outputs = fields.get("references", fields.get("outputs", []))
    outputs = [outputs] if isinstance(outputs, str) else outputs
    if not isinstance(text, str) or not isinstance(prefix, str):
        raise DataError(str(path), number, "a JSON object without a text under 'prompt'")
    if not isinstance(outputs, list) or not all(isinstance(x, str) for x in outputs):
        raise DataError(str(path), number, "'references' must be a text or a list of texts")
    return text, prefix, tuple(outputs)


def encode(speaker: Speaker, text: str, prefix: str, chat: bool) -> np.ndarray:
    """The ids of a prompt and the beginning of its answer. Raises UserError."""
    if not chat:
        return speaker.prompt(text + prefix, chat=False)
    if speaker.template is None:
        return speaker.prompt(text, chat=True)  # which says that there is none
    messages = [{"role": "user", "content": text}]
    opened = speaker.template.render(messages, add_generation_prompt=True)
    return speaker.tokenizer.encode(opened + prefix)


def _check(questions: Questions) -> None:
    room = questions.length - questions.new_tokens
    for number, prompt in enumerate(questions.prompts):
        if len(prompt) > room:
            raise UserError(
                f"{questions.name}: prompt {number} has {len(prompt)} tokens and "
                f"{questions.new_tokens} new ones are asked for: they do not fit into a context of "
                f"{questions.length}"
            )


def ask(
    method: Continue, questions: Questions, batch_size: int, progress: Progress | None = None
) -> Answers:
    """Puts all questions to a method, prompts of like length together."""
    count = len(questions.prompts)
    order = sorted(range(count), key=lambda i: len(questions.prompts[i]))
    tokens: list[np.ndarray] = [np.zeros(0, np.int32)] * count
    reads = np.full(count, np.nan)
    guard: dict[str, np.ndarray] = {}
    for first in range(0, count, batch_size):
        batch = order[first : first + batch_size]
        prompts = [questions.prompts[i] for i in batch]
        # the last batch is filled up: it takes the others' program
        fill = (min(batch_size, count) - len(batch)) * [prompts[-1][:1]]
        numbers = [*batch, *[batch[-1]] * len(fill)]
        made, read, counts = method(
            [*prompts, *fill], questions.new_tokens, questions.length, numbers
        )
        for place, number in enumerate(batch):
            tokens[number], reads[number] = made[place].tokens, read[place]
        for name, values in counts.items():
            guard.setdefault(name, np.zeros(count, values.dtype))[batch] = values[: len(batch)]
        if progress is not None:
            progress.advance(len(batch))
    return Answers(tokens, reads, guard)


def scores(questions: Questions, speaker: Speaker, answers: Answers) -> list[float] | None:
    """From 0 to 1 each; None where right answers are not known."""
    if not questions.outputs:
        return None
    texts = [speaker.tokenizer.decode(ids, skip_special=True) for ids in answers.tokens]
    pairs = zip(texts, questions.outputs, strict=True)
    return [float(questions.score(text, outputs)) for text, outputs in pairs]


def fingerprint(parts: Any) -> str:
    """A short digest of what a row was measured under; `parts` as JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
