# SPDX-License-Identifier: Apache-2.0
"""Distils a draft on the user's prompts: on them and on what the target answers, the draft's
next-token law is moved towards the target's.

| loss | what it is |
|---|---|
| `loss_per_token` | KL(target, draft) in nats: answers weigh 1, prompts `tasks.text_weight` |
| `loss_per_turn` | the same of answers alone |

The run starts from the draft (`init_from`) and is a draft like any other afterwards.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any, SupportsIndex

import grain
import jax
import jax.numpy as jnp
import numpy as np

from lm import jobs, loop, losses, prompting, setup, sharding, train, transformer, tuned
from lm.config import ModelConfig, SamplingConfig
from lm.data import packing
from lm.data.layout import Layout
from lm.draft_inference.config import DraftConfig
from lm.errors import UserError
from lm.long_context import asking, decode
from lm.long_context import rows as documents
from lm.long_context.policy import Dense
from lm.progress import Progress, say
from lm.prompting import Speaker
from lm.workdir import Workdir

LEARNT = "learnt.json"  # from which target and prompts
_EDGES = 256  # whose laws over the vocabulary exist at a time
_BATCH = 8  # prompts that the target answers at once


def run(
    config: DraftConfig,
    target: pathlib.Path,
    draft: str,
    data: pathlib.Path,
    workdir: Workdir,
    new_tokens: int,
    chat: bool = False,
) -> dict[str, Any]:
    """Trains, or goes on training, in `workdir`, by the config's `train` and `optimizer`.

    Returns what `train` does, and the mean KL over all rows `kl_before` and `kl_after`.

    Raises UserError: two models that do not read the same tokens, rows that do not fit into
    data.seq_len, a mesh; DataError and RunError.
    """
    if not config.train.steps:
        raise UserError("train.steps=0 (epochs): set train.steps, rows come again and again")
    if config.train.weighting != "per_token":
        raise UserError("adapt weighs tokens: leave train.weighting at per_token")
    data_config = dataclasses.replace(config.data, tokenizer="auto")  # the draft's own
    config = dataclasses.replace(config, init_from=draft, data=data_config)
    load = prompting.load_hf if setup.is_hf(target) else prompting.load_workdir
    teacher = load(target)
    resolved = setup.resolve(config)
    if resolved.tokenizer.fingerprint != teacher.tokenizer.fingerprint:
        raise UserError("draft and target have different tokenizers: their tokens differ")
    if sharding.make(config.mesh, resolved.model) is not None:
        raise UserError("adapt runs on one device: leave config.mesh at 1")
    workdir.create(config)
    about = _about(workdir, teacher, data, new_tokens, chat)
    layouts = _layouts(config, teacher, data, new_tokens, chat)
    workdir.write(LEARNT, json.dumps(about) + "\n")
    made = job(resolved, teacher, layouts)
    result = loop.fit(made, workdir)
    found = functools.partial(divergence, made, layouts)
    return {
        **jobs.result(result),
        "kl_before": found(made.initial()),
        "kl_after": found(result.state.params),
        "rows": len(layouts),
    }


def _about(
    workdir: Workdir, teacher: Speaker, data: pathlib.Path, new_tokens: int, chat: bool
) -> dict[str, Any]:
    """What the draft learns from. Raises UserError where the workdir has learnt from other
    answers."""
    try:
        prompts = hashlib.sha256(data.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{data}: {error.strerror}") from None
    now = {
        "target": tuned.digest(teacher.params),
        "prompts": prompts,
        "new_tokens": new_tokens,
        "chat": chat,
    }
    file = workdir.path / LEARNT
    before = json.loads(file.read_text()) if file.exists() else now
    changed = [name for name, value in now.items() if before.get(name) != value]
    if changed:
        raise UserError(
            f"{workdir.path} learnt from another {' and '.join(changed)}: use another workdir"
        )
    return now


def _layouts(
    config: DraftConfig, teacher: Speaker, data: pathlib.Path, new_tokens: int, chat: bool
) -> list[Layout]:
    """Every prompt with the target's own greedy answer."""
    records = asking.read(data)
    prompts = [asking.encode(teacher, text, start, chat) for text, start, _ in records]
    sampling, out = SamplingConfig(max_new_tokens=new_tokens), []
    longest = max(map(len, prompts)) + new_tokens + 1
    if longest > config.data.seq_len:
        raise UserError(
            f"{data}: a prompt with its answer takes up to {longest} tokens, "
            f"data.seq_len={config.data.seq_len}"
        )
    with Progress("answers of the target", len(prompts)) as progress:
        for batch in _batches(prompts):
            answers, _ = decode.decode(
                teacher.model,
                teacher.params,
                batch,
                sampling,
                Dense(),
                teacher.stop_ids,
                jax.random.key(0),
                valid_vocab=teacher.valid_vocab,
            )
            for prompt, answer in zip(batch, answers, strict=True):
                end = teacher.stop_ids[:1] if answer.stopped else ()
                whole = np.append(answer.tokens, end).astype(np.int32)
                branch = (np.zeros(0, np.int32), whole)
                out.append(documents.layout(prompt, [branch], config.tasks.text_weight))
            progress.advance(len(batch))
    return out


def _batches(prompts: Sequence[np.ndarray]) -> list[Sequence[np.ndarray]]:
    return [prompts[i : i + _BATCH] for i in range(0, len(prompts), _BATCH)]


@dataclasses.dataclass(frozen=True, eq=False)
class _Rows:
    """A source of layouts for grain."""

    layouts: Sequence[Layout]

    def __len__(self) -> int:
        return len(self.layouts)

    def __getitem__(self, index: SupportsIndex) -> packing.Group:
        return packing.Group([self.layouts[index]], {"documents": 1})


def _data(config: DraftConfig, layouts: Sequence[Layout], epochs: int | None) -> grain.IterDataset:
    source = grain.MapDataset.source(_Rows(layouts))
    if epochs is None:
        source = source.seed(config.data.seed).shuffle().repeat()
    packed = packing.PackedRows(source.to_iter_dataset(), config.data.seq_len, config.data.window)
    return packing.batches(packed, config.train.batch_size, config.data.seq_len)


def job(resolved: setup.Setup, teacher: Speaker, layouts: Sequence[Layout]) -> loop.Job:
    """The job of a draft with the target beside it."""
    config: DraftConfig = resolved.config
    execution = jobs.execution_of(resolved, None)
    real = teacher.valid_vocab or teacher.model.vocab_size
    return loop.Job(
        config=config,
        requested=resolved.requested,
        objective=objective(config.model, teacher.model, real, execution),
        initial=lambda: setup.trained_params(resolved, None),
        abstract=setup.abstract_trained(resolved.model),
        frozen={**setup.frozen_params(resolved, None), "target": teacher.params},
        data=iter(_data(config, layouts, None)),
        total_steps=config.train.steps,
    )


def objective(
    draft: ModelConfig, target: ModelConfig, vocabulary: int, execution: losses.Execution
) -> train.Objective:
    """Minus the weighted KL of all edges; parameters of the target lie under "target"."""

    def found(params, batch, key):
        del key  # nothing is drawn
        both = {"draft": {k: v for k, v in params.items() if k != "target"}}
        both["target"] = jax.lax.stop_gradient(params["target"])
        rows = batch["edge_rows"][..., None]
        states = {}
        for name, model in (("draft", draft), ("target", target)):
            whole = losses.forward(model, both[name], batch, execution)
            picked = jnp.take_along_axis(whole, rows, axis=1)
            states[name] = picked.reshape(-1, picked.shape[-1])

        @jax.checkpoint
        def one(pair):
            mine, own = (
                jax.nn.log_softmax(transformer.logits(model, both[name], x)[:, :vocabulary])
                for (name, model), x in zip(
                    (("draft", draft), ("target", target)), pair, strict=True
                )
            )
            return jnp.sum(jnp.exp(own) * (own - mine), axis=-1)

        kl = _mapped(one, (states["draft"], states["target"])).reshape(rows.shape[:2])
        sums = losses.normalised(batch, -kl)
        sums["weight"] = sums["weight_per_token"]
        return -sums["loss_per_token"], sums

    return found


def _mapped(one: Any, arrays: tuple[jax.Array, jax.Array]) -> jax.Array:
    """`one` of `_EDGES` rows at a time."""
    count = len(arrays[0])
    size = -(-count // _EDGES) * _EDGES
    chunks = tuple(
        jnp.pad(x, ((0, size - count), (0, 0))).reshape(-1, _EDGES, x.shape[-1]) for x in arrays
    )
    return jax.lax.map(one, chunks).reshape(-1)[:count]


def divergence(made: loop.Job, layouts: Sequence[Layout], params: train.Params) -> float:
    """Mean KL in nats over all edges, each row once."""

    @jax.jit
    def sums(params, frozen, batch):
        whole = train.merge(train.cast(params, made.config.model.dtype), frozen)
        return made.objective(whole, batch, jax.random.key(0))[1]

    total = weight = 0.0
    for host in _data(made.config, layouts, 1):
        one = jax.device_get(sums(params, made.frozen, train.to_device(host, None)))
        total += float(one["loss_per_token"])
        weight += float(one["weight_per_token"])
    say(f"KL to the target: {total / weight:.4f} nats a token")
    return total / weight
