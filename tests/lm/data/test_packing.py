# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
from collections import Counter

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data import packing
from lm.data.layout import EDGE_FIELDS, HIDDEN_FIELDS, ROW_FIELDS, Layout
from lm.errors import UserError

SEQ_LEN = 24


def layout(rng, length, edges=None):
    """Any layout of that many rows, with edges and visibility that mean nothing."""
    edges = int(rng.integers(0, length + 1)) if edges is None else edges
    ints = lambda high, size: rng.integers(0, high, size).astype(np.int32)  # noqa: E731
    return Layout(
        tokens=ints(99, length),
        positions=ints(length, length),
        until=np.arange(1, length + 1, dtype=np.int32) + ints(length, length),  # may pass the end
        edge_rows=ints(length, edges),
        edge_targets=ints(99, edges),
        edge_weights=rng.random(edges).astype(np.float32),
        edge_turn_weights=rng.random(edges).astype(np.float32),
        edge_children=ints(length, edges),
        edge_turns=ints(9, edges),
    )


def edges_of(layouts):
    """Every edge with what its row sees, as tokens and positions."""
    found = Counter()
    for one in layouts:
        keys = np.arange(one.length)
        for row, target, weight, share in zip(
            *(getattr(one, name) for name in EDGE_FIELDS), strict=True
        ):
            seen = (keys <= row) & (row < one.until)
            context = tuple(one.tokens[seen].tolist()), tuple(one.positions[seen].tolist())
            found[context, int(target), float(weight), float(share)] += 1
    return found


def edges_of_rows(rows):
    found = Counter()
    for row in rows:
        keys = np.arange(len(row["tokens"]))
        for at, target, weight, share in zip(*(row[name] for name in EDGE_FIELDS), strict=True):
            if target < 0:
                continue
            seen = (keys <= at) & (at < row["until"])
            context = tuple(row["tokens"][seen].tolist()), tuple(row["positions"][seen].tolist())
            found[context, int(target), float(weight), float(share)] += 1
    return found


def random_groups(seed, count=20):
    rng = np.random.default_rng(seed)
    return [
        packing.Group(
            [layout(rng, int(rng.integers(1, SEQ_LEN + 1))) for _ in range(rng.integers(0, 5))],
            {"samples": int(rng.integers(0, 9)), "dropped": index % 2},
        )
        for index in range(count)
    ]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 12), max_size=30))
def test_assign_is_first_fit_decreasing(sizes):
    free, expected = [], []
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        place = next((b for b, room in enumerate(free) if room >= sizes[item]), len(free))
        if place == len(free):
            free.append(12)
            expected.append([])
        free[place] -= sizes[item]
        expected[place].append(item)
    assert packing.assign(sizes, 12) == sorted(sorted(items) for items in expected)


def test_what_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="size 13 does not fit a bin of 12"):
        packing.assign([3, 13], 12)
    with pytest.raises(ValueError, match="size 30 does not fit"):  # edges need slots as well
        packing.pack([layout(np.random.default_rng(0), 5, edges=30)], SEQ_LEN)


def test_literal_row():
    one = Layout(
        tokens=np.array([5, 6, 7], np.int32),
        positions=np.array([0, 1, 1], np.int32),
        until=np.array([3, 2, 9], np.int32),  # 9 is beyond its end
        edge_rows=np.array([0, 0], np.int32),
        edge_targets=np.array([6, 7], np.int32),
        edge_weights=np.array([1, 2], np.float32),
        edge_turn_weights=np.array([1, 0.5], np.float32),
        edge_children=np.array([1, 2], np.int32),
        edge_turns=np.array([0, 1], np.int32),
    )
    (row,) = packing.pack([one, one], 8)
    assert row["tokens"].tolist() == [5, 6, 7, 5, 6, 7, 0, 0]
    assert row["positions"].tolist() == [0, 1, 1, 0, 1, 1, 0, 0]
    assert row["until"].tolist() == [3, 2, 3, 6, 5, 6, 0, 0]
    assert row["edge_rows"].tolist() == [0, 0, 3, 3, 0, 0, 0, 0]
    assert row["edge_targets"].tolist() == [6, 7, 6, 7, -1, -1, -1, -1]
    assert row["edge_weights"].tolist() == [1, 2, 1, 2, 0, 0, 0, 0]
    assert row["edge_turn_weights"].tolist() == [1, 0.5, 1, 0.5, 0, 0, 0, 0]
    assert {row[name].dtype.name for name in ROW_FIELDS} == {"int32"}
    assert [row[name].dtype.name for name in EDGE_FIELDS] == ["int32", "int32"] + ["float32"] * 2


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6))
def test_packing_loses_nothing_and_shows_nothing_new(seed):
    layouts = [one for group in random_groups(seed) for one in group.layouts]
    rows = packing.pack(layouts, SEQ_LEN)
    assert edges_of_rows(rows) == edges_of(layouts)
    assert sum((row["until"] > 0).sum() for row in rows) == sum(one.length for one in layouts)


def test_stack_and_empty_row():
    rows = packing.pack(random_groups(0)[0].layouts, SEQ_LEN)
    batch = packing.stack([*rows, packing.empty_row(SEQ_LEN)])
    assert set(batch) == {*ROW_FIELDS, *EDGE_FIELDS}
    for name, values in batch.items():
        assert values.shape == (len(rows) + 1, SEQ_LEN)
        assert (values[-1] == (-1 if name == "edge_targets" else 0)).all()


def dataset(groups, window=7, start=0, step=1, epochs=1):
    source = grain.MapDataset.source(groups).repeat(epochs)[start::step]
    return packing.PackedRows(source.to_iter_dataset(), SEQ_LEN, window)


def same(a, b):
    return len(a) == len(b) and all(
        np.array_equal(x[name], y[name]) for x, y in zip(a, b, strict=True) for name in x
    )


@pytest.mark.parametrize("window", [1, 7, 1000])
def test_the_dataset_gives_every_edge_once(window):
    groups = random_groups(1)
    rows = list(dataset(groups, window))
    layouts = [one for group in groups for one in group.layouts]
    assert edges_of_rows(rows) == edges_of(layouts)
    assert same(rows, list(dataset(groups, window)))
    if window == 1000:
        assert same(rows, packing.pack(layouts, SEQ_LEN))


def test_resumes_exactly_at_every_row():
    groups = random_groups(2)
    whole = list(dataset(groups))
    iterator = iter(dataset(groups))
    for done in range(len(whole) + 1):
        state = json.loads(json.dumps(iterator.get_state()))
        fresh = iter(dataset(groups))
        fresh.set_state(state)
        assert fresh.get_state() == iterator.get_state()
        rest = list(fresh)
        assert same(rest, whole[done:])
        if done < len(whole):
            next(iterator)
    assert packing.statistics(fresh)["rows"] == len(whole)  # restored ones count from the start


def test_resumes_after_the_end_and_backwards():
    iterator = iter(dataset(random_groups(3)))
    start = iterator.get_state()
    first = list(iterator)
    with pytest.raises(StopIteration):
        next(iterator)
    end = iterator.get_state()
    iterator.set_state(start)
    assert same(list(iterator), first)
    iterator.set_state(end)
    assert list(iterator) == []


def test_batches_compose_and_resume():
    groups = random_groups(4)
    rows = list(dataset(groups))
    for drop in (True, False):
        batches = dataset(groups).batch(3, drop_remainder=drop)
        found = list(batches)
        assert len(found) == (len(rows) // 3 if drop else -(-len(rows) // 3))
        assert same(found[:2], [packing.stack(rows[:3]), packing.stack(rows[3:6])])
        iterator = iter(batches)
        next(iterator)
        fresh = iter(batches)
        fresh.set_state(json.loads(json.dumps(iterator.get_state())))
        assert same(list(fresh), found[1:])
        assert packing.statistics(fresh)["groups"] == len(groups)


def test_processes_share_the_data():
    groups = random_groups(5)
    parts = [list(dataset(groups, start=index, step=3)) for index in range(3)]
    whole = sum((edges_of_rows(part) for part in parts), Counter())
    assert whole == edges_of([one for group in groups for one in group.layouts])


def test_endless_data():
    iterator = iter(dataset(random_groups(6), epochs=None))
    rows = [next(iterator) for _ in range(200)]
    fresh = iter(dataset(random_groups(6), epochs=None))
    fresh.set_state(iterator.get_state())
    assert same([next(fresh) for _ in range(5)], [next(iterator) for _ in range(5)])
    assert len(rows) == 200


def test_statistics():
    groups = random_groups(7)
    iterator = iter(dataset(groups))
    rows = list(iterator)
    layouts = [one for group in groups for one in group.layouts]
    tokens = sum(one.length for one in layouts)
    assert packing.statistics(iterator) == {
        "samples": sum(group.counts["samples"] for group in groups),
        "dropped": 10,
        "groups": len(groups),
        "layouts": len(layouts),
        "tokens": tokens,
        "edges": sum(one.num_edges for one in layouts),
        "rows": len(rows),
        "row_tokens": len(rows) * SEQ_LEN,
        "fill": tokens / (len(rows) * SEQ_LEN),
    }
    with pytest.raises(ValueError, match="does not read from PackedRows"):
        packing.statistics(iter(grain.MapDataset.range(3).to_iter_dataset()))


def test_groups_without_layouts_give_no_rows_but_count():
    iterator = iter(dataset([packing.Group([], {"dropped": 2})] * 3))
    assert list(iterator) == []
    assert packing.statistics(iterator)["dropped"] == 6
    assert packing.statistics(iterator)["fill"] == 0


def test_endless_data_that_fits_no_row_is_refused(monkeypatch):
    monkeypatch.setattr(packing, "_FRUITLESS", 50)
    fruitless = packing.Group([], {"samples_dropped": 2, "samples": 0})
    with pytest.raises(UserError, match=r"50 conversations in a row .*\(samples_dropped 100\)"):
        next(iter(dataset([fruitless] * 3, epochs=None)))
    fine = random_groups(6)
    assert next(iter(dataset([*[fruitless] * 49, *fine], epochs=None)))


@pytest.mark.parametrize(("seq_len", "window"), [(0, 1), (8, 0)])
def test_bad_sizes(seq_len, window):
    with pytest.raises(ValueError, match="must be positive"):
        packing.PackedRows(grain.MapDataset.range(3), seq_len, window)


def threaded(rng, length):
    """A layout whose keys have any hidden run, some of them empty."""
    starts = rng.integers(0, length, length).astype(np.int32)
    runs = rng.integers(-2, length, length).astype(np.int32)
    one = layout(rng, length)
    return dataclasses.replace(
        one,
        until=np.minimum(one.until, length),
        hidden_from=starts,
        hidden_until=np.minimum(starts + runs, length),
    )


def seen_pairs(vectors, length):
    keys, rows = np.arange(length), np.arange(length)[:, None]
    seen = (keys <= rows) & (rows < vectors["until"])
    return seen & ~((vectors["hidden_from"] <= rows) & (rows < vectors["hidden_until"]))


@pytest.mark.parametrize("seed", range(20))
def test_hidden_runs_move_with_their_layout(seed):
    rng = np.random.default_rng(seed)
    pieces = [threaded(rng, int(rng.integers(1, 12))) for _ in range(6)]
    rows = packing.pack(pieces, SEQ_LEN)
    assigned = packing.assign([max(p.length, p.num_edges) for p in pieces], SEQ_LEN)
    for row, members in zip(rows, assigned, strict=True):
        expected, start = np.zeros((SEQ_LEN, SEQ_LEN), bool), 0
        for piece in (pieces[index] for index in members):
            own = seen_pairs(vars(piece), piece.length)
            assert piece.pairs == own.sum()
            expected[start : start + piece.length, start : start + piece.length] = own
            start += piece.length
        got = seen_pairs(row, SEQ_LEN)
        assert (got == expected).all()


def test_hidden_runs_are_in_all_rows_of_a_batch_or_in_none():
    rng = np.random.default_rng(0)
    groups = [packing.Group([threaded(rng, 20)]) for _ in range(3)]
    dataset = packing.PackedRows(grain.MapDataset.source(groups), SEQ_LEN, window=2)
    *_, last = packing.batches(dataset, 2, SEQ_LEN)
    assert last["hidden_from"].shape == (2, SEQ_LEN)
    assert not last["hidden_until"][1].any()
    plain = layout(rng, 3)
    assert not set(HIDDEN_FIELDS) & packing.pack([plain], SEQ_LEN)[0].keys()
    with pytest.raises(ValueError, match="cannot share rows"):
        packing.pack([plain, threaded(rng, 3)], SEQ_LEN)
    with pytest.raises(ValueError, match="cannot share a batch"):
        packing.stack([packing.empty_row(SEQ_LEN), packing.empty_row(SEQ_LEN, hidden=True)])
