# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax
import numpy as np
import pytest

from lm import transformer
from lm.async_decoding import layout, positions, programs, simulate, verify
from lm.config import ModelConfig
from lm.data import packing
from lm.errors import UserError
from lm.losses import visibility_of
from ops.visibility import Visibility

MODEL = ModelConfig(vocab_size=128, num_layers=2, embed_dim=32, head_dim=8, mlp_dim=48)


def ids(*values):
    return np.array(values, np.int32)


# prompt 1 2 | 3 [promise a: 4 5] 6 [promise b: 7] sync 9 end
# block a: opening 20, text 21 22, end 99; block b: opening 30, end 99
PROGRAM = programs.EncodedProgram(
    prompt=ids(1, 2),
    main=ids(3, 4, 5, 6, 7, 8, 9, 10),
    forks=np.array([2, 4]),
    syncs=np.array([5]),
    tokens=np.array([10, 20]),
    openings=(ids(20), ids(30)),
    blocks=(ids(21, 22), ids()),
    close=99,
)


def test_the_grouped_order_in_pictures():
    made = layout.layout_of(PROGRAM, "fork_join_max")
    assert made.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 20, 21, 22, 99, 30, 99, 8, 9, 10]
    (row,) = packing.pack([made], 16)
    vectors = visibility_of({name: row[name][None] for name in row if "edge" not in name})
    assert Visibility(*map(np.asarray, dataclasses.astuple(vectors)[:3])).picture() == (
        "#...............\n"
        "##..............\n"
        "###.............\n"
        "####............\n"
        "#####...........\n"
        "######..........\n"
        "#######.........\n"
        "#####..#........\n"  # block a: not main after its promise
        "#####..##.......\n"
        "#####..###......\n"
        "#####..####.....\n"
        "#######....#....\n"  # block b: not block a
        "#######....##...\n"
        "##############..\n"  # the sync sees both
        "###############.\n"
        "################"
    )
    edges = sorted(zip(made.edge_rows.tolist(), made.edge_targets.tolist(), strict=True))
    main = [(1, 3), (2, 4), (3, 5), (4, 6), (5, 7), (6, 8), (13, 9), (14, 10)]
    assert edges == sorted([*main, (7, 21), (8, 22), (9, 99), (11, 99)])


@pytest.mark.parametrize(
    ("scheme", "main", "blocks"),
    [
        # promise a ends at 4: block a is 4 long and 12 were promised; b: 2 long and 22
        ("predicted", [0, 1, 2, 3, 4, 17, 18, 41, 42, 43], [5, 19]),
        ("oracle", [0, 1, 2, 3, 4, 9, 10, 13, 14, 15], [5, 11]),
        ("fork_join_max", [0, 1, 2, 3, 4, 5, 6, 9, 10, 11], [5, 7]),
        ("fork_join_sum", [0, 1, 2, 3, 4, 5, 6, 13, 14, 15], [5, 7]),
    ],
)
def test_positions_by_hand(scheme, main, blocks):
    got = positions.positions_of(PROGRAM, scheme)
    assert [part.tolist() for part in got] == [main, blocks]


def test_an_unknown_scheme_is_refused():
    with pytest.raises(UserError, match="positions='fixed' is not one of predicted"):
        layout.layout_of(PROGRAM, "fixed")
    with pytest.raises(ValueError, match="at least one token"):
        layout.layout_of(dataclasses.replace(PROGRAM, prompt=ids()), "oracle")


def test_thousands_of_random_programs():
    """Also the row form: a prefix and a run that ends with the row; one hidden run per key."""
    rng, findings = np.random.default_rng(0), verify.Findings()
    for number in range(1500):
        program = simulate.random_program(rng)
        scheme = positions.SCHEMES[number % 4]
        made = layout.layout_of(program, scheme)
        verify.check_structure(program, made, findings)
        verify.check_positions(program, scheme, made, findings)
        if number % 4:
            continue
        rows = np.arange(made.length)
        seen = (rows <= rows[:, None]) & (rows[:, None] < made.until)
        seen &= ~((made.hidden_from <= rows[:, None]) & (rows[:, None] < made.hidden_until))
        assert made.pairs == seen.sum()
        for row in range(made.length):
            gaps = np.flatnonzero(np.diff(seen[row, : row + 1].astype(int)))
            assert len(gaps) in (0, 2)
            assert seen[row, 0]
            assert seen[row, row]
    assert dataclasses.asdict(findings) == dataclasses.asdict(verify.Findings())


@pytest.mark.parametrize("field", ["positions", "tokens", "until", "hidden_until", "edge_targets"])
def test_a_planted_error_is_found(field):
    made = layout.layout_of(PROGRAM, "predicted")
    wrong = getattr(made, field).copy()
    wrong[9] += -8 if field == "until" else 1
    findings, made = verify.Findings(), dataclasses.replace(made, **{field: wrong})
    verify.check_structure(PROGRAM, made, findings)
    verify.check_positions(PROGRAM, "predicted", made, findings)
    assert len(findings.problems()) == 1


def test_verify_counts_and_fails():
    def found(corrupt=None, **options):
        return verify.verify(
            MODEL, {}, [PROGRAM], random_programs=5, logits=0, corrupt=corrupt, **options
        )

    steps = []
    right = found(advance=lambda: steps.append(1))
    assert (right.programs, len(steps), right.problems()) == (6, 6, [])
    for corrupt, field in zip(verify.CORRUPTIONS, ("visibility", "position", "label"), strict=True):
        (problem,) = found(corrupt).problems()
        assert field in problem


def test_a_program_without_promises_is_a_chain():
    program = dataclasses.replace(
        PROGRAM,
        forks=np.zeros(0, int),
        syncs=np.zeros(0, int),
        tokens=np.zeros(0, int),
        openings=(),
        blocks=(),
    )
    for scheme in positions.SCHEMES:
        made = layout.layout_of(program, scheme)
        assert made.tokens.tolist() == [*program.prompt, *program.main]
        assert made.positions.tolist() == list(range(10))
        assert (made.until == 10).all()
        assert not made.hidden_until.any()


@pytest.fixture(scope="module")
def params():
    return transformer.init(MODEL, jax.random.key(0))


@pytest.mark.parametrize("scheme", positions.SCHEMES)
def test_logits_equal_those_of_each_thread_by_itself(params, scheme):
    rng = np.random.default_rng(1)
    for _ in range(2):
        program = simulate.random_program(rng, size=4, blocks=3)
        assert verify.check_logits(MODEL, params, program, scheme) < 2e-5
    assert verify.check_logits(MODEL, params, PROGRAM, scheme, "reference") < 2e-5


def test_wrong_logits_are_found(params, monkeypatch):
    right = layout.layout_of

    def wrong(program, scheme):
        made = right(program, scheme)
        return dataclasses.replace(made, hidden_until=np.zeros_like(made.hidden_until))

    monkeypatch.setattr(layout, "layout_of", wrong)
    assert verify.check_logits(MODEL, params, PROGRAM, "oracle") > 1e-3
