# SPDX-License-Identifier: Apache-2.0
"""The fail-safe: every so many steps a dense step beside the selected one.

A check compares the most likely next tokens. "report" counts; "fallback" decodes a sequence densely
from a check that disagrees until one that agrees. The dense step reads the cache as it is, so it
sees what earlier selected steps wrote.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.long_context import cache
from lm.long_context.cache import Buffers


@dataclasses.dataclass(frozen=True)
class Guard:
    """Static: a check after every `every` steps."""

    every: int
    fallback: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Report:
    """Per sequence."""

    checks: jax.Array  # [B] int32
    disagreements: jax.Array  # [B] int32: checks with another most likely token
    kl: jax.Array  # [B] float32, summed over checks: KL(dense || selected) in nats
    dense: jax.Array  # [B] bool: decoded densely for the time being
    dense_steps: jax.Array  # [B] int32

    @classmethod
    def empty(cls, batch: int) -> "Report":
        zeros = jnp.zeros(batch, jnp.int32)
        return cls(zeros, zeros, jnp.zeros(batch, jnp.float32), jnp.zeros(batch, bool), zeros)


def summary(counts: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What the reports of several sequences say together; counts: the fields of `Report`, [B] each.
    `kl` is the mean of the checks, None without one."""
    checks = int(counts["checks"].sum())
    return {
        "checks": checks,
        "disagreements": int(counts["disagreements"].sum()),
        "kl": float(counts["kl"].sum()) / checks if checks else None,
        "dense_steps": int(counts["dense_steps"].sum()),
    }


def guarded(
    guard: Guard,
    report: Report,
    logits: jax.Array,  # [B, V] float32, of the selected step
    buffers: Buffers,  # after it
    slots: jax.Array,  # [B] int32: where it wrote
    dense_step: Callable[[Buffers], tuple[jax.Array, Buffers]],
    *,
    step: jax.Array,  # [] int32, from 1
    active: jax.Array,  # [B] bool
) -> tuple[jax.Array, Buffers, Report]:
    """Logits and buffers to go on with, and the new report.

    dense_step: does the same step densely, writing over what the selected one wrote.
    """
    due = step % guard.every == 0

    def check(buffers, report):
        selected = cache.take(buffers, slots)
        dense_logits, buffers = dense_step(buffers)
        checked = due & active
        agree = jnp.argmax(dense_logits, axis=-1) == jnp.argmax(logits, axis=-1)
        log_p, log_q = (jax.nn.log_softmax(x, axis=-1) for x in (dense_logits, logits))
        # -inf - -inf on tokens outside the vocabulary
        kl = jnp.sum(jnp.where(log_p > -jnp.inf, jnp.exp(log_p) * (log_p - log_q), 0.0), axis=-1)
        dense = report.dense
        if guard.fallback:
            dense = jnp.where(checked, ~agree, dense)
        use = dense & active
        report = Report(
            checks=report.checks + checked,
            disagreements=report.disagreements + (checked & ~agree),
            kl=report.kl + jnp.where(checked, kl, 0.0),
            dense=dense,
            dense_steps=report.dense_steps + use,
        )

        def pick(old, new):
            shape = (1, -1) + (1,) * (old.ndim - 2)
            return jnp.where(use.reshape(shape), new, old)

        rows = jax.tree.map(pick, selected, cache.take(buffers, slots))
        chosen = jnp.where(use[:, None], dense_logits, logits)
        return chosen, cache.put(buffers, slots, rows), report

    def keep(buffers, report):
        return logits, buffers, report

    needed = jnp.any(active & (due | report.dense))
    return jax.lax.cond(needed, check, keep, buffers, report)
