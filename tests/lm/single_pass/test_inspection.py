# SPDX-License-Identifier: Apache-2.0
import matplotlib.image
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.single_pass import inspection
from lm.single_pass.layouts import layouts_of
from lm.single_pass.samples import Sample, samples_of
from lm.text import chat, tokenizers
from tests.lm.single_pass.adversarial import ALL, PLAIN

TOKENIZER = tokenizers.load_tokenizer("bytes")
CHATML = chat.load_template("chatml", TOKENIZER)


def rows_of(name, mode="tree", **options):
    samples = samples_of(ALL[name], CHATML, TOKENIZER)
    found, report = layouts_of(samples, mode, **options)
    return [
        (layout, inspection.token_rows(layout, members, TOKENIZER))
        for layout, members in zip(found, report.fitted, strict=True)
    ]


def text_of(rows, role, turn):
    return "".join(r.text for r in rows if (r.role, r.turn) == (role, turn)).replace("·", " ")


def test_roles_and_turns():
    ((layout, rows),) = rows_of("two_turns")
    assert text_of(rows, "user", 0) == "question 0"
    assert text_of(rows, "user", 1) == "question 1"
    assert text_of(rows, "thought", 0) == r"<think>\nwhy\n</think>\n\n"
    assert text_of(rows, "response", 0) == "reply 0reply 0<|im_end|>"  # context, then trained
    assert text_of(rows, "response", 1) == "reply 1<|im_end|>"
    assert [r.index for r in rows] == list(range(layout.length))
    assert [r.position for r in rows] == layout.positions.tolist()
    assert [r.until for r in rows] == layout.until.tolist()


def test_targets_are_the_edges():
    ((layout, rows),) = rows_of("same_rollouts")
    assert sum(len(r.targets) for r in rows) == layout.num_edges
    start = next(r for r in rows if r.targets)
    assert start.targets == ("<think> x3",)
    branching = rows_of("regenerated")[0][1]
    assert max(len(r.targets) for r in branching) == 2


@pytest.mark.parametrize("name", ALL)
def test_every_conversation_can_be_inspected(name):
    for layout, rows in rows_of(name):
        assert len(rows) == layout.length
        trained = {rows[i].role for i in layout.edge_children}
        assert trained <= {"thought", "response"}


def test_tool_loop_roles():
    ((_, rows),) = rows_of("tool_loop")
    assert text_of(rows, "tool", 1).startswith("6")
    call = text_of(rows, "response", 0)
    assert call.count("<tool_call>") == 1
    assert text_of(rows, "response", 1).count("<tool_call>") == 1


def test_paper_and_split_layouts():
    for _, rows in rows_of("two_turns", "paper"):
        assert text_of(rows, "response", 1) == "reply 1<|im_end|>" * 2  # output, then context copy
    pieces = rows_of("forty_turns", seq_len=1600)
    assert len(pieces) > 1
    assert pieces[1][1][0].text == "<|im_start|>"


def test_truncated_samples_keep_their_roles():
    ((_, rows),) = rows_of("one_turn", seq_len=40, overlong="truncate")
    assert text_of(rows, "thought", 0) + text_of(rows, "response", 0) == (
        r"<think>\nonly\n</think>\n\nreply 0<|im_end|>"
    )


def test_samples_of_tokens_alone():
    sample = Sample(np.array([65, 66, 67], np.int32), 1, 0)
    (layout,), _ = layouts_of([sample], "tree")
    rows = inspection.token_rows(layout, [sample], TOKENIZER)
    assert [(r.text, r.role) for r in rows] == [("A", "?"), ("B", "?"), ("C", "?")]
    with pytest.raises(ValueError, match="0 samples for a layout of 1"):
        inspection.token_rows(layout, [], TOKENIZER)


def test_table():
    samples = samples_of(PLAIN["two_turns"], CHATML, TOKENIZER)
    (layout,), _ = layouts_of(samples, "tree")
    lines = inspection.table(layout, samples, TOKENIZER).splitlines()
    assert lines[0].split() == ["index", "token", "role", "turn", "position", "until", "targets"]
    assert len(lines) == layout.length + 1
    assert lines[1].split() == ["0", "<|im_start|>", "template", "0", "0", str(layout.length)]


def dense(until):
    rows, keys = np.arange(len(until))[:, None], np.arange(len(until))[None]
    return (keys <= rows) & (rows < until[None])


def test_picture_is_the_literal_mask():
    until = np.array([5, 3, 3, 5, 5], np.int32)
    assert inspection.picture(until) == "#....\n##...\n###..\n#..#.\n#..##"


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.randoms(use_true_random=False))
def test_occupancy_is_the_mean_of_the_mask(size, block, random):
    until = np.array([random.randint(0, size) for _ in range(size)], np.int32)
    count = -(-size // block)
    padded = np.zeros((count * block, count * block))
    padded[:size, :size] = dense(until)
    expected = padded.reshape(count, block, count, block).mean(axis=(1, 3))
    np.testing.assert_allclose(inspection.occupancy(until, block), expected)


def test_long_pictures_are_of_blocks():
    until = np.full(1000, 1000, np.int32)
    until[100:300] = 300
    lines = inspection.picture(until, limit=50).splitlines()
    assert len(lines) == 51
    assert lines[-1] == "(1000 rows, 20 x 20 pairs per character)"
    assert lines[40][:16] == "@" * 5 + " " * 10 + "@"


def test_saved_picture_of_a_long_layout_never_makes_a_square_array(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    samples, history = [], rng.integers(0, 255, 50)
    for turn in range(20):
        tokens = np.concatenate([history, rng.integers(0, 255, 300)]).astype(np.int32)
        samples.append(Sample(tokens, len(history), turn))
        history = np.concatenate([history, rng.integers(0, 255, 100)])
    (layout,), _ = layouts_of(samples, "tree")
    assert layout.length > 4 * inspection.EXACT_LIMIT
    shapes = []
    real = inspection.occupancy

    def spy(until, block):
        shapes.append(real(until, block).shape)
        return real(until, block)

    monkeypatch.setattr(inspection, "occupancy", spy)
    inspection.save_picture(layout, tmp_path / "mask.png", "a long one")
    assert max(shapes[0]) <= inspection.EXACT_LIMIT
    image = matplotlib.image.imread(tmp_path / "mask.png")
    assert image.shape[0] > 500
    assert image[..., :3].min() < 0.1  # something is drawn
