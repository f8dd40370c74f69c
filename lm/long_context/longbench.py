# SPDX-License-Identifier: Apache-2.0
"""Files in LongBench's format (arXiv 2308.14508): prompts, answer lengths and scorers by dataset.

A line is a JSON object with `context`, `input` (the question), `answers`, `dataset` and maybe
`all_classes`. An answer's score is the best over its references, from 0 to 1:

| kind | datasets | score |
|---|---|---|
| qa | questions | F1 of words (SQuAD, arXiv 1606.05250) |
| summary | summaries | ROUGE-L (Lin, 2004): F1 of the longest common subsequence of words |
| class | trec, lsht | 1 / classes that the text names, if the right one is among them |
| code | lcc, repobench-p | edit similarity: 2 LCS / (characters of both), of a line |
| number | counts, retrieval | of the numbers in the text, the share that is right |

The published prompts differ by dataset; these are plain ones of our own by kind, so scores compare
methods with each other and not with published tables. `templates` takes others, such as the
published dataset2prompt.json. Deviates: ROUGE-L is of the whole text, where the package that was
used for the tables joins sentences. What is scored by Chinese words (dureader, multifieldqa_zh,
vcsum) is refused: to tell them apart takes jieba, which is no dependency.
"""

import dataclasses
import json
import pathlib
import re
import string
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from lm import prompting
from lm.errors import DataError, UserError

_FIELDS = ("context", "answers")  # what tells these lines from other files of prompts
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"\d+")
_PLAIN = str.maketrans("", "", string.punctuation)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """How a dataset is asked and scored."""

    kind: str = "qa"
    new_tokens: int = 64
    first_line: bool = False  # only that of the answer counts


DATASETS = {
    "narrativeqa": Dataset(new_tokens=128),
    "qasper": Dataset(new_tokens=128),
    "multifieldqa_en": Dataset(),
    "hotpotqa": Dataset(new_tokens=32),
    "2wikimqa": Dataset(new_tokens=32),
    "musique": Dataset(new_tokens=32),
    "triviaqa": Dataset(new_tokens=32, first_line=True),
    "gov_report": Dataset("summary", 512),
    "qmsum": Dataset("summary", 512),
    "multi_news": Dataset("summary", 512),
    "samsum": Dataset("summary", 128, first_line=True),
    "trec": Dataset("class", first_line=True),
    "lsht": Dataset("class", first_line=True),
    "passage_count": Dataset("number", 32),
    "passage_retrieval_en": Dataset("number", 32),
    "passage_retrieval_zh": Dataset("number", 32),
    "lcc": Dataset("code"),
    "repobench-p": Dataset("code"),
}
_SEGMENTED = ("dureader", "multifieldqa_zh", "vcsum")  # published, without a scorer here
_PROMPTS = {
    "qa": "{context}\n\nAnswer from the text above, as briefly as you can.\n{input}\nAnswer:",
    "summary": "{context}\n\nSummarise the text above. {input}\nSummary:",
    "class": "{context}\n{input}",
    "number": "{context}\n\n{input}\nAnswer with a number alone:",
    "code": "{context}{input}",
}


@dataclasses.dataclass(frozen=True)
class Record:
    """One question."""

    dataset: str
    context: str  # the prompt up to the question
    question: str  # the rest of the prompt
    answers: tuple[str, ...]
    classes: tuple[str, ...]


def is_file(path: pathlib.Path) -> bool:
    """Whether the first line of a file is a record in this format."""
    try:
        with path.open(encoding="utf-8") as file:
            fields = json.loads(next(line for line in file if line.strip()))
    except (OSError, ValueError, StopIteration):
        return False  # whoever reads it as something else says what is wrong
    return isinstance(fields, dict) and all(name in fields for name in _FIELDS)


def read(path: pathlib.Path, templates: Mapping[str, str] | None = None) -> list[Record]:
    """The records of a file; templates: of prompts, by dataset, with {context} and {input}.

    Raises UserError when it cannot be read, for templates that no record takes and for datasets
    without a scorer, DataError for another kind of line.
    """
    lines = prompting.read_lines(path)
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError:
            raise DataError(str(path), number, "not a JSON object") from None
        found.append(_record(path, number, fields, templates or {}))
    _check_templates(templates or {}, {record.dataset for record in found})
    return found


def _check_templates(templates: Mapping[str, str], names: Collection[str]) -> None:
    """Raises UserError. A table may be of all that was published, of which a file holds a part."""
    used = {_template_of(name, templates) for name in names} & templates.keys()
    fine = {name for name in templates if name.removesuffix("_e") in (*DATASETS, *_SEGMENTED)}
    unused = [name for name in templates if not used or name not in used | fine]
    if unused:
        raise UserError(
            f"no record takes the templates of {', '.join(unused)}: the file's datasets are "
            + ", ".join(sorted(names))
        )


def _template_of(name: str, templates: Mapping[str, str]) -> str:
    """Under which name a dataset's template stands."""
    return name if name in templates else name.removesuffix("_e")


def _record(path: pathlib.Path, number: int, fields: Any, templates: Mapping[str, str]) -> Record:
    if not isinstance(fields, dict):
        raise DataError(str(path), number, "not a JSON object")
    name = fields.get("dataset", path.stem)
    texts = name, fields.get("context"), fields.get("input", "")
    if not all(isinstance(text, str) for text in texts):
        raise DataError(str(path), number, "'dataset', 'context' and 'input' must be texts")
    answers = fields.get("answers")
    classes = fields.get("all_classes") or []
    for listed in (answers, classes):
        if not isinstance(listed, list) or not all(isinstance(x, str) for x in listed):
            raise DataError(str(path), number, "'answers' and 'all_classes' must be lists of texts")
    if not answers:
        raise DataError(str(path), number, "'answers' is empty")
    if name.removesuffix("_e") in _SEGMENTED:
        raise UserError(
            f"{path}: {name} is scored by Chinese words, and jieba, which tells them apart, is no "
            "dependency: leave its records out"
        )
    template = templates.get(_template_of(name, templates), _PROMPTS[of(name).kind])
    before, mark, after = template.partition("{context}")
    if not mark or "{input}" in before:
        raise UserError(f"the template of {name} must have {{context}}, and {{input}} after it")
    asked = after.replace("{input}", texts[2])
    return Record(name, before + texts[1], asked, tuple(answers), tuple(classes))


def read_templates(path: pathlib.Path) -> dict[str, str]:
    """Prompts by dataset from a JSON object. Raises UserError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(found, dict) or not all(isinstance(x, str) for x in found.values()):
        raise UserError(f"{path}: expected a JSON object of prompts by dataset")
    return found


def of(name: str) -> Dataset:
    """A dataset by name, with or without the "_e" of LongBench-E; an unknown one is questions."""
    return DATASETS.get(name, DATASETS.get(name.removesuffix("_e"), Dataset()))


def score(dataset: str, classes: Sequence[str], prediction: str, answers: Sequence[str]) -> float:
    """The best of an answer over its references, from 0 to 1."""
    about = of(dataset)
    if about.first_line:
        prediction = prediction.lstrip("\n").split("\n")[0]
    if about.kind == "class":
        return max(class_score(prediction, answer, classes) for answer in answers)
    found = {"qa": f1, "summary": rouge_l, "code": edit_similarity, "number": number_score}
    return max(found[about.kind](prediction, answer) for answer in answers)


def normalized(text: str) -> list[str]:
    """Words in lower case without punctuation and articles (SQuAD's rule)."""
    return _ARTICLES.sub(" ", text.lower().translate(_PLAIN)).split()


def f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall of words, each counted as often as it stands there."""
    found, wanted = normalized(prediction), normalized(answer)
    same = sum((Counter(found) & Counter(wanted)).values())
    return _f(same, len(found), len(wanted))


def rouge_l(prediction: str, answer: str) -> float:
    """F1 of the longest common subsequence of words as they are written."""
    found, wanted = prediction.split(), answer.split()
    return _f(common(found, wanted), len(found), len(wanted))


def class_score(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """1 / the number of classes that the text names, parts of the right one's name aside."""
    named = [c for c in classes if c in prediction and (c == answer or c not in answer)]
    return 1 / len(named) if answer in named else 0.0


def edit_similarity(prediction: str, answer: str) -> float:
    """1 - (insertions and deletions) / (characters of both), of the first line that is neither a
    comment nor a fence."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((x for x in lines if not any(mark in x for mark in ("`", "#", "//"))), "")
    return _f(common(line, answer), len(line), len(answer))


def number_score(prediction: str, answer: str) -> float:
    """The share of the numbers in the text that are the answer's."""
    wanted = _NUMBER.search(answer)
    found = _NUMBER.findall(prediction)
    if wanted is None or not found:
        return 0.0
    return found.count(wanted.group()) / len(found)


def common(first: Sequence[str], last: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the table at a time."""
    if not len(first) or not len(last):
        return 0
    numbers: dict[str, int] = {}
    first, last = (
        np.array([numbers.setdefault(x, len(numbers)) for x in text]) for text in (first, last)
    )
    row = np.zeros(len(last) + 1, np.int64)
    for item in first:
        taken = row[:-1] + (last == item)
        row[1:] = np.maximum.accumulate(np.maximum(taken, row[1:]))
    return int(row[-1])


def _f(same: int, found: int, wanted: int) -> float:
    return 2 * same / (found + wanted) if same else 0.0
