# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.single_pass import tree
from lm.single_pass.samples import Sample, samples_of
from lm.text import chat, tokenizers
from tests.lm.single_pass.adversarial import ALL, trained, trained_by, turn_weights


def sample(tokens, prompt_length, turn=0):
    return Sample(np.array(tokens, np.int32), prompt_length, turn)


@st.composite
def sample_lists(draw):
    """Samples that share much: few tokens, and most of them grown from an earlier one."""
    found = []
    for turn in range(draw(st.integers(1, 7))):
        tokens = draw(st.lists(st.integers(0, 2), min_size=0 if found else 1, max_size=8))
        if found and draw(st.booleans()):
            before = draw(st.sampled_from(found)).tokens.tolist()
            tokens = before[: draw(st.integers(0, len(before)))] + tokens
        tokens = tokens or [0]
        found.append(sample(tokens, draw(st.integers(1, len(tokens))), turn))
    return found


def brute_force(samples):
    """A trie of token tuples in depth-first order, the branch with the latest sample first."""
    latest, weights, shares, first = {}, {}, {}, {}
    for number, s in enumerate(samples):
        tokens = tuple(s.tokens.tolist())
        for depth in range(1, len(tokens) + 1):
            latest[tokens[:depth]] = number
            if depth > s.prompt_length:
                weights[tokens[:depth]] = weights.get(tokens[:depth], 0) + 1
                shares[tokens[:depth]] = shares.get(tokens[:depth], 0) + 1 / s.num_trained
                first.setdefault(tokens[:depth], s.turn)
    order, until = [], {}

    def visit(node):
        if node:
            order.append(node)
        children = [n for n in latest if len(n) == len(node) + 1 and n[: len(node)] == node]
        for child in sorted(children, key=latest.get, reverse=True):
            visit(child)
        until[node] = len(order)

    visit(())
    row = {node: index for index, node in enumerate(order)}
    edges = [
        (row[n[:-1]], n[-1], weights[n], shares[n], row[n], first[n]) for n in order if n in weights
    ]
    return order, [until[n] for n in order], edges, row


@settings(max_examples=300, deadline=None)
@given(sample_lists())
def test_equals_a_brute_force_trie(samples):
    order, until, edges, row = brute_force(samples)
    layout = tree.build_tree(samples)
    assert layout.tokens.tolist() == [node[-1] for node in order]
    assert layout.positions.tolist() == [len(node) - 1 for node in order]
    assert layout.until.tolist() == until
    fields = ("edge_rows", "edge_targets", "edge_weights", "edge_children", "edge_turns")
    got = list(zip(*(getattr(layout, name).tolist() for name in fields), strict=True))
    assert got == [(r, t, w, child, turn) for r, t, w, _, child, turn in edges]
    np.testing.assert_allclose(layout.edge_turn_weights, [e[3] for e in edges], rtol=1e-6)
    for s, path in zip(samples, layout.paths, strict=True):
        tokens = tuple(s.tokens.tolist())
        assert path.tolist() == [row[tokens[: depth + 1]] for depth in range(len(tokens))]
    for name in ("tokens", "positions", "until", "edge_rows", "edge_targets", "edge_children"):
        assert getattr(layout, name).dtype == np.int32
    assert layout.edge_weights.dtype == layout.edge_turn_weights.dtype == np.float32


@settings(max_examples=200, deadline=None)
@given(sample_lists())
def test_growing_is_counted_and_matching_is_exact(samples):
    grown = tree.PrefixTree()
    for index, s in enumerate(samples):
        known = {tuple(x.tokens.tolist()[:d]) for x in samples[:index] for d in range(99)}
        tokens = tuple(s.tokens.tolist())
        matched = max(d for d in range(len(tokens) + 1) if tokens[:d] in known or not d)
        assert grown.matched(s) == matched
        before = grown.size
        grown.insert(s)
        assert grown.size == before + len(tokens) - matched
    assert grown.size == grown.layout().length


@settings(max_examples=100, deadline=None)
@given(sample_lists())
def test_prefix_groups_share_one_path(samples):
    groups = tree.prefix_groups(samples)
    assert sorted(i for group in groups for i in group) == list(range(len(samples)))
    longest = []
    for group in groups:
        tokens = [samples[i].tokens.tolist() for i in group]
        longest.append(max(tokens, key=len))
        assert all(longest[-1][: len(t)] == t for t in tokens)
    for a in range(len(longest)):
        for b in range(len(longest)):
            assert a == b or longest[b][: len(longest[a])] != longest[a]


def test_literal_mask_of_two_turns_with_thoughts():
    # h=1, t=2 3, r=4; then h=5, t=6, r=7; the second prompt is h r h.
    layout = tree.build_tree([sample([1, 2, 3, 4], 1, 0), sample([1, 4, 5, 6, 7], 3, 1)])
    assert layout.tokens.tolist() == [1, 4, 5, 6, 7, 2, 3, 4]
    assert layout.positions.tolist() == [0, 1, 2, 3, 4, 1, 2, 3]
    rows, keys = np.arange(8)[:, None], np.arange(8)[None]
    mask = (keys <= rows) & (rows < layout.until[None])
    assert mask.astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],  # h
        [1, 1, 0, 0, 0, 0, 0, 0],  # r, context: does not see the thought
        [1, 1, 1, 0, 0, 0, 0, 0],  # h
        [1, 1, 1, 1, 0, 0, 0, 0],  # t
        [1, 1, 1, 1, 1, 0, 0, 0],  # r
        [1, 0, 0, 0, 0, 1, 0, 0],  # t of the first turn
        [1, 0, 0, 0, 0, 1, 1, 0],  # t
        [1, 0, 0, 0, 0, 1, 1, 1],  # r, trained: sees the thought
    ]
    assert layout.pairs == mask.sum()
    edges = list(zip(layout.edge_rows.tolist(), layout.edge_targets.tolist(), strict=True))
    assert edges == [(2, 6), (3, 7), (0, 2), (5, 3), (6, 4)]
    assert layout.edge_turns.tolist() == [1, 1, 0, 0, 0]


def test_a_row_can_have_several_targets():
    layout = tree.build_tree([sample([1, 2], 1), sample([1, 3], 1), sample([1, 2], 1)])
    assert layout.tokens.tolist() == [1, 2, 3]  # 2 comes first: the latest sample is there
    assert layout.edge_rows.tolist() == [0, 0]
    assert layout.edge_targets.tolist() == [2, 3]
    assert layout.edge_weights.tolist() == [2, 1]


@pytest.mark.parametrize("name", ALL)
def test_adversarial_conversations(name):
    tokenizer = tokenizers.load_tokenizer("bytes")
    samples = samples_of(ALL[name], chat.load_template("chatml", tokenizer), tokenizer)
    layout = tree.build_tree(samples)
    assert trained_by([layout]) == trained(samples)
    shares = turn_weights(samples)
    keys = np.arange(layout.length)
    for row, target, share in zip(
        layout.edge_rows, layout.edge_targets, layout.edge_turn_weights, strict=True
    ):
        context = layout.tokens[(keys <= row) & (row < layout.until)]
        assert share == pytest.approx(shares[tuple(context.tolist()), int(target)], rel=1e-6)
    for s, path in zip(samples, layout.paths, strict=True):
        np.testing.assert_array_equal(layout.tokens[path], s.tokens)
        np.testing.assert_array_equal(layout.positions[path], np.arange(len(s.tokens)))


@pytest.mark.parametrize("prompt_length", [0, 4, -1])
def test_a_sample_needs_a_prompt(prompt_length):
    with pytest.raises(ValueError, match="at least one token"):
        tree.build_tree([sample([1, 2, 3], prompt_length)])
    with pytest.raises(ValueError, match="at least one token"):
        tree.build_tree([sample([1, 2], 1), sample([1, 2, 3], prompt_length)])


def test_no_samples():
    with pytest.raises(ValueError, match="at least one sample"):
        tree.build_tree([])
