# SPDX-License-Identifier: Apache-2.0
"""Requests made from a seed, whose answers have parts that can be written at once, or not.

    Count.                                   A: tea 3, pen +4 = 7, cap -2 = 5. A is 5.
    A: tea 3, pen +4, cap -2                 B: nut 6, jar +2 = 8, map +1 = 9. B is 9.
    B: nut 6, jar +2, map +1                 C: B 9, bag -4 = 5, ink +3 = 8. C is 8.
    C: B, bag -4, ink +3

| kind | parts | its program |
|---|---|---|
| `sums` | counts that know nothing of each other | all but the last promised; main writes that |
| `facts` | descriptions of records that are given | the same |
| `plan` | counts, then the one with the most | the same, a sync, the conclusion |
| `linked` | counts, then counts that start from earlier ones | two groups, a sync between them |
| `chain` | each count starts from the one before | no promise |

Only the lines tell whether a count depends on another: a model that promises `C` beside `B` cannot
know where to start, and loses the part. Every part is checked against the request alone. Words of a
request do not repeat, so that a small model can follow them.

Annotators differ: the programs above are those of the `best`; `half` promises half of a group's
parts, `none` nothing, `all` everything at once, whatever it starts from.
"""

import dataclasses
import hashlib
import os
import pathlib
import re
import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from lm.async_decoding import language
from lm.async_decoding.language import Item, Program, Promise, Sync, Text
from lm.data import builders, messages
from lm.data.arithmetic import SPLITS, VALIDATION_SHARE, Split
from lm.data.messages import Conversation, Message
from lm.errors import UserError

KINDS = ("sums", "facts", "plan", "linked", "chain")
ANNOTATORS = ("best", "half", "none", "all")
LEAST_PARTS = 3
_ATTEMPTS = 1000
_LABELS = "ABCDEFGH"
_NAMES = "Ana Ben Cara Dan Eva Finn Gia Hal Ida Jon Kim Leo Mia Ned Ola Pat"
_THINGS = (
    "tea pen cap nut jar map bag ink box cup dye egg fan gem hat ivy jam key log mat net oar pan "
    "rug saw tin urn van wax yam zip bow can dog elk fig gum hen ice jet kit lid mop oak pie ram "
    "sap toy vat wig ale bun cod dew eel fur gin hay jug keg lamp moss nail "
    "oven pear quiz rope soda tent vest wool yarn"
)
_FIELDS = (
    ("likes", "red blue green pink gold grey black white"),
    ("lives in", "Rome Oslo Lima Bern Kyiv Cork Nice Doha"),
    ("keeps a", "cat goat mouse parrot horse rabbit snake frog"),
    ("hears", "jazz rock soul folk opera blues techno punk"),
    ("eats", "rice soup pasta curry salad stew bread beans"),
    ("plays", "chess golf darts polo tennis rugby cards squash"),
    ("rests in", "May June July March April August winter autumn"),
    ("works as a", "baker nurse clerk pilot miner judge smith tailor"),
)
_COUNT, _PLAN, _DESCRIBE = "Count.", "Count, then name the most.", "Describe."
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclasses.dataclass(frozen=True)
class RequestConfig:
    """What requests are made of; every count stays in 0..max_number.

    The defaults suit a model of a few million parameters: parts of about 45 tokens.

    steps: what follows the first entry of a count. fields: of a record. annotators: who annotates
    an answer is drawn from these, a name that stands there twice twice as often.
    """

    kinds: tuple[str, ...] = KINDS
    min_parts: int = 4
    max_parts: int = 8
    min_steps: int = 5
    max_steps: int = 7
    fields: int = 8
    max_number: int = 20
    max_operand: int = 9
    annotators: tuple[str, ...] = ("best",)

    def __post_init__(self) -> None:
        for name, known in (("kinds", KINDS), ("annotators", ANNOTATORS)):
            chosen = getattr(self, name)
            unknown = sorted(set(chosen) - set(known))
            if unknown or not chosen:
                named = ", ".join(unknown) or "none"
                raise UserError(f"requests.{name}: {named}; known: {known}")
        needed, known = self.max_parts * (self.max_steps + 1), len(_THINGS.split())
        checks = {
            "3 <= min_parts <= max_parts <= 8": LEAST_PARTS
            <= self.min_parts
            <= self.max_parts
            <= len(_LABELS),
            "1 <= min_steps <= max_steps": 1 <= self.min_steps <= self.max_steps,
            f"max_parts * (max_steps + 1) <= {known}": needed <= known,
            f"1 <= fields <= {len(_FIELDS)}": 1 <= self.fields <= len(_FIELDS),
            "max_number >= 9": self.max_number >= 9,
            "1 <= max_operand <= max_number": 1 <= self.max_operand <= self.max_number,
        }
        for rule, holds in checks.items():
            if not holds:
                raise UserError(f"requests: {rule} does not hold in {self}")


@dataclasses.dataclass(frozen=True)
class Part:
    """A line of the right answer."""

    label: str
    line: str
    value: str  # what is checked: a count, a name, or the whole line of a description
    after: str = ""  # the label of the part that it starts from
    last: bool = False  # it needs all the others


def generate(
    seed: int, index: int, config: RequestConfig = RequestConfig(), split: Split = "train"
) -> Conversation:
    """The request number `index` and its annotated answer (`language.to_text`); the same arguments
    give the same one, in any order.

    The two splits never share a request, whatever the seeds and indices.
    """
    if split not in SPLITS:
        raise UserError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    rng = np.random.default_rng((seed, index))
    for _ in range(_ATTEMPTS):
        kind = config.kinds[int(rng.integers(len(config.kinds)))]
        prompt = _Author(rng, config).write(kind)
        held_out = zlib.crc32(prompt.encode()) % VALIDATION_SHARE == 0
        if prompt and held_out == (split == "validation"):
            annotator = config.annotators[int(rng.integers(len(config.annotators)))]
            answer = language.to_text(program_of(parts_of(prompt), annotator))
            exchange = (Message("user", prompt), Message("assistant", answer))
            return Conversation(exchange, file=f"requests:{split}", line=index + 1)
    raise UserError(f"requests: too few requests are possible for a {split} split: {config}")


class _Author:
    """Writes one request; "" when the numbers do not allow it."""

    def __init__(self, rng: np.random.Generator, config: RequestConfig):
        self.rng, self.config = rng, config
        things = _THINGS.split()
        self.things = [things[i] for i in rng.permutation(len(things))]
        self.values: dict[str, int] = {}

    def _integer(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high, endpoint=True))

    def write(self, kind: str) -> str:
        count = self._integer(self.config.min_parts, self.config.max_parts)
        if kind == "facts":
            return "\n".join([_DESCRIBE, *self._records(count)])
        first = {"linked": self._integer(2, count - 1), "chain": 1}.get(kind, count)
        lines = []
        for index in range(count):
            start = ""
            if index >= first:
                near = index - 1 if kind == "chain" else self._integer(0, first - 1)
                start = _LABELS[near]
            lines.append(self._count(_LABELS[index], start))
        best = sorted(self.values.values())
        if kind == "plan" and best[-1] == best[-2]:
            return ""
        return "\n".join([_PLAN if kind == "plan" else _COUNT, *lines])

    def _count(self, label: str, start: str) -> str:
        limit = self.config.max_number
        value = self.values[start] if start else self._integer(0, limit)
        entries = [start or f"{self.things.pop()} {value}"]
        for _ in range(self._integer(self.config.min_steps, self.config.max_steps)):
            rooms = {"+": limit - value, "-": value}
            signs = [sign for sign, room in rooms.items() if room > 0]
            sign = signs[self._integer(0, len(signs) - 1)]
            operand = self._integer(1, min(rooms[sign], self.config.max_operand))
            value += operand if sign == "+" else -operand
            entries.append(f"{self.things.pop()} {sign}{operand}")
        self.values[label] = value
        return f"{label}: {', '.join(entries)}"

    def _records(self, count: int) -> list[str]:
        known = _NAMES.split()
        names = [known[i] for i in self.rng.permutation(len(known))[:count]]
        columns = []
        for _, values in _FIELDS[: self.config.fields]:
            known = values.split()
            columns.append([known[i] for i in self.rng.permutation(len(known))[:count]])
        rows = zip(names, *columns, strict=True)
        return [f"{name}: {', '.join(values)}" for name, *values in rows]


# --- what is right


def parts_of(prompt: str) -> list[Part]:
    """The parts of the right answer, read off the request. Raises ValueError for a text that is no
    request made here."""
    task, *lines = prompt.split("\n")
    if task not in (_COUNT, _PLAN, _DESCRIBE) or not lines:
        raise ValueError(f"not a request made here: {prompt!r}")
    parts: list[Part] = []
    values: dict[str, int] = {}
    for line in lines:
        label, _, rest = line.partition(": ")
        entries = rest.split(", ")
        if task == _DESCRIBE:
            known = [f"{verb} {v}" for (verb, _), v in zip(_FIELDS, entries, strict=False)]
            sentence = f"{label} {', '.join(known)}.\n"
            parts.append(Part(label, sentence, sentence))
        else:
            try:
                parts.append(_counted(label, entries, values))
            except (IndexError, ValueError):
                raise ValueError(f"not a request made here: {prompt!r}") from None
    if task == _PLAN:
        best = max(values, key=values.__getitem__)
        parts.append(Part("Most", f"Most: {best}.\n", best, last=True))
    return parts


def _counted(label: str, entries: Sequence[str], values: dict[str, int]) -> Part:
    head, *steps = entries
    after = head if head in values else ""
    value = values[after] if after else int(head.split()[1])
    out = [f"{after} {value}" if after else head]
    for step in steps:
        value += int(step.split()[1])
        out.append(f"{step} = {value}")
    values[label] = value
    line = f"{label}: {', '.join(out)}. {label} is {value}.\n"
    return Part(label, line, str(value), after)


def program_of(parts: Sequence[Part], annotator: str = "best") -> Program:
    """The annotated answer. `best`: parts that start from nothing unwritten are written at once,
    the last of them by main itself; the others are told at the top."""
    groups = [list(parts)] if annotator == "all" else _groups(parts)
    items: list[Item] = []
    threads: list[str] = []
    for number, group in enumerate(groups):
        count = {"half": len(group) // 2, "none": 0}.get(annotator, len(group) - 1)
        promised, own = group[:count], group[count:]
        items += [Promise(part.label, _estimate(part.line)) for part in promised]
        threads += [part.line for part in promised]
        text = "".join(part.line for part in own)
        if items and isinstance(items[-1], Text):
            items[-1] = Text(items[-1].text + text)
        else:
            items.append(Text(text))
        if promised and number < len(groups) - 1:
            items.append(Sync())
    return Program(tuple(items), tuple(threads))


def _groups(parts: Sequence[Part]) -> list[list[Part]]:
    """Parts in their order, each group of those that start from nothing that it holds."""
    groups: list[list[Part]] = []
    for part in parts:
        if not groups or part.last or part.after in [one.label for one in groups[-1]]:
            groups.append([])
        groups[-1].append(part)
    return groups


def _estimate(line: str) -> int:
    """Tokens of a line before a tokenizer is known: its words and signs."""
    return language.reserve(len(_WORD.findall(line)))


def score(prompt: str, answer: str) -> list[bool]:
    """Whether each part of an answer (as a reader sees it, without tags) is right: the count that a
    line ends with, the name that it gives, or the whole description.

    The first line that begins with a part's label is the one that counts.
    """
    lines = answer.split("\n")
    return [_is_right(part, lines) for part in parts_of(prompt)]


def _is_right(part: Part, lines: Sequence[str]) -> bool:
    begins = (f"{part.label}: ", f"{part.label} ")
    line = next((line for line in lines if line.startswith(begins)), None)
    if line is None:
        return False
    if part.value == part.line:
        return f"{line}\n" == part.line
    end = f"Most: {part.value}." if part.last else f". {part.label} is {part.value}."
    return line.endswith(end)


def quality(prompt: str, answer: str) -> float:
    """The share of the parts that are right, 0 to 1."""
    return float(np.mean(score(prompt, answer)))


# --- as a data set


class Requests(builders.ConversationBuilder):
    """Requests with annotated answers made from a seed (`lm.async_decoding.requests`)."""

    def __init__(
        self,
        *,
        data_dir: str | os.PathLike[str],
        size: int,
        seed: int = 0,
        split: Split = "train",
        settings: RequestConfig | None = None,
    ):
        if size < 1:
            raise UserError(f"size must be at least 1, got {size}")
        self.size, self.seed = size, seed
        self.settings = settings or RequestConfig()
        options = {"size": size, "seed": seed, **dataclasses.asdict(self.settings)}
        super().__init__(split, options, data_dir)

    def code_hash(self) -> str:
        digest = hashlib.sha256()
        for module in (language, messages):
            digest.update(pathlib.Path(module.__file__).read_bytes())
        digest.update(pathlib.Path(__file__).read_bytes())
        return digest.hexdigest()

    def conversations(self) -> Iterator[Conversation]:
        for index in range(self.size):
            yield generate(self.seed, index, self.settings, self.split)


@dataclasses.dataclass(frozen=True)
class RequestData:
    """`size` requests, for `lm.data.sources.open_source`; `held_out` ones are never trained on."""

    size: int
    seed: int = 0
    held_out: bool = False
    settings: RequestConfig = RequestConfig()
    split: Split = "train"  # of what is prepared: all of it is one split or the other
    validation_fraction: float = 0.0

    def builder(self, data_dir: str) -> Requests:
        split: Split = "validation" if self.held_out else "train"
        return Requests(
            data_dir=data_dir, size=self.size, seed=self.seed, split=split, settings=self.settings
        )
