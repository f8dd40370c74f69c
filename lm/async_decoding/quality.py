# SPDX-License-Identifier: Apache-2.0
"""How good an answer is, from 0 to 1: by the request itself, by a reference, or by itself.

A scorer takes a question and what a reader gets of the answer. `lm.async_decoding.judge` has the
ones that ask a model.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lm.async_decoding import language, requests, runs
from lm.async_decoding.assembly import Assembly
from lm.data.conversations import Conversation
from lm.errors import UserError
from lm.progress import say
from lm.text.chat import ChatTemplate
from lm.text.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked, and an answer to compare with: a right one, or a baseline's; "" is none."""

    prompt: str
    reference: str = ""


Scorer = Callable[[Question, Assembly], float]

_TOKEN = re.compile(r"\w+")
# "A is 7", "A: 7", "Paris has 3": a name and what is said of it, up to the end of the clause
_STATED = re.compile(
    r"(?<!\w)([A-Z]\w*(?: [A-Z]\w*){0,3}) "
    r"(is|was|are|were|has|costs|likes|lives in|weighs|equals|=) ([^.,;:\n]+)"
)


def words(text: str) -> list[str]:
    """Runs of letters and digits, in lower case."""
    return _TOKEN.findall(text.lower())


def token_f1(reference: str, answer: str) -> float:
    """Harmonic mean of the shares of words in common, repeated ones counted as often as they stand
    in both (SQuAD, arXiv 1606.05250, without dropping articles)."""
    ours, theirs = collections.Counter(words(answer)), collections.Counter(words(reference))
    return _harmonic((ours & theirs).total(), ours.total(), theirs.total())


def rouge_l(reference: str, answer: str) -> float:
    """F-measure of the longest common subsequence of words (Lin, 2004, with equal weights)."""
    ours, theirs = words(answer), words(reference)
    ids = {word: number for number, word in enumerate(dict.fromkeys((*ours, *theirs)))}
    first, second = (np.array([ids[word] for word in text], np.int64) for text in (ours, theirs))
    row = np.zeros(len(second) + 1, np.int64)
    for word in first:
        taken = np.concatenate([[0], row[:-1] + (second == word)])
        row = np.maximum.accumulate(np.maximum(row, taken))
    return _harmonic(int(row[-1]), len(ours), len(theirs))


def _harmonic(common: int, ours: int, theirs: int) -> float:
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * common / (ours + theirs)


def facts(text: str) -> list[tuple[str, str]]:
    """(what, value) of each statement: of an embedded request's answer the counts that lines end
    with and start from, of other text clauses like `Ada is 36` with the verb in `what`."""
    found = []
    for line in text.split("\n"):
        found += [(f"{name} {verb}", value.strip()) for name, verb, value in _STATED.findall(line)]
        if counted := re.match(r"([A-H]): ([A-H]) (\d+),", line):
            found.append((f"{counted[2]} is", counted[3]))
    return found


def consistency(assembly: Assembly) -> float:
    """Share of the facts stated in several places of an answer that are stated alike: in two
    blocks, or in a block and in main. 1 when no fact is stated twice.

    Places are threads: within a thread the writer saw what it had said.
    """
    stated: dict[str, dict[int, set[str]]] = {}
    for thread, text in assembly.segments:
        for what, value in facts(text):
            stated.setdefault(what, {}).setdefault(thread, set()).add(value)
    shared = [places for places in stated.values() if len(places) > 1]
    agreed = [len(set.union(*places.values())) == 1 for places in shared]
    return float(np.mean(agreed)) if agreed else 1.0


def _of_request(question: Question, assembly: Assembly) -> float:
    try:
        return requests.quality(question.prompt, assembly.text)
    except ValueError:
        raise UserError(
            "the scorer requests is for the embedded requests; choose token_f1 or rouge_l"
        ) from None


def _by_reference(
    measure: Callable[[str, str], float],
) -> Scorer:
    def score(question: Question, assembly: Assembly) -> float:
        if not question.reference:
            raise UserError(f"{measure.__name__} needs references, and a question has none")
        return measure(question.reference, assembly.text)

    return score


SCORERS: Mapping[str, Scorer] = {
    "requests": _of_request,  # exact: the share of the parts that are right
    "token_f1": _by_reference(token_f1),
    "rouge_l": _by_reference(rouge_l),
    "consistency": lambda question, assembly: consistency(assembly),
}


def scorer(name: str) -> Scorer:
    """A scorer by name. Raises UserError."""
    if name not in SCORERS:
        raise UserError(f"scorer {name!r} is not one of {', '.join(SCORERS)}")
    return SCORERS[name]


def questions(conversations: Sequence[Conversation]) -> list[Question]:
    """The first exchange of each conversation that begins with a user; its answer without tags is
    the reference. How many begin otherwise is said. Raises UserError when all do."""
    found = []
    for conversation in conversations:
        first, *rest = conversation.messages
        if first.role == "user":
            answered = rest and rest[0].role == "assistant"
            found.append(
                Question(first.content, runs.without_tags(rest[0].content) if answered else "")
            )
    if not found:
        raise UserError("no conversation begins with a user's message")
    if left := len(conversations) - len(found):
        say(f"{left} of {len(conversations)} conversations begin with no user's message: not asked")
    return found


def encode_prompt(prompt: str, template: ChatTemplate, tokenizer: Tokenizer) -> np.ndarray:
    """A question's ids [n] int32, as the template shows it to the assistant."""
    text = template.render([{"role": "user", "content": prompt}], add_generation_prompt=True)
    return language.encode_prompt(text, tokenizer)


def sequential_length(question: Question, tokenizer: Tokenizer) -> int:
    """Tokens that the reference takes one after another, its end included."""
    return len(language.encode_prompt(question.reference, tokenizer)) + 1
