# SPDX-License-Identifier: Apache-2.0
"""Attention and top-k of other libraries on the cache of a selection problem, prepared for timing.

Each function returns stages as (run, wait, bytes), or raises `Unsupported` with the reason when the
library is not there. Libraries are imported only when they are asked for; their tensors share the
memory of JAX's arrays.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from lm.benchmarks.selection_problem import Problem
from ops.dispatch import Unsupported, current_platform


class Prepared(NamedTuple):
    run: Callable[[], Any]
    wait: Callable[[Any], Any]
    bytes: int


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise Unsupported(f"PyTorch is not installed: {error}") from error
    if current_platform() == "gpu" and not torch.cuda.is_available():
        raise Unsupported("this PyTorch does not see the GPU")
    return torch


def _shared(array: jax.Array) -> Any:
    return _torch().from_dlpack(jax.block_until_ready(array))


def _wait(results: Any) -> Any:
    torch = _torch()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return results


def torch(problem: Problem) -> dict[str, Prepared]:
    """scaled_dot_product_attention over the whole cache, and torch.topk with a sort."""
    torch = _torch()
    q = _shared(problem.small["q"]).transpose(1, 2)
    k, v = (_shared(x)[0].transpose(1, 2) for x in problem.buffers[:2])
    T, grouped = q.shape[2], problem.heads.N != problem.heads.K
    mask = None
    if T > 1:  # aligned to the end of the cache
        from torch.nn.attention.bias import causal_lower_right

        mask = causal_lower_right(T, problem.tokens)

    def attend():
        with torch.no_grad():
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, enable_gqa=grouped
            )

    votes = torch.rand(problem.tokens, device=q.device)

    def top():
        return votes.topk(problem.config.k, sorted=False)[1].sort()[0]

    return {
        "full": Prepared(attend, _wait, 2 * problem.bytes_of(problem.buffers.k)),
        "top_k": Prepared(top, _wait, 4 * problem.tokens),
    }


def flashinfer(problem: Problem) -> dict[str, Prepared]:
    """Dense attention over the contiguous cache, and over listed slots as pages of one token."""
    torch = _torch()
    try:
        import flashinfer
    except ImportError as error:
        raise Unsupported(f"FlashInfer is not installed: {error}") from error
    q, (k, v) = _shared(problem.small["q"])[0], (_shared(x)[0, 0] for x in problem.buffers[:2])
    heads, M = problem.heads, problem.listed
    if problem.mode == "decode":
        dense = functools.partial(flashinfer.single_decode_with_kv_cache, q[0], k, v)
    else:
        dense = functools.partial(flashinfer.single_prefill_with_kv_cache, q, k, v, causal=True)
    space = torch.empty(256 << 20, dtype=torch.uint8, device=q.device)
    entries = functools.partial(torch.tensor, dtype=torch.int32, device=q.device)
    pages = _shared(problem.small["slots"])[0]
    layout = (entries([0, M]), pages, entries([1]), heads.N, heads.K, heads.H, 1)
    types = {"q_data_type": q.dtype, "kv_data_type": k.dtype}
    if problem.mode == "decode":
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(space, "NHD")
        wrapper.plan(*layout, **types)
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(space, "NHD")
        wrapper.plan(entries([0, len(q)]), *layout, causal=True, **types)
    listed = functools.partial(wrapper.run, q, (k[:, None], v[:, None]))
    return {
        "full": Prepared(dense, _wait, 2 * problem.bytes_of(problem.buffers.k)),
        "attend": Prepared(listed, _wait, problem.read),
    }


OTHERS: Mapping[str, Callable[[Problem], dict[str, Prepared]]] = {
    "torch": torch,
    "flashinfer": flashinfer,
}


def turns(seconds: float, guess: float) -> int:
    """How many turns of `guess` seconds fill `seconds`."""
    return max(1, min(1000, math.ceil(seconds / guess)))
