# SPDX-License-Identifier: Apache-2.0
"""Several heads trained on one frozen trunk in one step, each as if it were trained alone.

The trunk runs once for all of them, and so do the product with the vocabulary, which takes the rows
of all heads at once, the data pipeline and the compiler. What a head learns does not depend on its
company: its loss reads its own parameters only, AdamW works number by number, and gradients are not
clipped by a norm that all heads would share.

What is trained is {"head": {name: a head's parameters}}, so that a checkpoint of it is read like
that of any run on a frozen trunk.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import jobs, loop, losses, setup, train
from lm.config import ModelConfig
from lm.cp_heads import baselines, futures, head, training
from lm.cp_heads import losses as cp_losses
from lm.cp_heads.baselines import Hydra
from lm.cp_heads.config import CpConfig
from lm.cp_heads.head import HeadConfig
from lm.cp_heads.losses import LossConfig
from lm.errors import UserError
from lm.flops import trunk_parameters
from lm.workdir import Workdir

Members = Mapping[str, HeadConfig | Hydra]


def check(config: CpConfig, members: Members) -> None:
    """Raises UserError for what cannot be trained together."""
    if not members:
        raise UserError("no heads to train")
    if config.optimizer.clip_norm:
        raise UserError(
            "heads that are trained together do not share a norm: optimizer.clip_norm=0"
        )
    if config.loss.distill:
        raise UserError("heads are trained together on tokens: loss.distill=0")
    for name, one in members.items():
        if isinstance(one, HeadConfig) and (one.draft_vocab or one.expander == "direct"):
            raise UserError(f"{name}: heads that are trained together share the model's vocabulary")


def longest(members: Members) -> int:
    """P of the head that predicts the most tokens."""
    return max(one.predicted for one in members.values())


def init(key: jax.Array, members: Members, model: ModelConfig) -> dict[str, Any]:
    """Random parameters of every head, each from the same key: neighbours change nothing."""
    return {
        name: head.init(key, one, model)
        if isinstance(one, HeadConfig)
        else baselines.init_hydra(key, one, model)
        for name, one in members.items()
    }


def objective(
    members: Members, model: ModelConfig, options: LossConfig, execution: losses.Execution
) -> train.Objective:
    """The sum of the heads' losses on rows with futures for the longest of them."""

    def total_of(params, batch, key):
        states, table = cp_losses.trunk_states(model, params["params"], batch, execution)
        found = cp_losses.Futures(*(batch[name] for name in futures.FUTURE_FIELDS))
        found = cp_losses.drawn(key, found, options.fraction)
        h = jnp.take_along_axis(states, found.rows[..., None], axis=1)
        rows, targets = [], []
        for name, one in members.items():
            own = found.targets[..., : one.predicted]
            if isinstance(one, HeadConfig):
                made = cp_losses.component_rows(params["head"][name], one, h, own)
            else:
                made = baselines.hydra_rows(one, params["head"][name], params["params"], h, own)
            rows.append(made[0])
            targets.append(made[1])
        sizes = [x.shape[1] for x in rows]
        log_prob = losses.sharded_log_prob(
            jnp.concatenate(rows, axis=1),
            table,
            jnp.concatenate(targets, axis=1),
            None,
            execution,
            model.logit_softcap,
        )
        parts = jnp.split(log_prob, np.cumsum(sizes)[:-1].tolist(), axis=1)
        total, sums = 0.0, {}
        for (name, one), part in zip(members.items(), parts, strict=True):
            if isinstance(one, HeadConfig):
                short = found._replace(
                    targets=found.targets[..., : one.predicted],
                    children=found.children[..., : one.predicted],
                )
                log_a = part.reshape(*h.shape[:2], one.predicted, one.rank)
                own, seen = cp_losses.head_loss(
                    params["head"][name],
                    one,
                    options,
                    model,
                    table,
                    states,
                    short,
                    execution,
                    log_a,
                )
                nll = jnp.sum(seen["head_nll"])
            else:
                part = part.reshape(*h.shape[:2], one.length)
                own = jnp.sum(found.weights[..., None] * part)
                nll = -own
            total, sums[f"nll/{name}"] = total + own, nll
        weight = jnp.sum(found.weights)
        return total, sums | {"weight": weight, "positions": weight}

    return total_of


def metrics(sums: Mapping[str, Any]) -> dict[str, float]:
    """Nats per future: of every head by name, and all of them together as `loss_per_token`."""
    count = max(float(sums["positions"]), 1e-30)
    out = {n: float(x) / count for n, x in sums.items() if n.startswith("nll/")}
    return {"loss_per_token": sum(out.values()), **out}


def rows_of(members: Members) -> int:
    """Rows of the product with the vocabulary, for each position that is trained."""
    return sum(
        one.predicted * one.rank if isinstance(one, HeadConfig) else one.length
        for one in members.values()
    )


def step_flops(config: CpConfig, members: Members) -> float:
    """Model FLOPs of a step on full rows: the frozen trunk forward, three products with the
    vocabulary (logits, logits again, their gradient), and the heads' own parameters."""
    model, tokens = config.model, config.train.batch_size * config.data.seq_len
    positions = config.loss.fraction * tokens
    shapes = jax.eval_shape(lambda key: init(key, members, model), jax.random.key(0))
    own = sum(x.size for x in jax.tree.leaves(shapes))
    attention = 2 * config.data.seq_len * model.num_heads * model.head_dim * model.num_layers
    trunk = tokens * (2 * trunk_parameters(model) + attention)
    vocabulary = 6 * model.embed_dim * model.vocab_size * rows_of(members)
    return float(trunk + positions * (vocabulary + 6 * own))


def run(config: CpConfig, members: Members, workdir: Workdir) -> loop.Result:
    """Trains the heads on the model of `init_from`, or goes on training them, in `workdir`.

    Of the config, `head` says nothing but how many tokens futures have: as many as the longest
    member's. Raises UserError and RunError.
    """
    config = dataclasses.replace(
        config,
        head=dataclasses.replace(config.head, predicted=longest(members)),
        loss=dataclasses.replace(config.loss, mode="heads", lora_layers=0),
    )
    check(config, members)
    workdir.create(config)
    training.check(config)
    resolved = setup.resolve(config, workdir.path / "tokenizer")
    training.check_tokenizer(resolved)
    jobs.save_tokenizer(resolved, workdir)
    own: CpConfig = resolved.config
    execution = jobs.execution_of(resolved, None)
    dataset = training.data_of(resolved)

    def made(key):
        return {"head": init(key, members, own.model)}

    key = jax.random.key(own.train.seed)
    job = loop.Job(
        config=own,
        requested=resolved.requested,
        objective=objective(members, own.model, own.loss, execution),
        initial=lambda: jax.jit(made)(key),
        abstract=jax.eval_shape(made, key),
        frozen={"params": setup.whole_model(resolved, None)},
        data=iter(dataset),
        total_steps=jobs.count_steps(own, dataset),
        flops=lambda host: step_flops(own, members),
        metrics=metrics,
    )
    return loop.fit(job, workdir)


def load(workdir: Workdir) -> dict[str, Any]:
    """The heads of the newest checkpoint, by name. Raises UserError without one."""
    config = workdir.config(CpConfig)
    resolved = setup.resolve(config, workdir.path / "tokenizer")
    return setup.restored(resolved, workdir).beside
