# SPDX-License-Identifier: Apache-2.0
"""Futures of rows against the samples that they stand for, one path at a time."""

import collections
import dataclasses

import numpy as np
import pytest

from lm.cp_heads import futures
from lm.data import documents, packing
from lm.errors import UserError
from lm.single_pass import tree


@dataclasses.dataclass(frozen=True)
class Sample:
    tokens: np.ndarray
    prompt_length: int
    turn: int = 0


def sample(tokens, prompt_length):
    return Sample(np.array(tokens, np.int32), prompt_length)


def expected(layout, samples, predicted, start=0):
    """Counts of (row, tokens, rows) over all trained tokens of all samples."""
    found = collections.Counter()
    for path, one in zip(layout.paths, samples, strict=True):
        path = path + start
        for i in range(one.prompt_length, len(one.tokens)):
            end = min(i + predicted, len(one.tokens))
            tokens = tuple(one.tokens[i:end].tolist())
            found[int(path[i - 1]), tokens, tuple(path[i:end].tolist())] += 1
    return found


def found_in(row, predicted):
    out = collections.Counter()
    for r, targets, children, weight in zip(*futures.futures_of_row(row, predicted), strict=True):
        length = int((targets >= 0).sum())
        assert (targets[length:] == -1).all()
        assert (children[length:] == -1).all()
        key = int(r), tuple(targets[:length].tolist()), tuple(children[:length].tolist())
        assert key not in out
        out[key] = round(float(weight), 4)
    return out


def branching(rng):
    """Samples with a common prompt, over an alphabet so small that they share long prefixes."""
    prompt = rng.integers(0, 3, 3).tolist()
    return [
        sample(prompt + rng.integers(0, 2, rng.integers(1, 8)).tolist(), len(prompt))
        for _ in range(6)
    ]


def dialogue(rng):
    """Turns whose later prompts repeat the earlier answers, or drop their first half (thoughts)."""
    history, out = [7], []
    for turn in range(4):
        history = [*history, 8, turn, 9]
        thought, answer = rng.integers(0, 3, 3).tolist(), rng.integers(0, 3, 4).tolist()
        out.append(sample([*history, *thought, *answer], len(history)))
        history += answer if turn % 2 else [*thought, *answer]
    return out


@pytest.mark.parametrize("make", [branching, dialogue])
@pytest.mark.parametrize("predicted", [1, 2, 4])
def test_trees_have_the_futures_of_their_samples(make, predicted):
    rng = np.random.default_rng(predicted)
    for _ in range(20):
        first, second = make(rng), make(rng)
        layouts = [tree.build_tree(first), tree.build_tree(second)]
        (row,) = packing.pack(layouts, 160)
        wanted = expected(layouts[0], first, predicted)
        wanted += expected(layouts[1], second, predicted, layouts[0].length)
        assert found_in(row, predicted) == dict(wanted)


def test_equal_samples_and_prefixes_add_up():
    samples = [sample([5, 1, 2], 1), sample([5, 1, 2], 1), sample([5, 1, 2, 3], 1)]
    (row,) = packing.pack([tree.build_tree(samples)], 8)
    assert found_in(row, 2) == {
        (0, (1, 2), (1, 2)): 3,
        (1, (2,), (2,)): 2,
        (1, (2, 3), (2, 3)): 1,
        (2, (3,), (3,)): 1,
    }


def test_futures_never_cross_documents_or_untrained_tokens():
    rng = np.random.default_rng(0)
    layouts = [documents.chain(np.full(n, i, np.int32)) for i, n in enumerate([7, 1, 12, 5])]
    gap = tree.chain(sample(rng.integers(90, 95, 6), 4))  # only its last two tokens are trained
    rows = packing.pack([*layouts, gap], 24)
    assert len(rows) == 2
    batch = futures.with_futures(packing.stack(rows), 4)
    for i, row in enumerate(rows):
        real = np.flatnonzero(batch["future_weights"][i] > 0)
        assert len(real) == (row["edge_targets"] >= 0).sum()
        for f in real:
            start = batch["future_rows"][i, f]
            targets = batch["future_targets"][i, f]
            length = (targets >= 0).sum()
            inside = row["tokens"][start] // 90 == targets[:length] // 90
            same = (targets[:length] == row["tokens"][start]) | (targets[:length] >= 90)
            assert (inside & same).all()
            ahead = row["until"][start] - 1 - start  # tokens left in the document
            assert length == min(4, ahead)
    trained = batch["future_targets"][:, :, 0]
    assert (np.sort(trained[trained >= 90]) == np.sort(gap.tokens[4:])).all()


def test_padding_and_empty_rows():
    batch = futures.with_futures(packing.stack([packing.empty_row(6)] * 2), 3)
    assert batch["future_weights"].sum() == 0
    assert (batch["future_targets"] == -1).all()
    assert {name: batch[name].dtype.name for name in futures.FUTURE_FIELDS} == {
        "future_rows": "int32",
        "future_targets": "int32",
        "future_children": "int32",
        "future_weights": "float32",
    }


def test_more_futures_than_slots_is_one_line():
    samples = branching(np.random.default_rng(0))
    batch = packing.stack(packing.pack([tree.build_tree(samples)], 64))
    with pytest.raises(UserError, match="futures exceeds 4 slots"):
        futures.with_futures(batch, 3, capacity=4)


def test_targets_that_lie_in_no_row_end_a_future():
    row = packing.pack([documents.chain(np.arange(5, dtype=np.int32))], 5)[0]
    row["edge_targets"][1] = 40
    assert (1, (40,), ()) in {(r, t, tuple(c for c in k if c >= 0)) for r, t, k in found_in(row, 3)}
