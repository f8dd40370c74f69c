# SPDX-License-Identifier: Apache-2.0
"""Training CP heads: with the model, on a frozen trunk, or with adapters of the last layers.

| `loss.mode` | trained | checkpoint |
|---|---|---|
| `joint` | model and head | both |
| `heads` | head | head; the trunk is read again from `init_from` |
| `lora` | head and adapters | both; the base is read again from `init_from` |
| `trunk` | model, no head | as of any plain run, to put heads on later |

What is trained beside the model's parameters lives under "head": {"params": model, "head": head}.
"""

import functools
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np

from lm import jobs, loop, losses, setup, sharding, train, transformer
from lm.config import ModelConfig
from lm.cp_heads import checkpoints, futures, head
from lm.cp_heads import losses as cp_losses
from lm.cp_heads.config import CpConfig
from lm.cp_heads.head import HeadConfig, HeadParams
from lm.cp_heads.losses import LossConfig
from lm.data import packing
from lm.errors import UserError
from lm.flops import training_flops, trunk_parameters
from lm.progress import say
from lm.workdir import Workdir

_COUNTED_ROWS = 2000  # of training data, to find the frequent tokens


def run(config: CpConfig, workdir: Workdir, profile: bool = False) -> loop.Result:
    """Trains, or goes on training, in `workdir`. Raises UserError and RunError."""
    workdir.create(config)
    check(config)
    resolved = setup.resolve(config, workdir.path / "tokenizer")
    if config.loss.mode != "trunk":
        head.check(config.head, resolved.model)
    check_tokenizer(resolved)
    jobs.save_tokenizer(resolved, workdir)
    say(summary(resolved))
    prepared = job(resolved, workdir, str(workdir.path / "profile") if profile else "")
    result = loop.fit(prepared, workdir)
    say(f"rows {packing.statistics(prepared.data)['fill']:.1%} full")
    return result


def check(config: CpConfig) -> None:
    """Raises UserError for settings that contradict each other."""
    mode, rank = config.loss.mode, config.model.lora.rank
    if mode in ("joint", "heads") and rank:
        raise UserError(f"loss.mode={mode} has no adapters: loss.mode=lora trains them")
    if mode == "lora" and not rank:
        raise UserError("loss.mode=lora needs model.lora.rank of at least 1")
    if config.loss.lora_layers > config.model.num_layers and not config.init_from:
        raise UserError(
            f"loss.lora_layers={config.loss.lora_layers} exceeds the model's "
            f"{config.model.num_layers} layers"
        )
    if config.train.weighting != "per_token":
        raise UserError("CP heads train every token alike: train.weighting must be per_token")
    if mode != "trunk" and config.head.predicted >= config.data.seq_len:
        raise UserError(
            f"head.predicted={config.head.predicted} tokens do not fit rows of "
            f"data.seq_len={config.data.seq_len}"
        )


def check_tokenizer(resolved: setup.Setup) -> None:
    """Raises UserError when the run would feed a model of ours other tokens than it was trained on;
    one without a tokenizer of its own takes any that fits."""
    path = pathlib.Path(resolved.config.init_from)
    if not resolved.config.init_from or setup.is_hf(path):
        return
    workdir = Workdir(path)
    own = setup.resolve(workdir.config(), workdir.path / "tokenizer").tokenizer
    if own.fingerprint != resolved.tokenizer.fingerprint:
        raise UserError(
            f"data.tokenizer={resolved.config.data.tokenizer} gives other tokens than that of "
            f"{path}; data.tokenizer=auto takes its own"
        )


def job(resolved: setup.Setup, workdir: Workdir, profile: str = "") -> loop.Job:
    """The job of a resolved `CpConfig`."""
    config: CpConfig = resolved.config
    model, options = config.model, config.loss
    mesh = sharding.make(config.mesh, model)
    jobs.check_batch(config, mesh)
    if profile:
        jobs.check_profile(config)
    dataset = data_of(resolved)
    execution = jobs.execution_of(resolved, mesh)
    common: dict[str, Any] = {
        "config": config,
        "requested": resolved.requested,
        "data": iter(dataset),
        "total_steps": jobs.count_steps(config, dataset),
        "sharding": mesh,
        "profile": profile,
    }
    if options.mode == "trunk":
        return loop.Job(
            objective=train.edge_objective(model, execution, "per_token"),
            initial=lambda: setup.trained_params(resolved, mesh),
            abstract=setup.abstract_trained(model),
            frozen=setup.frozen_params(resolved, mesh),
            flops=functools.partial(jobs.batch_flops, model),
            **common,
        )
    ids = draft_vocab(resolved, workdir)
    beside = {} if ids is None else {"head": {"vocab": {"ids": jnp.asarray(ids)}}}
    return loop.Job(
        objective=objective(model, config.head, options, execution),
        initial=lambda: initial(resolved, mesh),
        abstract=abstract_trained(config),
        frozen=train.merge(frozen_model(resolved, mesh), _placed(beside, mesh)),
        flops=functools.partial(batch_flops, config),
        metrics=metrics,
        **common,
    )


def data_of(resolved: setup.Setup) -> grain.IterDataset:
    """Batches of packed plain text, with futures for the head."""
    config: CpConfig = resolved.config
    process = jobs.processes(config)
    rows = setup.text_rows(
        resolved, epochs=None if config.train.steps else config.train.epochs, process=process
    )
    dataset = packing.batches(rows, config.train.batch_size // process[1], config.data.seq_len)
    if config.loss.mode == "trunk":
        return dataset
    return dataset.map(futures.WithFutures(config.head.predicted))


# --- what is trained


def abstract_head(config: HeadConfig, model: ModelConfig) -> HeadParams:
    """Shapes of the head's trained parameters."""
    shapes = jax.eval_shape(lambda: head.init(jax.random.key(0), config, model))
    return {name: leaf for name, leaf in shapes.items() if name != "vocab"}


def abstract_trained(config: CpConfig) -> train.Params:
    """Shapes of what a run trains."""
    trained = {"head": abstract_head(config.head, config.model)}
    if config.loss.mode == "heads":
        return trained
    return {"params": setup.abstract_trained(config.model), **trained}


def abstract_frozen(config: CpConfig) -> train.Params:
    """Shapes of what the step reads and never changes."""
    model, mode = config.model, config.loss.mode
    whole = transformer.abstract(model)[1]
    frozen = whole if mode == "heads" else train.partition(model, whole)[1]
    frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, model.dtype), frozen)
    out = {"params": frozen} if frozen else {}
    if config.head.draft_vocab:
        ids = jax.ShapeDtypeStruct((config.head.draft_vocab,), jnp.int32)
        out["head"] = {"vocab": {"ids": ids}}
    return out


def initial(resolved: setup.Setup, mesh: sharding.Sharding | None) -> train.Params:
    """What a run trains, at step 0: the head of `init_from` where it has the same one, else a
    random one."""
    config: CpConfig = resolved.config
    before = _head_before(config)
    if before is not None:
        say(f"the head starts as that of {config.init_from}")
        made = {name: leaf for name, leaf in before.items() if name != "vocab"}
    else:
        key = jax.random.fold_in(jax.random.key(config.train.seed), 1)
        made = jax.jit(lambda key: head.init(key, config.head, config.model))(key)
        made.pop("vocab", None)
    trained = _placed({"head": made}, mesh)
    if config.loss.mode == "heads":
        return trained
    return {"params": setup.trained_params(resolved, mesh), **trained}


def _head_before(config: CpConfig) -> HeadParams | None:
    """The head of `init_from`, where it has the same one."""
    found = checkpoints.head_of(pathlib.Path(config.init_from)) if config.init_from else None
    return found[1] if found is not None and found[0] == config.head else None


def _vocab_before(config: CpConfig) -> np.ndarray | None:
    """The draft vocabulary of that head: what its outputs are."""
    path = pathlib.Path(config.init_from)
    if config.init_from and not setup.is_hf(path):  # without reading the model
        same = Workdir(path).config(CpConfig).head == config.head
        return checkpoints.read_draft_vocab(path) if same else None
    before = _head_before(config)
    return None if before is None else np.asarray(before["vocab"]["ids"])


def frozen_model(resolved: setup.Setup, mesh: sharding.Sharding | None) -> train.Params:
    """What of the model stays as it is, under "params", in the compute dtype."""
    mode = resolved.config.loss.mode
    if mode == "heads":
        return {"params": setup.whole_model(resolved, mesh)}
    frozen = setup.frozen_params(resolved, mesh)
    return {"params": frozen} if frozen else {}


def _placed(tree: Any, mesh: sharding.Sharding | None) -> Any:
    return tree if mesh is None else jax.device_put(tree, mesh.params(tree))


def draft_vocab(resolved: setup.Setup, workdir: Workdir) -> np.ndarray | None:
    """The ids of the draft vocabulary [V'] int32, ascending; None when the head predicts all.

    That of the head which training starts from, else the most frequent tokens of the first rows of
    training data; kept in the workdir, so that a resumed run has the same.
    """
    config: CpConfig = resolved.config
    size = config.head.draft_vocab
    if not size:
        return None
    ids = checkpoints.read_draft_vocab(workdir.path)
    if ids is None:
        before = _vocab_before(config)
        ids = _frequent(resolved, size) if before is None else before
        if not jax.process_index():
            workdir.write(checkpoints.DRAFT_VOCAB, json.dumps(ids.tolist()) + "\n")
    if len(ids) != size:
        raise UserError(
            f"{workdir.path} has a draft vocabulary of {len(ids)} tokens, head.draft_vocab={size}"
        )
    return ids


def _frequent(resolved: setup.Setup, size: int) -> np.ndarray:
    counts = np.zeros(resolved.model.vocab_size, np.int64)
    rows = setup.text_rows(resolved)
    for _, row in zip(range(_COUNTED_ROWS), rows, strict=False):
        targets = row["edge_targets"]
        counts += np.bincount(targets[targets >= 0], minlength=len(counts))
    return head.frequent(counts, size)


# --- the objective


def objective(
    model: ModelConfig, config: HeadConfig, options: LossConfig, execution: losses.Execution
) -> train.Objective:
    """The model's own next-token loss, where it is trained, plus the head's, per trained token."""

    def total_of(params, batch, key):
        trunk = params["params"]
        if options.lora_layers:
            trunk = _last_layers(trunk, options.lora_layers)
        states, table = cp_losses.trunk_states(model, trunk, batch, execution)
        found = cp_losses.Futures(*(batch[name] for name in futures.FUTURE_FIELDS))
        found = cp_losses.drawn(key, found, options.fraction)
        of_head, sums = cp_losses.head_loss(
            params["head"], config, options, model, table, states, found, execution
        )
        weight = jnp.sum(batch["edge_weights"])
        total = of_head
        if options.mode != "heads":
            own, log_probs = losses.log_probs_of(
                model, trunk, states, batch, batch["edge_weights"], execution
            )
            total = options.next_token * own + options.head * of_head
            sums["next_token"] = -jnp.sum(batch["edge_weights"] * log_probs)
        sums |= {"weight": weight, "tokens": weight, "objective": -total}
        return total, sums

    return total_of


def _last_layers(params: transformer.Params, count: int) -> transformer.Params:
    """No gradient reaches adapters below the last `count` layers: they stay as they start, zero."""

    def leaf(path, x):
        if path[0].key != "layers" or not path[-1].key.startswith("lora_"):
            return x
        last = jnp.arange(len(x)) >= len(x) - count
        last = jnp.expand_dims(last, tuple(range(1, x.ndim)))
        return jnp.where(last, x, jax.lax.stop_gradient(x))

    return jax.tree_util.tree_map_with_path(leaf, params)


def metrics(sums: Mapping[str, Any]) -> dict[str, float]:
    """What is logged, from the sums of a step, in nats:

    loss_per_token: what is minimised. next_token: the model's own loss. head: joint NLL of a whole
    future, head_1 ... head_P: of its tokens, each given those before it. gate_effective: how many
    components the gate uses over the batch (exp of its entropy), gate_largest: the share of the
    first among them; gate_entropy: per position. posterior_entropy: what remains unknown about the
    component once the tokens are seen.
    """
    tokens = max(float(sums["tokens"]), 1e-30)
    positions = max(float(sums["head_weight"]), 1e-30)
    out = {"loss_per_token": float(sums["objective"]) / tokens}
    if "next_token" in sums:
        out["next_token"] = float(sums["next_token"]) / tokens
    counts = np.asarray(sums["head_count"], np.float64)
    nll = np.asarray(sums["head_nll"], np.float64)
    out["head"] = float(nll.sum()) / positions
    for step, value in enumerate(nll / np.maximum(counts, 1e-30), 1):
        out[f"head_{step}"] = float(value)
    gate = np.asarray(sums["gate"], np.float64) / positions
    entropy = -sum(p * math.log(p) for p in gate.tolist() if p > 0)
    out["gate_effective"], out["gate_largest"] = math.exp(entropy), float(gate.max())
    for name in ("gate_entropy", "posterior_entropy"):
        out[name] = float(sums[name]) / positions
    return out


def batch_flops(config: CpConfig, host: Mapping[str, np.ndarray]) -> float:
    """Model FLOPs of a step on these rows."""
    until = host["until"].astype(np.int64)
    pairs = int((until - np.arange(until.shape[1])).clip(0).sum())
    edges = int((host["edge_targets"] >= 0).sum())
    targets = int((host["future_targets"] >= 0).sum())
    return step_flops(config, until.size, edges, pairs, targets)


def step_flops(
    config: CpConfig, tokens: int, edges: int, pairs: int, targets: int | None = None
) -> float:
    """Model FLOPs of a step over so many tokens, trained edges and visible pairs: the trunk's,
    forward only where it is frozen, and the head's products with the vocabulary and its expanders.

    targets: tokens of all futures; None: of futures that are never cut short.
    """
    model, own = config.model, config.head
    frozen = config.loss.mode == "heads"
    trunk = training_flops(model, tokens, 0 if frozen else edges, pairs)
    if frozen:
        trunk -= 4 * tokens * trunk_parameters(model)
        trunk -= 8 * pairs * model.num_heads * model.head_dim * model.num_layers
    targets = edges * own.predicted if targets is None else targets
    rows = config.loss.fraction * targets * own.rank
    products = 4 if config.loss.mode in ("heads", "lora") else 6
    expander = sum(x.size for x in jax.tree.leaves(abstract_head(own, model).get("expander", {})))
    if own.expander == "direct":
        return float(trunk + 6 * rows * model.embed_dim * (own.draft_vocab or model.vocab_size))
    per_row = products * model.embed_dim * (own.draft_vocab or model.vocab_size)
    return float(trunk + rows * (per_row + 6 * expander / (own.rank * own.predicted)))


def summary(resolved: setup.Setup) -> str:
    """One line about what is trained."""
    config: CpConfig = resolved.config
    model = config.model
    total = transformer.count_parameters(model)
    if config.loss.mode == "trunk":
        return f"{total / 1e6:.2f} M parameters, vocabulary {model.vocab_size}"
    size = sum(x.size for x in jax.tree.leaves(abstract_head(config.head, model)))
    trained = sum(x.size for x in jax.tree.leaves(abstract_trained(config)))
    return (
        f"{total / 1e6:.2f} M parameters and {size / 1e6:.2f} M of a head of rank "
        f"{config.head.rank} for {config.head.predicted} tokens, {trained / 1e6:.2f} M trained, "
        f"vocabulary {model.vocab_size}"
    )
