# SPDX-License-Identifier: Apache-2.0
"""From the samples of one conversation to layouts: one tree, N chains, or something between.

| mode | layouts of a conversation |
|---|---|
| `tree` | one prefix tree |
| `n_pass` | one chain per sample: the baseline, strictly |
| `n_pass_merged` | one chain per sample that no other extends; it trains those that it extends |
| `k_pass:K` | K contiguous groups of samples, one tree each |
| `paper` | the duplicate layout of arXiv 2504.18246, corrected |

All give the same multiset of (context, target, weight), hence the same loss. With a `seq_len`, a
tree that does not fit becomes several trees of consecutive samples, which repeat their common
ancestors.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence

from absl import logging

from lm.data.layout import Layout
from lm.errors import UserError
from lm.single_pass import duplicates, tree
from lm.single_pass.samples import Sample

OVERLONG = ("drop", "truncate")
_SAID_IN_FULL = 5
_said = itertools.count()
_NAMES = ("tree", "n_pass", "n_pass_merged", "paper")
_K_PASS = re.compile(r"k_pass(?::(\d+)|\((\d+)\))")


@dataclasses.dataclass(frozen=True)
class Mode:
    """A parsed mode; `groups` is the K of `k_pass`, else 0."""

    name: str
    groups: int = 0

    def __str__(self) -> str:
        return f"{self.name}:{self.groups}" if self.groups else self.name


def parse_mode(text: str) -> Mode:
    """`tree`, `n_pass`, `n_pass_merged`, `paper`, `k_pass:K` or `k_pass(K)`. Raises UserError."""
    text = text.strip()
    if text in _NAMES:
        return Mode(text)
    match = _K_PASS.fullmatch(text)
    groups = int(match[1] or match[2]) if match else 0
    if groups < 1:
        valid = ", ".join((*_NAMES, "k_pass:K"))
        raise UserError(f"mode {text!r} is not one of {valid} with K at least 1")
    return Mode("k_pass", groups)


@dataclasses.dataclass
class Report:
    """What became of the samples of one conversation.

    `members` says, per layout, which of the given samples it trains, in the order of its paths;
    `fitted` has those samples themselves, cut where they had to be.
    """

    samples: int = 0
    trained_tokens: int = 0  # of all given samples, lost ones included
    dropped_samples: int = 0
    dropped_tokens: int = 0  # trained tokens of dropped samples
    truncated_samples: int = 0
    truncated_context: int = 0  # prompt tokens cut from the left
    truncated_tokens: int = 0  # trained tokens that were cut, or lost the row that predicts them
    split_conversations: int = 0  # needed more layouts than the mode asks for, to fit seq_len
    reasons: list[str] = dataclasses.field(default_factory=list)
    members: list[list[int]] = dataclasses.field(default_factory=list)
    fitted: list[list[Sample]] = dataclasses.field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """The numbers alone, which add up over conversations."""
        return {name: getattr(self, name) for name in COUNTS}


COUNTS = tuple(field.name for field in dataclasses.fields(Report) if field.type is int)


def layouts_of(
    samples: Sequence[Sample],
    mode: str | Mode,
    seq_len: int | None = None,
    overlong: str = "drop",
) -> tuple[list[Layout], Report]:
    """The layouts of one conversation's samples.

    Args:
      samples: in conversation order, as `samples_of` gives them.
      mode: see the table above, or a parsed `Mode`.
      seq_len: no layout is longer; None: no bound.
      overlong: a sample that alone exceeds `seq_len` is dropped ("drop"), or cut from the left
        ("truncate"), whereupon its positions start at 0 again. Both are counted and logged with
        file and line.

    Raises:
      UserError: unknown mode or `overlong`.
      DataError: mode `paper` on a conversation that it cannot lay out.
      ValueError: a sample without a prompt.
    """
    mode = parse_mode(mode) if isinstance(mode, str) else mode
    if overlong not in OVERLONG:
        raise UserError(f"overlong={overlong!r} is not one of {', '.join(OVERLONG)}")
    report = Report(samples=len(samples))
    kept = _fit(samples, seq_len, overlong, report)
    if not kept:
        return [], report
    found: list[Layout] = []
    indices = [index for index, _ in kept]
    fitting = [sample for _, sample in kept]
    groups = _groups(fitting, mode)
    for group in groups:
        part = [fitting[position] for position in group]
        build = _duplicates if mode.name == "paper" else _trees
        for size, layout in build(part, seq_len):
            members, group = group[:size], group[size:]
            found.append(layout)
            report.members.append([indices[position] for position in members])
            report.fitted.append([fitting[position] for position in members])
    report.split_conversations = int(len(found) > len(groups))
    return found, report


def _fit(
    samples: Sequence[Sample], seq_len: int | None, overlong: str, report: Report
) -> list[tuple[int, Sample]]:
    """(index, sample) of what can be trained within `seq_len`; the rest goes into the report."""
    kept = []
    for index, sample in enumerate(samples):
        size, prompt = len(sample.tokens), sample.prompt_length
        report.trained_tokens += size - prompt
        if seq_len is None or size <= seq_len:
            kept.append((index, sample))
            continue
        where = f"{sample.file}:{sample.line}: turn {sample.turn}"
        what = f"{where}: {size} tokens exceed seq_len {seq_len}"
        if overlong == "drop":
            report.dropped_samples += 1
            report.dropped_tokens += size - prompt
            _say(report, f"{what}: dropped with {size - prompt} trained tokens")
            continue
        cut = size - seq_len
        lost = max(cut + 1 - prompt, 0)  # a trained token needs a row before it
        thought = sample.thought_length
        short = dataclasses.replace(
            sample,
            tokens=sample.tokens[cut:],
            prompt_length=max(prompt - cut, 1),
            skipped=sample.skipped + cut,
            thought_length=None if thought is None else max(thought - lost, 0),
        )
        report.truncated_samples += 1
        report.truncated_context += min(cut, prompt)
        report.truncated_tokens += lost
        _say(report, f"{what}: {cut} cut from the left, {lost} trained tokens lost")
        kept.append((index, short))
    return kept


def _say(report: Report, reason: str) -> None:
    """Each of the first losses of a process has its line; the report counts every one."""
    report.reasons.append(reason)
    if next(_said) < _SAID_IN_FULL:
        logging.warning("%s", reason)


def _groups(samples: Sequence[Sample], mode: Mode) -> list[list[int]]:
    """Which samples the mode puts together, before `seq_len` has its say."""
    count = len(samples)
    if mode.name == "n_pass":
        return [[index] for index in range(count)]
    if mode.name == "n_pass_merged":
        return tree.prefix_groups(samples)
    if mode.name == "k_pass":
        bounds = [count * part // mode.groups for part in range(mode.groups + 1)]
        return [list(range(a, b)) for a, b in itertools.pairwise(bounds) if a < b]
    return [list(range(count))]


def _trees(samples: Sequence[Sample], seq_len: int | None) -> Iterator[tuple[int, Layout]]:
    """Trees of as many consecutive samples as fit: (number of samples, layout)."""
    if len(samples) == 1:
        yield 1, tree.chain(samples[0])
        return
    grown = tree.PrefixTree()
    for sample in samples:
        most = grown.size + len(sample.tokens)
        if seq_len is not None and most > seq_len and most - grown.matched(sample) > seq_len:
            yield len(grown.samples), grown.layout()
            grown = tree.PrefixTree()
        grown.insert(sample)
    yield len(grown.samples), grown.layout()


def _duplicates(samples: Sequence[Sample], seq_len: int | None) -> Iterator[tuple[int, Layout]]:
    """The same for the duplicate layout. Each leaves out its last copy where that does not fit."""
    lengths = duplicates.response_lengths(samples)
    rows = duplicates.sizes(samples, lengths)
    limit = float("inf") if seq_len is None else seq_len
    start, size = 0, 0
    for index, (sample, (completion, _)) in enumerate(zip(samples, rows, strict=True)):
        if index > start:
            before = samples[index - 1].prompt_length + lengths[index - 1]
            grown = size + rows[index - 1][1] + sample.prompt_length - before + completion
            if grown <= limit:
                size = grown
                continue
            part = slice(start, index)
            copy = size + rows[index - 1][1] <= limit
            yield index - start, duplicates.build(samples[part], lengths[part], copy)
        start, size = index, sample.prompt_length + completion
    copy = size + rows[-1][1] <= limit
    yield len(samples) - start, duplicates.build(samples[start:], lengths[start:], copy)
