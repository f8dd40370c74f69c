# SPDX-License-Identifier: Apache-2.0
"""Linear layer and cross entropy by others, and the products alone, prepared for timing.

Each function compiles one alternative for a problem, or raises: `Unsupported` with the reason when
it cannot compute this form or is not installed, whatever the library raises otherwise.
"""

import dataclasses
import functools
import importlib
import os
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lm.benchmarks import attention_alternatives as shared
from lm.benchmarks.attention_problem import Prepared
from lm.benchmarks.linear_log_prob_problem import Problem, prepare
from ops.dispatch import Unsupported

_CHUNK_ROWS = 4096


def _pick(logits: jax.Array, targets: jax.Array) -> jax.Array:
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=1)


def _materialised(x: jax.Array, w: jax.Array, targets: jax.Array) -> jax.Array:
    return _pick(jnp.einsum("RD,VD->RV", x, w, preferred_element_type=jnp.float32), targets)


def jax_materialised(problem: Problem) -> Prepared:
    """All logits in float32."""
    return prepare(problem, _materialised)


def jax_materialised_half(problem: Problem) -> Prepared:
    """All logits, products in the arrays' type and the softmax in float32."""

    def log_prob(x, w, targets):
        return _pick((x @ w.T).astype(jnp.float32), targets)

    return prepare(problem, log_prob)


def jax_chunks(problem: Problem) -> Prepared:
    """Float32 logits of 4096 rows at a time, computed again in the backward pass."""
    rows = len(problem.targets)
    size = min(_CHUNK_ROWS, rows)
    if rows % size:
        raise Unsupported(f"{rows} rows are not whole chunks of {size}")

    def log_prob(x, w, targets):
        chunk = jax.checkpoint(lambda part: _materialised(part[0], w, part[1]))
        parts = x.reshape(-1, size, x.shape[1]), targets.reshape(-1, size)
        return jax.lax.map(chunk, parts).reshape(-1)

    return prepare(problem, log_prob)


def products(problem: Problem) -> Prepared:
    """The products alone, each of the whole arrays: what no implementation can be faster than. The
    form says how many there are; logits stand for the gradients of logits."""
    x, w = problem.x, problem.w

    def multiply(subscripts, a, b):
        function = jax.jit(functools.partial(jnp.einsum, subscripts))
        return function.lower(a, b).compile()

    logits = multiply("RD,VD->RV", x, w)
    d = logits(x, w)
    to_x = multiply("RV,VD->RD", d, w)
    to_w = multiply("RV,RD->VD", d, x) if "w" in problem.wanted else None
    del d

    def run():
        d = logits(x, w)
        if problem.form != "weighted":
            d = logits(x, w)
        return (to_x(d, w),) if to_w is None else (to_x(d, w), to_w(d, x))

    return Prepared(run, jax.block_until_ready, 0, lambda result, rows: None, "no loss")


def torch_compiled(problem: Problem) -> Prepared:
    """torch.compile of a linear layer and cross_entropy."""
    torch = shared._torch()
    # jax-triton empties this, and Inductor then finds no place for its kernels
    if not os.environ.get("TRITON_CACHE_DIR"):
        os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="triton-")
    functional = torch.nn.functional

    def log_prob(x, w, targets, weights):
        losses = functional.cross_entropy(functional.linear(x, w), targets, reduction="none")
        losses = losses.float()
        return -losses if weights is None else -(weights * losses).sum()

    compiled = torch.compile(log_prob, dynamic=False) if _on_gpu(problem) else log_prob
    return _torch_prepare(problem, compiled)


def liger(problem: Problem) -> Prepared:
    """Liger's fused linear cross entropy: a mean over rows, so the weighted form alone."""
    if problem.form != "weighted":
        raise Unsupported("liger: the mean over rows only, with both gradients")
    shared._torch()
    name = "liger_kernel.ops.fused_linear_cross_entropy"
    try:
        with shared._quiet():
            module = importlib.import_module(name)
    except ImportError as error:
        raise Unsupported(f"Liger is not installed: {error}") from error
    fused = module.LigerFusedLinearCrossEntropyFunction

    def log_prob(x, w, targets, weights):
        del weights  # 1 / rows each
        result = fused.apply(x, w, targets)
        return -(result[0] if isinstance(result, tuple) else result)

    return _torch_prepare(problem, log_prob)


ALTERNATIVES: Mapping[str, Callable[[Problem], Prepared]] = {
    "products": products,
    "jax_materialised": jax_materialised,
    "jax_materialised_half": jax_materialised_half,
    "jax_chunks": jax_chunks,
    "torch_compiled": torch_compiled,
    "liger": liger,
}


def _on_gpu(problem: Problem) -> bool:
    return next(iter(problem.x.devices())).platform == "gpu"


def _torch_prepare(problem: Problem, log_prob: Callable[..., Any]) -> Prepared:
    """`log_prob(x, w, targets, weights)` is a scalar with weights and one value per row without."""
    torch = shared._torch()
    x, w, targets, weights = (shared._to_torch(array) for array in problem.arrays)
    targets = targets.long()
    if problem.form == "weighted":
        cotangent, given = torch.ones((), device=x.device), weights
    else:
        cotangent, given = weights, None

    def attend(x, w=w):
        return log_prob(x, w, targets, given)

    arguments = (x, w) if "w" in problem.wanted else (x,)
    prepared = shared._prepare_torch(attend, (*arguments, cotangent), True)

    def to_numpy(result, rows):
        if result.ndim:
            result = result[torch.as_tensor(rows % len(result), device=result.device)]
        return result.float().cpu().numpy()

    return dataclasses.replace(prepared, to_numpy=to_numpy)
