# SPDX-License-Identifier: Apache-2.0
"""Multi-turn arithmetic conversations made from a seed: data that needs no download.

Each user turn builds on earlier answers, the thought does the steps, the response states the
result:

    user       Start with 7 and add 5.
    assistant  (7+5=12) It is 12.
    user       Now subtract 4 from that.
    assistant  (12-4=8) It is 8.
    user       Add the first answer to that.
    assistant  (8+12=20) It is 20.

Every turn has one right answer, fixed by the text alone, that a byte-level model of a million
parameters can learn. With `tools`, products go through a calculator: call, result, response.
"""

import dataclasses
import json
import re
import zlib
from typing import Any, Literal

import numpy as np

from lm.data.messages import Conversation, Message
from lm.errors import UserError

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
VALIDATION_SHARE = 8  # one conversation in eight is held out, chosen by its text
_ATTEMPTS = 10_000

CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluates a product.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}

_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
_OPENINGS = {
    "+": ("Start with {a} and add {n}.", "What is {a} plus {n}?", "Take {a}, then add {n}."),
    "-": (
        "Start with {a} and subtract {n}.",
        "What is {a} minus {n}?",
        "Take {a}, then subtract {n}.",
    ),
}
_STEPS = {
    "+": ("Now add {n} to that.", "What is that plus {n}?", "Then add {n}."),
    "-": ("Now subtract {n} from that.", "What is that minus {n}?", "Then subtract {n}."),
    "*": ("Now multiply that by {n}.", "What is that times {n}?", "Then multiply by {n}."),
}
_SECOND = {"+": ", then add {n}", "-": ", then subtract {n}"}
_RECALLS = {
    "+": ("Add the {k} answer to that.", "Add {n} to the {k} answer."),
    "-": ("Subtract the {k} answer from that.", "Subtract {n} from the {k} answer."),
}
_ANSWER = re.compile(r"\bIt is (-?\d+)\.")
_PRODUCT = re.compile(r"\s*(-?\d{1,18})\s*([-+*])\s*(-?\d{1,18})\s*")


@dataclasses.dataclass(frozen=True)
class ArithmeticConfig:
    """What the conversations are made of; every number that occurs lies in 0..max_number.

    The defaults are meant for a model of a million parameters and minutes of training on a CPU: the
    range of numbers matters most, then two steps, references and wordings.

    max_operand: the largest number that a step adds or subtracts.
    two_steps: share of the turns after the first that ask for two steps.
    recall: share of the turns after the second that name an earlier answer ("the first answer").
    phrasings: how many wordings of each question occur, 1 to 3.
    tools: products occur too, and go through the calculator; tool_rate: share of turns that do so.
    """

    min_turns: int = 2
    max_turns: int = 4
    max_number: int = 20
    max_operand: int = 9
    two_steps: float = 0.0
    recall: float = 0.1
    phrasings: int = 1
    tools: bool = False
    tool_rate: float = 0.3

    def __post_init__(self) -> None:
        checks = {
            "1 <= min_turns <= max_turns": 1 <= self.min_turns <= self.max_turns,
            "max_number >= 9": self.max_number >= 9,
            "1 <= max_operand <= max_number": 1 <= self.max_operand <= self.max_number,
            "0 <= two_steps <= 1": 0 <= self.two_steps <= 1,
            "0 <= recall <= 1": 0 <= self.recall <= 1,
            "0 <= tool_rate <= 1": 0 <= self.tool_rate <= 1,
            "1 <= phrasings <= 3": 1 <= self.phrasings <= 3,
        }
        for rule, holds in checks.items():
            if not holds:
                raise UserError(f"arithmetic: {rule} does not hold in {self}")


def generate(
    seed: int,
    index: int,
    config: ArithmeticConfig = ArithmeticConfig(),
    split: Split = "train",
) -> Conversation:
    """The conversation number `index`; the same arguments give the same one, in any order.

    The two splits never share a conversation, whatever the seeds and indices: the questions of a
    conversation decide to which split it belongs.
    """
    if split not in SPLITS:
        raise UserError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    rng = np.random.default_rng((seed, index))
    for _ in range(_ATTEMPTS):
        messages = _Author(rng, config).write()
        questions = "\n".join(m.content for m in messages if m.role == "user")
        held_out = zlib.crc32(questions.encode()) % VALIDATION_SHARE == 0
        if held_out == (split == "validation"):
            return Conversation(
                messages=messages,
                tools=(CALCULATOR,) if config.tools else None,
                file=f"arithmetic:{split}",
                line=index + 1,
            )
    raise UserError(f"arithmetic: too few conversations are possible for a {split} split: {config}")


def answer(content: str) -> str | None:
    """The number that an assistant's response states, or None when it states none."""
    found = _ANSWER.findall(content)
    return found[-1] if found else None


def expected(conversation: Conversation) -> list[str]:
    """The right answers, one for each user turn of the main thread."""
    out = []
    for message in conversation.messages:
        if message.role == "assistant" and not message.tool_calls:
            stated = answer(message.content)
            if stated is None:
                raise ValueError(
                    f"not a conversation made here: {message.content!r} states nothing"
                )
            out.append(stated)
    return out


def calculator(arguments: dict[str, Any] | str) -> str:
    """What the calculator returns for a call's arguments: `A*B`, `A+B`, `A-B`, else "error"."""
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        left, operator, right = _PRODUCT.fullmatch(arguments["expression"]).groups()
    except (ValueError, KeyError, TypeError, AttributeError):
        return "error"
    return str(_apply(int(left), operator, int(right)))


def _apply(left: int, operator: str, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right}[operator]


class _Author:
    """Writes one conversation, keeping the answers given so far."""

    def __init__(self, rng: np.random.Generator, config: ArithmeticConfig):
        self.rng, self.config = rng, config
        self.answers: list[int] = []
        self.messages: list[Message] = []

    def write(self) -> tuple[Message, ...]:
        turns = self._integer(self.config.min_turns, self.config.max_turns)
        self._opening()
        while len(self.answers) < turns:
            can_recall = len(self.answers) >= 2
            if self._happens(self.config.tool_rate * self.config.tools) and self._product():
                continue
            if can_recall and self._happens(self.config.recall) and self._recall():
                continue
            self._steps()
        return tuple(self.messages)

    def _integer(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high, endpoint=True))

    def _happens(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def _wording(self, wordings: tuple[str, ...]) -> str:
        return wordings[self._integer(0, self.config.phrasings - 1)]

    def _step(self, value: int) -> tuple[str, int]:
        """An operator and an operand that keep the result within bounds."""
        limits = {"+": self.config.max_number - value, "-": value}
        choices = [operator for operator, limit in limits.items() if limit > 0]
        operator = choices[self._integer(0, len(choices) - 1)]
        return operator, self._integer(1, min(limits[operator], self.config.max_operand))

    def _opening(self) -> None:
        start = self._integer(0, self.config.max_number)
        operator, operand = self._step(start)
        question = self._wording(_OPENINGS[operator]).format(a=start, n=operand)
        self._say(question, [(start, operator, operand)])

    def _steps(self) -> None:
        value = self.answers[-1]
        operator, operand = self._step(value)
        question = self._wording(_STEPS[operator]).format(n=operand)
        steps = [(value, operator, operand)]
        if self._happens(self.config.two_steps):
            value = _apply(value, operator, operand)
            operator, operand = self._step(value)
            end = question[-1]
            question = question[:-1] + _SECOND[operator].format(n=operand) + end
            steps.append((value, operator, operand))
        self._say(question, steps)

    def _recall(self) -> bool:
        """A question that names an earlier answer; False when the numbers do not allow it."""
        which = self._integer(0, min(len(self.answers) - 1, len(_ORDINALS)) - 1)
        early, last = self.answers[which], self.answers[-1]
        both = self._happens(0.5)
        if both:
            operator = "-" if early <= last else "+"
            step = (last, operator, early)
            if not 0 <= _apply(*step) <= self.config.max_number:
                return False
        else:
            step = (early, *self._step(early))
        wording = _RECALLS[step[1]][0 if both else 1]
        self._say(wording.format(k=_ORDINALS[which], n=step[2]), [step])
        return True

    def _product(self) -> bool:
        """A question for the calculator; False when no product stays within bounds."""
        value = self.answers[-1]
        limit = min(self.config.max_operand, self.config.max_number // max(value, 1))
        if limit < 2:
            return False
        factor = self._integer(2, limit)
        expression = f"{value}*{factor}"
        result = value * factor
        name = f"call_{len(self.answers) + 1}"
        function = {"name": "calculator", "arguments": {"expression": expression}}
        call = {"id": name, "type": "function", "function": function}
        self.messages += [
            Message("user", self._wording(_STEPS["*"]).format(n=factor)),
            Message("assistant", "", thought=expression, tool_calls=(call,)),
            Message("tool", str(result), tool_call_id=name, name="calculator"),
            Message("assistant", f"It is {result}."),
        ]
        self.answers.append(result)
        return True

    def _say(self, question: str, steps: list[tuple[int, str, int]]) -> None:
        results = [_apply(*step) for step in steps]
        thought = ", ".join(
            f"{left}{operator}{right}={result}"
            for (left, operator, right), result in zip(steps, results, strict=True)
        )
        self.messages += [
            Message("user", question),
            Message("assistant", f"It is {results[-1]}.", thought=thought),
        ]
        self.answers.append(results[-1])
