# SPDX-License-Identifier: Apache-2.0
"""The masks that attention is timed and swept under are what their names say."""

import numpy as np
import pytest

from lm.benchmarks import masks, random_masks
from lm.errors import UserError
from ops.visibility import Visibility


def simulated(prompt: int, groups: list[masks.Group]) -> np.ndarray:
    """[n, n]: which token sees which, from sets of token ids that each thread has seen."""
    seen: list[set[int]] = []  # per token of the layout, itself included
    main: set[int] = set()

    def emit(history: set[int]) -> None:
        history.add(len(seen))
        seen.append(set(history))

    for _ in range(prompt):
        emit(main)
    for group in groups:
        forks = []
        for number, text in enumerate(group.texts):
            for _ in range(text):
                emit(main)
            if number < len(group.blocks):
                forks.append(set(main))
        for fork, size in zip(forks, group.blocks, strict=True):
            for _ in range(size):
                emit(fork)
        if group.synced:
            main.update(*forks)
            emit(main)
    out = np.zeros((len(seen),) * 2, bool)
    for row, keys in enumerate(seen):
        out[row, sorted(keys)] = True
    return out


@pytest.mark.parametrize("seed", range(20))
def test_async_programs_follow_their_threads(seed):
    rng = np.random.default_rng(seed)
    groups = []
    for remaining in reversed(range(int(rng.integers(1, 4)))):
        blocks = rng.integers(1, 5, rng.integers(1, 4)).tolist()
        texts = rng.integers(0, 4, len(blocks) + 1).tolist()
        groups.append(masks.Group(texts, blocks, bool(remaining or rng.integers(2))))
    mask = masks._visibility(*masks.async_program(3, groups))
    expected = simulated(3, groups)
    np.testing.assert_array_equal(mask.as_array(len(expected))[0], expected)


def test_one_conversation_is_the_prefix_tree_of_training():
    human, thought, response = turn = (2, 3, 4)
    until = masks.conversation(2, turn)
    # human, its answer for what follows, the second turn; then the first one's thought and answer
    second = response + sum(turn)
    total = human + second + thought + response
    ends = [total] * human + [human + second] * second + [total] * (thought + response)
    np.testing.assert_array_equal(until, ends)


@pytest.mark.parametrize("name", masks.CASES)
@pytest.mark.parametrize("length", [700, 1500])
def test_pairs_are_those_of_the_dense_mask(name, length):
    case = masks.case(name, length, batch=2)
    dense = np.asarray(case.visibility.as_array(length))
    assert dense.shape == (2, length, length)
    assert case.pairs == dense.sum()
    assert dense[:, np.arange(length), np.arange(length)].all()  # every row holds a token
    assert case.causal == (name == "causal")
    if case.causal:
        assert case.pairs == length * (length + 1)


def test_conversations_are_cut_to_fit():
    whole = masks.one_pass(3000, turns=2)
    size = 2 * 960 - 192
    dense = np.asarray(whole.as_array(3000))[0]
    assert not dense[size:, :size].any()  # the next conversation
    np.testing.assert_array_equal(dense[size:, size:], dense[: 3000 - size, : 3000 - size])


def test_an_unknown_mask_is_refused():
    with pytest.raises(UserError, match="'oneoff' is not one of one_pass"):
        masks.case("oneoff", 100)


@pytest.mark.parametrize("family", random_masks.FAMILIES)
@pytest.mark.parametrize(("num_rows", "num_keys"), [(96, 96), (40, 96)])
def test_random_masks_count_their_pairs(family, num_rows, num_keys):
    blind = pairs = 0
    for seed in range(8):
        mask = random_masks.random_visibility(seed, family, 2, num_rows, num_keys, runs=seed % 2)
        mask.check()
        dense = np.asarray(mask.as_array(num_rows))
        assert masks.visible_pairs(mask, num_rows) == dense.sum()
        pairs += dense.sum()
        blind += (~dense.any(-1)).sum()
        assert (mask.hidden_from is None) == (seed % 2 == 0 and "async" not in family)
    assert blind > 0
    assert pairs > 0


def test_random_masks_of_a_family_differ():
    for family in random_masks.FAMILIES:
        drawn = [random_masks.random_visibility(s, family, 1, 64, 64, True) for s in range(4)]
        assert len({np.asarray(mask.until).tobytes() for mask in drawn}) > 1


def test_async_families_hide_something():
    drawn = [
        random_masks.random_visibility(s, "async, packed", 1, 200, 200, True) for s in range(4)
    ]
    for mask in drawn:
        all_seen = masks.visible_pairs(Visibility(mask.until), 200)
        assert masks.visible_pairs(mask, 200) < all_seen
