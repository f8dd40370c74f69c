# SPDX-License-Identifier: Apache-2.0
"""What the papers hand to each other is theirs, and what does not fit is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import compositions
from experiments.compositions import Parts
from lm import train, transformer
from lm.config import SamplingConfig
from lm.cp_heads import draft, head, speaking
from lm.cp_heads.drafters import Heads
from lm.cp_heads.head import HeadConfig
from lm.draft_inference.methods import Methods
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


def test_a_head_draws_as_it_is_told():
    """Of many draws after one state, the first drafted token has the filtered law of its factor."""
    config = HeadConfig(rank=1, predicted=2, expander_rank=4)
    weights = head.init(jax.random.key(1), config, MODEL)
    proposer, made = compositions.chain(SPEAKER, Heads(config), weights)
    count, state = 4000, 3 * jax.random.normal(jax.random.key(2), (1, MODEL.embed_dim))
    sampling = SamplingConfig(temperature=2.0, top_k=3)

    @jax.jit
    def both(params, made):
        table = transformer.unembedding(MODEL, params)
        found = draft.factors(made, config, MODEL, state, table, SPEAKER.valid_vocab)
        states = jnp.broadcast_to(state, (count, MODEL.embed_dim))
        keys = jax.random.split(jax.random.key(3), count)
        last = jnp.zeros(count, jnp.int32)
        return proposer(params, made, states, last, sampling, keys), found.log_p[1][0, 0]

    tokens, law = map(np.asarray, both(SPEAKER.params, made))
    best = np.argsort(-law)[:3]
    wanted = np.exp(law[best] / 2) / np.exp(law[best] / 2).sum()
    found = np.array([(tokens[:, 0] == token).mean() for token in best])
    assert found.sum() == pytest.approx(1)
    np.testing.assert_allclose(found, wanted, atol=4 * (0.25 / count) ** 0.5)


def opened(monkeypatch, config, speaker=SPEAKER, target=SPEAKER):
    weights = head.init(jax.random.key(1), config, speaker.model)
    loaded = speaking.Drafting(speaker, config, weights)
    monkeypatch.setattr(speaking, "load", lambda path, dtype: loaded)
    return compositions.proposals("somewhere")(target), weights


def test_a_head_drafts_for_its_own_model(monkeypatch, capsys):
    """Rows know it by where it is, and what is measured with it by what it is."""
    config = HeadConfig(rank=2, predicted=3, expander_rank=4)
    found, weights = opened(monkeypatch, config)
    assert found.name == "heads:somewhere"
    assert found.bytes == sum(x.nbytes for x in jax.tree.leaves(weights))
    assert capsys.readouterr().err == ""
    method = Methods(proposals=found).make("speckv", 128)
    method.check(MODEL, None, None)
    assert "somewhere" not in repr(method)
    other, _ = opened(monkeypatch, dataclasses.replace(config, transition="constant"))
    assert len({found.digest, other.digest, train.params_sha256(weights)}) == 3
    trained = dataclasses.replace(
        SPEAKER, params=transformer.init(MODEL, jax.random.key(9)), stop_ids=()
    )
    opened(monkeypatch, config, target=trained)
    assert "was trained with other weights" in capsys.readouterr().err
    narrow = dataclasses.replace(MODEL, embed_dim=32)
    with pytest.raises(UserError, match="the head is for 384 tokens and width 64"):
        method.check(narrow, None, None)
    with pytest.raises(UserError, match="a model of 384 tokens and width 32 needs"):
        opened(monkeypatch, config, target=dataclasses.replace(SPEAKER, model=narrow))
    foreign = dataclasses.replace(SPEAKER, tokenizer=SPEAKER.tokenizer.add_tokens(["<other>"]))
    with pytest.raises(UserError, match="drafts tokens of another tokenizer"):
        opened(monkeypatch, config, target=foreign)


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
    assert policy.chunk > 8  # a prompt is read whole, in chunks wider than the window
    assert policy.config.prefill == "dense"
