# SPDX-License-Identifier: Apache-2.0
"""Visibility and block tables against loops over every pair."""

import dataclasses
from functools import partial

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from ops import block_table as block_tables
from ops.visibility import Visibility
from tests.ops.op_cases import DRAW_ONLY, MASKS, dense, jit, visibility

as_array = jit(Visibility.as_array, static_argnums=1)


@partial(jit, static_argnums=(1, 2, 3))
def table_and_count(mask, num_rows, block_q, block_k):
    sizes = num_rows, block_q, block_k
    return mask.block_table(*sizes), mask.needed_blocks(*sizes)


def vector(*values):
    return jnp.asarray([values], jnp.int32)


PICTURES = [
    (Visibility.causal(1, 4), "#...\n##..\n###.\n####"),
    (Visibility(vector(2, 2, 4, 4)), "#...\n##..\n..#.\n..##"),
    (Visibility(vector(4, 2, 4, 4)), "#...\n##..\n#.#.\n#.##"),
    (
        Visibility(vector(4, 4, 4, 4), vector(9, 2, 9, 9), vector(9, 3, 9, 9)),
        "#...\n##..\n#.#.\n####",
    ),
    (Visibility.documents([[2, 1]], 4), "#...\n##..\n..#.\n...."),
    (Visibility.sliding_window(vector(4, 4, 4, 4), 2), "#...\n##..\n.##.\n..##"),
    (Visibility.sliding_window(vector(3, 3, 3, 0), 2), "#...\n##..\n.##.\n...."),
]


@pytest.mark.parametrize(("mask", "picture"), PICTURES)
def test_literal_pictures(mask, picture):
    assert str(mask) == picture
    literal = np.array([[cell == "#" for cell in line] for line in picture.split("\n")])
    np.testing.assert_array_equal(as_array(mask, 4)[0], literal)


def test_docstring_pictures_are_those_of_the_tests():
    """The four pictures side by side in the class docstring are what the masks print."""
    lines = [line.split() for line in Visibility.__doc__.splitlines() if set(line) <= set(" #.")]
    shown = list(zip(*(line for line in lines if len(line) == 4), strict=True))
    assert ["\n".join(picture) for picture in shown] == [text for _, text in PICTURES[:4]]


@pytest.mark.parametrize("name", MASKS)
def test_as_array_is_the_definition(name):
    mask = visibility(name, 3, 9)
    np.testing.assert_array_equal(as_array(mask, 9), dense(mask, 9))
    late = dataclasses.replace(mask, row_offset=jnp.array([4, 0, -2]))
    np.testing.assert_array_equal(as_array(late, 5), dense(late, 5))


def check_table(mask, num_rows, block_q, block_k):
    """The table against the pairs; returns how many blocks are needed by the table and by the
    pairs."""
    pairs = dense(mask, num_rows)
    table, needed = map(np.asarray, table_and_count(mask, num_rows, block_q, block_k))
    batch, num_keys = mask.until.shape
    assert table.shape == (batch, -(-num_rows // block_q), -(-num_keys // block_k))
    exact = np.zeros(batch, int)
    for (b, iq, ik), kind in np.ndenumerate(table):
        block = pairs[b, iq * block_q : (iq + 1) * block_q, ik * block_k : (ik + 1) * block_k]
        whole = block.shape == (block_q, block_k)
        exact[b] += block.any()
        if kind == block_tables.EMPTY:
            assert not block.any()
        if kind == block_tables.FULL:
            assert block.all()
            assert whole
    np.testing.assert_array_equal(needed, (table != block_tables.EMPTY).sum((1, 2)))
    return needed, exact, table


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("num_rows", "block_q", "block_k"), [(24, 4, 8), (21, 8, 5), (7, 32, 32)])
def test_block_table_is_conservative(name, num_rows, block_q, block_k):
    check_table(visibility(name, 2, 26), num_rows, block_q, block_k)


@pytest.mark.parametrize("name", ["causal", "documents", "tree", "hidden", "blind"])
def test_block_table_finds_every_empty_block_of_structured_masks(name):
    """On masks whose vectors are constant over long stretches nothing is visited in vain."""
    needed, exact, _ = check_table(visibility(name, 2, 64, seed=3), 64, 4, 4)
    if (
        name == "tree"
    ):  # neighbouring keys of a tree may end apart: at most one block in ten is wasted
        assert (needed <= 1.1 * exact).all()
    else:
        np.testing.assert_array_equal(needed, exact)


def test_full_blocks_are_found():
    _, _, table = check_table(Visibility.causal(1, 32), 32, 8, 8)
    np.testing.assert_array_equal(table[0], np.tril(np.full((4, 4), 2), -1) + np.eye(4))


@hypothesis.settings(max_examples=60, deadline=None, phases=DRAW_ONLY)
@hypothesis.given(st.data())
def test_block_table_on_drawn_vectors(data):
    sizes = st.sampled_from([(1, 1, 1, 1), (11, 11, 3, 4), (13, 6, 4, 3), (8, 14, 5, 16)])
    length, *blocks = data.draw(sizes)
    entries = st.lists(st.integers(-3, 17), min_size=length, max_size=length)
    until, start, end = (np.array([data.draw(entries)], np.int32) for _ in range(3))
    offset = np.array([data.draw(st.integers(-4, 14))], np.int32)
    check_table(Visibility(until, start, end, offset), *blocks)


def test_compacted_lists_in_both_directions():
    rng = np.random.default_rng(0)
    table = rng.integers(0, 3, (2, 5, 7)).astype(np.int8)
    table[0, 2] = 0  # a query block that needs nothing
    for lists, view in (
        (jit(block_tables.key_blocks)(table), table),
        (jit(block_tables.query_blocks)(table), table.transpose(0, 2, 1)),
    ):
        lists = jax.tree.map(np.asarray, lists)
        for b, row in np.ndindex(*view.shape[:2]):
            expected = np.flatnonzero(view[b, row])
            count = int(lists.counts[b, row])
            assert count == len(expected)
            np.testing.assert_array_equal(lists.indices[b, row, :count], expected)
            np.testing.assert_array_equal(lists.kinds[b, row, :count], view[b, row, expected])
            # what lies beyond repeats the last block and is marked as empty
            np.testing.assert_array_equal(lists.kinds[b, row, count:], 0)
            if count:
                np.testing.assert_array_equal(lists.indices[b, row, count:], expected[-1])


def test_merged_batch_needs_what_any_sequence_needs():
    table = jnp.asarray([[[0, 1, 2, 2]], [[0, 0, 2, 1]]], jnp.int8)
    np.testing.assert_array_equal(block_tables.merge_batch(table), [[0, 1, 2, 1]])


# --- combining masks


@pytest.mark.parametrize("first", ["causal", "documents", "tree", "hidden"])
@pytest.mark.parametrize("second", ["causal", "documents", "tree", "hidden"])
def test_and_is_the_intersection(first, second):
    a, b = visibility(first, 2, 12, seed=1), visibility(second, 2, 12, seed=2)
    np.testing.assert_array_equal(as_array(a & b, 12), dense(a, 12) & dense(b, 12))


def run(until, start, end):
    return Visibility(vector(until, 8), vector(start, 0), vector(end, 0))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (run(8, 2, 4), run(8, 3, 6)),  # overlapping
        (run(8, 2, 4), run(8, 4, 6)),  # touching
        (run(8, 2, 4), run(8, 6, 8)),  # the second lasts to the end
        (run(8, 2, 4), run(6, 6, 9)),  # the second begins where nothing is visible any more
        (run(5, 2, 4), run(8, 6, 7)),  # hidden beyond the other's end
        (run(8, 5, 3), run(8, 2, 4)),  # an empty run
        (run(8, -5, 2), run(8, 1, 3)),  # beginning before the key
    ],
)
def test_and_joins_hidden_runs(a, b):
    expected = dense(a, 9) & dense(b, 9)
    np.testing.assert_array_equal(as_array(a & b, 9), expected)
    np.testing.assert_array_equal(as_array(b & a, 9), expected)
    np.testing.assert_array_equal(jit(lambda x, y: (x & y).as_array(9))(a, b), expected)


def test_and_refuses_two_separate_runs():
    a, b = run(8, 2, 3), run(8, 5, 6)
    with pytest.raises(ValueError, match="hidden runs of key 0 of sequence 0 do not form one run"):
        a & b
    traced = jit(lambda x, y: (x & y).as_array(9))(a, b)  # hides the gap, shows nothing more
    assert not (np.asarray(traced) & ~(dense(a, 9) & dense(b, 9))).any()


def test_and_refuses_what_does_not_match():
    with pytest.raises(ValueError, match="cannot combine"):
        Visibility.causal(1, 4) & Visibility.causal(1, 5)
    moved = Visibility(vector(4, 4, 4, 4), row_offset=jnp.array([1]))
    with pytest.raises(ValueError, match="different row_offset"):
        moved & Visibility.causal(1, 4)
    with pytest.raises(ValueError, match="traced"):
        jit(lambda a, b: a & b)(moved, Visibility.causal(1, 4))
    assert (moved & moved).row_offset is moved.row_offset


# --- errors and the rest


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Visibility(jnp.zeros(3, jnp.int32)), r"until must be \[B, S\]"),
        (Visibility(jnp.zeros((1, 3))), "until must be int32"),
        (Visibility(vector(1, 2), hidden_from=vector(0, 0)), "together or not at all"),
        (Visibility(vector(1, 2), vector(0), vector(0)), r"hidden_from must have shape \(1, 2\)"),
        (Visibility(vector(1, 2), row_offset=vector(1)), r"row_offset must have shape \(1,\)"),
    ],
)
def test_malformed_masks_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        mask.check()


def test_constructors_refuse_nonsense():
    with pytest.raises(ValueError, match="do not fit"):
        Visibility.documents([[3, 2]], 4)
    with pytest.raises(ValueError, match=r"\[B, documents\]"):
        Visibility.documents([3, 2], 4)
    with pytest.raises(ValueError, match="at least 1"):
        Visibility.sliding_window(vector(4, 4, 4, 4), 0)
    with pytest.raises(ValueError, match="is a tree"):
        Visibility.sliding_window(vector(4, 2, 4, 4), 2)


def test_large_masks_are_drawn_by_blocks_and_traced_ones_by_shape():
    picture = Visibility.causal(1, 128).picture()
    assert picture.split("\n")[0] == "+" + "." * 63
    assert picture.split("\n")[-1] == "#" * 63 + "+"
    printed = []
    jit(lambda m: printed.append(str(m)))(Visibility.causal(2, 4))
    assert printed == ["Visibility(batch=2, num_keys=4, traced)"]


def test_documents_and_windows_are_traceable():
    made = jit(lambda n: Visibility.documents(n, 6))(jnp.array([[2, 3], [0, 6]]))
    np.testing.assert_array_equal(made.until, Visibility.documents([[2, 3], [0, 6]], 6).until)
    window = jit(lambda u: Visibility.sliding_window(u, 2))(made.until)
    np.testing.assert_array_equal(window.until, Visibility.sliding_window(made.until, 2).until)
