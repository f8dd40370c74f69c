# SPDX-License-Identifier: Apache-2.0
import itertools

import numpy as np
import pytest
from absl import logging
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.errors import DataError, UserError
from lm.single_pass import layouts
from lm.single_pass.layouts import layouts_of
from lm.single_pass.samples import Sample, samples_of
from lm.text import chat, tokenizers
from tests.lm.single_pass.adversarial import ALL, OTHERS, PLAIN, talk, trained, trained_by, turns

TOKENIZER = tokenizers.load_tokenizer("bytes")
CHATML = chat.load_template("chatml", TOKENIZER)
MODES = ("tree", "n_pass", "n_pass_merged", "k_pass:2", "k_pass(3)", "k_pass:100")


def of(name, policy="interleaved"):
    return samples_of(ALL[name], CHATML, TOKENIZER, policy)


def sample(tokens, prompt_length, turn=0, **options):
    return Sample(np.array(tokens, np.int32), prompt_length, turn, **options)


def check_paths(found, report, samples):
    assert len(found) == len(report.members)
    for layout, members in zip(found, report.members, strict=True):
        for index, path in zip(members, layout.paths, strict=True):
            np.testing.assert_array_equal(layout.tokens[path], samples[index].tokens)
            np.testing.assert_array_equal(layout.positions[path], np.arange(len(path)))


@pytest.mark.parametrize("policy", ["interleaved", "preserved", "per_message"])
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_trains_the_same_edges_in_the_same_context(mode, name, policy):
    samples = of(name, policy)
    found, report = layouts_of(samples, mode)
    assert trained_by(found) == trained(samples)
    assert sorted(i for members in report.members for i in members) == list(range(len(samples)))
    check_paths(found, report, samples)
    assert report.counts() == {
        **dict.fromkeys(layouts.COUNTS, 0),
        "samples": len(samples),
        "trained_tokens": sum(s.num_trained for s in samples),
    }


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("seq_len", [None, 300, 700])
def test_the_duplicate_layout_trains_the_same_edges(name, seq_len):
    samples = of(name)
    longest = max(len(s.tokens) for s in samples)
    seq_len = seq_len and max(seq_len, longest)
    found, report = layouts_of(samples, "paper", seq_len)
    assert trained_by(found) == trained(samples)
    check_paths(found, report, samples)
    assert all(layout.length <= (seq_len or layout.length) for layout in found)


@pytest.mark.parametrize("name", OTHERS)
def test_the_duplicate_layout_refuses_what_is_not_plain(name):
    with pytest.raises(DataError, match=r"talk.jsonl:7: the duplicate layout"):
        layouts_of(of(name), "paper")


def test_the_duplicate_layout_refuses_tokens_that_do_not_go_on():
    broken = [sample([1, 2, 3], 1, 0), sample([1, 9, 4, 5], 3, 1)]
    with pytest.raises(DataError, match=r"turn 1 does not go on with .* turn 0"):
        layouts_of(broken, "paper")


def test_literal_duplicate_layout():
    """Order h, t, output copy, context copy, with the mask of the corrected publication."""
    samples = [
        sample([1, 2, 3, 4], 1, 0),  # h 1, t 2, r 3 4
        sample([1, 3, 4, 5, 6, 7], 4, 1, thought_length=1),  # h 5, t 6, r 7
    ]
    (layout,), _ = layouts_of(samples, "paper")
    assert layout.tokens.tolist() == [1, 2, 3, 4, 3, 4, 5, 6, 7, 7]
    assert layout.positions.tolist() == [0, 1, 2, 3, 1, 2, 3, 4, 5, 4]
    rows, keys = np.arange(10)[:, None], np.arange(10)[None]
    mask = (keys <= rows) & (rows < layout.until[None])
    assert mask.astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0, 0, 0],  # h
        [1, 1, 0, 0, 0, 0, 0, 0, 0, 0],  # t
        [1, 1, 1, 0, 0, 0, 0, 0, 0, 0],  # output copy
        [1, 1, 1, 1, 0, 0, 0, 0, 0, 0],  # output copy
        [1, 0, 0, 0, 1, 0, 0, 0, 0, 0],  # context copy
        [1, 0, 0, 0, 1, 1, 0, 0, 0, 0],  # context copy
        [1, 0, 0, 0, 1, 1, 1, 0, 0, 0],  # h
        [1, 0, 0, 0, 1, 1, 1, 1, 0, 0],  # t
        [1, 0, 0, 0, 1, 1, 1, 1, 1, 0],  # output copy
        [1, 0, 0, 0, 1, 1, 1, 0, 0, 1],  # context copy, which nothing reads
    ]
    edges = zip(layout.edge_rows.tolist(), layout.edge_targets.tolist(), strict=True)
    assert list(edges) == [(0, 2), (1, 3), (2, 4), (6, 6), (7, 7)]


def test_a_turn_without_a_thought_has_one_copy_and_is_trained():
    samples = of("no_thought")
    (paper,), _ = layouts_of(samples, "paper")
    (tree,), _ = layouts_of(samples, "tree")
    assert paper.length == tree.length == len(samples[-1].tokens)
    assert paper.num_edges == sum(s.num_trained for s in samples)


def test_the_last_copy_is_all_that_paper_adds_to_the_tree():
    samples = of("two_turns")
    (paper,), _ = layouts_of(samples, "paper")
    (tree,), _ = layouts_of(samples, "tree")
    assert paper.length == tree.length + len(TOKENIZER.encode("reply 1<|im_end|>"))


def test_n_pass_is_one_chain_per_sample_and_merged_is_one_per_path():
    samples = of("tool_loop")
    assert len(layouts_of(samples, "n_pass")[0]) == 4
    found, report = layouts_of(samples, "n_pass_merged")
    assert report.members == [[0, 1, 2], [3]]  # the loop is one chain, its thoughts stay
    assert [layout.length for layout in found] == [len(samples[2].tokens), len(samples[3].tokens)]
    assert len(layouts_of(of("no_thought"), "n_pass_merged")[0]) == 1
    for layout in found:
        assert (layout.until == layout.length).all()


def test_k_pass_groups_are_contiguous_and_even():
    members = layouts_of(of("forty_turns"), "k_pass:3")[1].members
    assert [len(group) for group in members] == [13, 13, 14]
    assert [*itertools.chain(*members)] == list(range(40))
    assert len(layouts_of(of("two_turns"), "k_pass:5")[0]) == 2


@pytest.mark.parametrize("mode", ["tree", "n_pass", "n_pass_merged", "k_pass:2", "paper"])
def test_splitting_to_fit_a_row_loses_nothing(mode):
    samples = of("forty_turns")
    longest = max(len(s.tokens) for s in samples)
    for seq_len in (longest, longest + 37, 2000, 100_000):
        found, report = layouts_of(samples, mode, seq_len)
        assert max(layout.length for layout in found) <= seq_len
        assert trained_by(found) == trained(samples)
        check_paths(found, report, samples)
        assert report.dropped_samples == report.truncated_samples == 0
        if mode == "tree":
            assert report.split_conversations == (len(found) > 1)


def test_a_split_takes_as_many_samples_as_fit():
    samples = of("forty_turns")
    seq_len = max(len(s.tokens) for s in samples) + 50
    found, report = layouts_of(samples, "tree", seq_len)
    assert len(found) > 1
    for members, following in zip(report.members, report.members[1:], strict=False):
        (one_more,), _ = layouts_of([samples[i] for i in [*members, following[0]]], "tree")
        assert one_more.length > seq_len


@pytest.fixture
def lines(monkeypatch):
    found = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: found.append(text % args))
    monkeypatch.setattr(layouts, "_said", itertools.count())
    return found


LONG = talk(*turns(["short", "long " * 30, "short"]))


@pytest.mark.parametrize("mode", ["tree", "n_pass", "n_pass_merged", "k_pass:2", "paper"])
def test_overlong_samples_are_dropped_with_a_line(mode, lines):
    samples = samples_of(LONG, CHATML, TOKENIZER)
    seq_len = len(samples[2].tokens)
    assert len(samples[1].tokens) > seq_len
    found, report = layouts_of(samples, mode, seq_len)
    assert trained_by(found) == trained([samples[0], samples[2]])
    assert sorted(itertools.chain(*report.members)) == [0, 2]
    assert (report.dropped_samples, report.dropped_tokens) == (1, samples[1].num_trained)
    size = len(samples[1].tokens)
    expected = f"talk.jsonl:7: turn 1: {size} tokens exceed seq_len {seq_len}: dropped with"
    assert lines == report.reasons
    assert lines[0].startswith(expected)


@pytest.mark.parametrize("mode", ["tree", "n_pass", "n_pass_merged", "k_pass:2"])
def test_overlong_samples_are_truncated_from_the_left(mode, lines):
    samples = samples_of(LONG, CHATML, TOKENIZER)
    seq_len = len(samples[2].tokens)
    found, report = layouts_of(samples, mode, seq_len, "truncate")
    cut = len(samples[1].tokens) - seq_len
    prompt = max(samples[1].prompt_length - cut, 1)
    short = Sample(samples[1].tokens[cut:], prompt, 1)
    assert trained_by(found) == trained([samples[0], short, samples[2]])
    assert (report.truncated_samples, report.dropped_samples) == (1, 0)
    assert report.truncated_tokens == samples[1].num_trained - short.num_trained
    assert report.truncated_context == min(cut, samples[1].prompt_length)
    assert len(lines) == 1


def test_truncation_into_the_completion_counts_the_tokens_that_nothing_predicts():
    long = sample(range(20), 5)
    (layout,), report = layouts_of([long], "tree", 10, "truncate")
    assert layout.tokens.tolist() == list(range(10, 20))
    assert layout.edge_targets.tolist() == list(range(11, 20))
    assert (report.truncated_tokens, report.trained_tokens) == (6, 15)
    assert layout.num_edges == report.trained_tokens - report.truncated_tokens


def test_when_all_is_dropped_there_is_no_layout():
    found, report = layouts_of([sample(range(20), 5)], "paper", 10)
    assert found == []
    assert report.dropped_samples == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [("tree", "tree"), (" paper ", "paper"), ("k_pass:4", "k_pass:4"), ("k_pass(4)", "k_pass:4")],
)
def test_modes_parse(text, expected):
    assert str(layouts.parse_mode(text)) == expected


@pytest.mark.parametrize(
    "text", ["", "trees", "k_pass", "k_pass:0", "k_pass:-1", "k_pass:2)", "k_pass:1.5", "tree:2"]
)
def test_unknown_modes_name_the_valid_ones(text):
    with pytest.raises(UserError, match="is not one of tree, n_pass, n_pass_merged, paper, k_pass"):
        layouts_of([sample([1, 2], 1)], text)


def test_unknown_overlong():
    with pytest.raises(UserError, match="overlong='cut'"):
        layouts_of([sample([1, 2], 1)], "tree", 4, "cut")


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_random_conversations_survive_every_mode_and_length(data):
    """Plain conversations of few different tokens, so that turns share prefixes by accident."""
    part = st.lists(st.integers(0, 2), min_size=1, max_size=4)
    history, samples = [], []
    for turn in range(data.draw(st.integers(1, 5))):
        prompt = history + data.draw(part)
        thought, response = data.draw(st.lists(st.integers(0, 2), max_size=4)), data.draw(part)
        tokens = prompt + thought + response
        samples.append(sample(tokens, len(prompt), turn, thought_length=len(thought)))
        history = prompt + response
    longest = max(len(s.tokens) for s in samples)
    seq_len = data.draw(st.integers(longest, longest + 20))
    for mode in (*MODES, "paper"):
        found, _ = layouts_of(samples, mode, seq_len)
        assert trained_by(found) == trained(samples)
        assert all(layout.length <= seq_len for layout in found)


def test_only_the_first_losses_have_their_own_line(lines):
    samples = of("two_turns")
    reports = [layouts.layouts_of(samples, "tree", 20)[1] for _ in range(9)]
    assert len(lines) == 5
    assert sum(report.counts()["dropped_samples"] for report in reports) == 18
