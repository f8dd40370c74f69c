# SPDX-License-Identifier: Apache-2.0
"""Gates on results: a command with --require='exact_match>=0.9' ends with status 1 below that."""

import dataclasses
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from lm.errors import UserError

_OPERATORS = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}
_PATTERN = re.compile(r"\s*(\w+)\s*(>=|<=|==|>|<)\s*(\S+)\s*")


@dataclasses.dataclass(frozen=True)
class Requirement:
    """`name` compared with `limit`; a NaN never holds."""

    name: str
    symbol: str
    limit: float

    def holds(self, value: float) -> bool:
        return _OPERATORS[self.symbol](value, self.limit)

    def __str__(self) -> str:
        return f"{self.name}{self.symbol}{self.limit:g}"


def define(names: Sequence[str]) -> flags.FlagHolder[list[str]]:
    """The --require flag of a command whose results have these names."""
    return flags.DEFINE_multi_string(
        "require",
        [],
        f"NAME>=NUMBER (or <=, >, <, ==): exit status 1 unless it holds; {', '.join(names)}",
    )


def parse(texts: Sequence[str], names: Sequence[str]) -> list[Requirement]:
    """The requirements of a command line; UserError on a bad form or a name that is not a result.

    A text may hold several, separated by commas.
    """
    found = []
    for text in (part for whole in texts for part in whole.split(",")):
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise UserError(f"--require={text!r}: expected a form like {names[0]}>=0.9")
        name, symbol, number = match.groups()
        if name not in names:
            raise UserError(f"--require={text!r}: {name} is not one of {', '.join(names)}")
        try:
            found.append(Requirement(name, symbol, float(number)))
        except ValueError:
            raise UserError(f"--require={text!r}: {number!r} is not a number") from None
    return found


def failures(requirements: Sequence[Requirement], result: Mapping[str, Any]) -> list[str]:
    """What does not hold, in words."""
    return [
        f"{requirement.name}={result[requirement.name]:.4g}, required {requirement}"
        for requirement in requirements
        if not requirement.holds(result[requirement.name])
    ]
