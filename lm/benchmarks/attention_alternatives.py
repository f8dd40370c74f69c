# SPDX-License-Identifier: Apache-2.0
"""Attention by others, prepared for timing: PyTorch's and JAX's own.

Each function compiles one alternative for a problem, or raises: `Unsupported` with the reason when
it cannot compute this mask or is not installed, whatever the library raises otherwise. PyTorch is
imported only when it is asked for.
"""

import contextlib
import functools
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.benchmarks.attention_problem import Prepared, Problem, prepare_jax, repeat_heads
from lm.benchmarks.masks import WINDOW
from ops.dispatch import Unsupported, current_platform
from ops.visibility import Visibility


def flex_mask(visibility: Visibility, convert: Callable[[Any], Any]) -> Callable[..., Any]:
    """The visibility as FlexAttention's `mask_mod(b, h, q_idx, kv_idx)`, over vectors of the
    library that `convert` puts them into."""
    until = convert(visibility.until)
    runs = visibility.hidden_from is not None
    hidden_from = convert(visibility.hidden_from) if runs else None
    hidden_until = convert(visibility.hidden_until) if runs else None
    offset = None if visibility.row_offset is None else convert(visibility.row_offset)

    def mask_mod(b, h, q_idx, kv_idx):
        row = q_idx if offset is None else q_idx + offset[b]
        seen = (kv_idx <= row) & (row < until[b, kv_idx])
        if not runs:
            return seen
        return seen & ~((hidden_from[b, kv_idx] <= row) & (row < hidden_until[b, kv_idx]))

    return mask_mod


def torch_flex(problem: Problem, backward: bool) -> Prepared:
    """FlexAttention with the same mask, compiled, its block mask made beforehand and timed."""
    torch, (q, k, v, d_out) = _torch_tensors(problem)
    from torch.nn.attention import flex_attention as flex

    # jax-triton empties this, and Inductor then finds no place for its kernels
    if not os.environ.get("TRITON_CACHE_DIR"):
        os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="triton-")
    # every length and mask is a program of its own, which is not to be mistaken for a leak
    torch._dynamo.config.cache_size_limit = 1024
    torch._dynamo.config.accumulated_cache_size_limit = 4096
    compiled = q.is_cuda  # on CPUs the plain functions serve to compare numbers
    attend, build = flex.flex_attention, flex.create_block_mask
    if compiled:
        attend = torch.compile(attend, dynamic=False)
        build = torch.compile(build, dynamic=False)
    mask_mod = flex_mask(problem.case.visibility, _to_torch)
    B, _, T, _ = q.shape
    make = functools.partial(build, mask_mod, B, None, T, k.shape[2], device=q.device)
    block_mask = make()
    grouped = problem.heads.N != problem.heads.K
    call = functools.partial(attend, block_mask=block_mask, enable_gqa=grouped)
    prepared = _prepare_torch(call, (q, k, v, d_out), backward)
    repeats, began = 5, time.perf_counter()
    for _ in range(repeats):
        made = make()
    prepared.wait((made.kv_num_blocks,))
    prepared.measured["block_mask_ms"] = 1e3 * (time.perf_counter() - began) / repeats
    return prepared


def torch_sdpa(backend: str, problem: Problem, backward: bool) -> Prepared:
    """scaled_dot_product_attention with one backend: dense, causal only."""
    _causal_only(problem)
    torch, tensors = _torch_tensors(problem)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attend(q, k, v, grouped):
        with sdpa_kernel([getattr(SDPBackend, backend)]):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=grouped
            )

    grouped = problem.heads.N != problem.heads.K
    call = functools.partial(attend, grouped=grouped)
    try:
        return _prepare_torch(call, tensors, backward)
    except RuntimeError:
        if not grouped:
            raise
    group = problem.heads.N // problem.heads.K
    q, k, v, d_out = tensors
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    call = functools.partial(attend, grouped=False)
    return _prepare_torch(call, (q, k, v, d_out), backward, "k and v repeated beforehand")


def jax_cudnn(problem: Problem, backward: bool) -> Prepared:
    """cuDNN through jax.nn.dot_product_attention: causal, and with a sliding window."""
    windowed = problem.case.name == "sliding_window"
    if not windowed:
        _causal_only(problem)
    window = (WINDOW - 1, 0) if windowed else None

    def attend(q, k, v):
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=True, local_window_size=window, implementation="cudnn"
        )

    arrays = (problem.q, problem.k, problem.v, problem.d_out)
    return prepare_jax(attend, arrays, (), backward)


def jax_triton(problem: Problem, backward: bool) -> Prepared:
    """JAX's own Pallas kernel through Triton: dense, causal only."""
    _causal_only(problem)
    _on_gpu()
    with _quiet():
        from jax.experimental.pallas.ops.gpu import attention
    notes, k, v = "", problem.k, problem.v
    if problem.heads.N != problem.heads.K:
        notes, (k, v) = "k and v repeated beforehand", repeat_heads(problem)

    def attend(q, k, v):
        return attention.mha(q, k, v, None, sm_scale=problem.heads.H**-0.5, causal=True)

    with _quiet():
        return prepare_jax(attend, (problem.q, k, v, problem.d_out), (), backward, notes)


def jax_mosaic(problem: Problem, backward: bool) -> Prepared:
    """JAX's own Pallas Mosaic GPU sample: dense and causal, in float16 alone, unscaled scores."""
    _causal_only(problem)
    _on_gpu()
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    blocks = attention_mgpu.TuningConfig(
        block_q=64, block_kv=128 if problem.heads.H <= 128 else 64, max_concurrent_steps=2,
        causal=True,
    )  # fmt: skip
    arrays = (problem.q * problem.heads.H**-0.5, problem.k, problem.v, problem.d_out)
    arrays = tuple(x.astype(jnp.float16) for x in arrays)
    notes = "q scaled beforehand" + ("" if problem.q.dtype == jnp.float16 else ", in float16")
    return prepare_jax(
        lambda q, k, v: attention_mgpu.attention(q, k, v, blocks), arrays, (), backward, notes
    )


ALTERNATIVES: Mapping[str, Callable[[Problem, bool], Prepared]] = {
    "torch_flex": torch_flex,
    "torch_cudnn": functools.partial(torch_sdpa, "CUDNN_ATTENTION"),
    "torch_flash": functools.partial(torch_sdpa, "FLASH_ATTENTION"),
    "jax_cudnn": jax_cudnn,
    "jax_triton": jax_triton,
    "jax_mosaic": jax_mosaic,
}


def _causal_only(problem: Problem) -> None:
    if not problem.case.causal:
        raise Unsupported("plain causal attention only")


def _on_gpu() -> None:
    if current_platform() != "gpu":
        raise Unsupported("no GPU")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _torch() -> Any:
    try:
        with _quiet():
            import torch
    except ImportError as error:
        raise Unsupported(f"PyTorch is not installed: {error}") from error
    if current_platform() == "gpu" and not torch.cuda.is_available():
        raise Unsupported("this PyTorch does not see the GPU")
    return torch


def _to_torch(array: jax.Array) -> Any:
    """The same values in PyTorch, on the same device, copied."""
    return _torch().from_dlpack(jax.block_until_ready(array)).clone()


def _torch_tensors(problem: Problem) -> tuple[Any, tuple[Any, ...]]:
    """PyTorch, and q, k, v, d_out as [B, heads, T, H]."""
    torch = _torch()
    arrays = (problem.q, problem.k, problem.v, problem.d_out)
    return torch, tuple(_to_torch(x).transpose(1, 2).contiguous() for x in arrays)


def _prepare_torch(
    attend: Callable[..., Any], tensors: tuple[Any, ...], backward: bool, notes: str = ""
) -> Prepared:
    torch = _torch()
    cuda = tensors[0].is_cuda
    *qkv, d_out = tensors
    if backward:
        qkv = [x.detach().requires_grad_() for x in qkv]

    def run():
        if not backward:
            with torch.no_grad():
                return (attend(*qkv),)
        out = attend(*qkv)
        return out.detach(), *torch.autograd.grad(out, qkv, d_out)

    def wait(results):
        if cuda:
            torch.cuda.synchronize()
        return results

    def to_numpy(result, rows):
        chosen = result.index_select(2, torch.as_tensor(rows, device=result.device))
        return chosen.float().transpose(1, 2).cpu().numpy()

    with _quiet():
        wait(run())  # compiles
    temp = 0
    if cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = wait(run())
        kept = sum(x.numel() * x.element_size() for x in results)
        temp = torch.cuda.max_memory_allocated() - before - kept
    return Prepared(run, wait, temp, to_numpy, notes)


def release() -> None:
    """Gives PyTorch's cached memory and programs back, for the next problem of either library."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch._dynamo.reset()
        torch.cuda.empty_cache()


def difference(got: Any, want: Any) -> float:
    """max |difference| / max |wanted| of two float32 arrays."""
    return float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-30))
