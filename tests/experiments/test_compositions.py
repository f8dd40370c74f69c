# SPDX-License-Identifier: Apache-2.0
"""What the papers hand to each other is theirs, and what does not fit is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import compositions
from experiments.compositions import Parts
from lm import transformer
from lm.cp_heads import draft, head
from lm.cp_heads.drafters import Heads
from lm.cp_heads.head import HeadConfig
from lm.errors import UserError
from tests.lm.async_decoding.composed_programs import MODEL, SPEAKER


def test_a_head_of_one_component_proposes_its_most_likely_tokens():
    config = HeadConfig(rank=1, predicted=3, expander_rank=4)
    weights = head.init(jax.random.key(1), config, MODEL)
    proposer, made = compositions.chain(SPEAKER, Heads(config), weights)
    states = jax.random.normal(jax.random.key(2), (5, MODEL.embed_dim))
    last = jnp.arange(5, dtype=jnp.int32)

    @jax.jit
    def both(params, made):
        table = transformer.unembedding(MODEL, params)
        found = draft.factors(made, config, MODEL, states, table, SPEAKER.valid_vocab)
        return proposer(params, made, states, last), found.log_p

    tokens, laws = both(SPEAKER.params, made)
    assert proposer.length == 2
    expected = np.stack([np.argmax(law[:, 0], axis=-1) for law in laws[1:]], axis=-1)
    assert tokens.tolist() == expected.tolist()


def test_what_does_not_fit_is_refused():
    for config, chains in ((HeadConfig(rank=2, predicted=1), 1), (HeadConfig(rank=2), 2)):
        with pytest.raises(UserError, match="one chain each"):
            compositions.chain(SPEAKER, Heads(config, chains), {})
    made = compositions.makers(SPEAKER, Parts(draft_layers=9))
    with pytest.raises(UserError, match="9 layers cannot draft"):
        made.spec_kv(64).check(MODEL, None, None)
    with pytest.raises(UserError, match="budget"):
        made.token_select(100)  # below the first and last tokens
    assert made.cp_heads is None
    policy = compositions.makers(SPEAKER, Parts(select_init=4, select_local=8)).token_select(32)
    assert policy.limit == 32
    assert policy.chunk == 8
