# SPDX-License-Identifier: Apache-2.0
"""Prefill and the decode loop with selection, compiled whole for hardware that is not here."""

import os

import jax
import numpy as np
import pytest

from lm import aot, hardware, sharding
from lm.config import MeshConfig, ModelConfig, SamplingConfig
from lm.long_context import decode
from lm.long_context.policy import Dense
from lm.long_context.program import Program
from lm.token_select.config import SelectConfig
from lm.token_select.method import TokenSelect
from ops import dispatch
from tests import gpu_target, prepared

# read when the TPU compiler is loaded
os.environ.update(
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_WORKER_ID="0",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
)
MODEL = ModelConfig(
    vocab_size=512, num_layers=2, embed_dim=256, num_heads=8, num_kv_heads=2, head_dim=128,
    mlp_dim=256, dtype="bfloat16",
)  # fmt: skip
DRAWN = SamplingConfig(temperature=0.7, top_k=20, top_p=0.9, max_new_tokens=64)
SELECT = SelectConfig(n_init=128, n_local=128, k=256, chunk=128, shadow="int8", reuse=0.9)
TOKENS = 30_000


def compiled(program, batch, place, whole):
    """Both programs; `place` gives the shardings of parameters, `whole` that of all else."""

    def spec(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    params = prepared.shapes(MODEL, place)
    prompts = [np.zeros(TOKENS, np.int32)] * batch
    key = jax.eval_shape(lambda: jax.random.key(0))
    program, arguments = decode.request(program, prompts, [1], key)
    arguments = jax.tree.map(lambda x: spec(x, whole), arguments)
    first = decode.prefill.lower(program, params, *arguments).compile()
    state = jax.eval_shape(lambda *a: decode.prefill(program, *a), params, *arguments)
    state = jax.tree.map(spec, state, first.output_shardings)
    scalar = jax.ShapeDtypeStruct((), np.int32, sharding=whole)
    loop = decode.advance.lower(program, params, state, arguments.stop_ids, scalar).compile()
    return first, loop, program.capacity


def check(first, loop, capacity, share):
    """Nothing as large as the cache is made beside it."""
    # bfloat16 keys and values, codes and their scales
    per_token = MODEL.num_layers * MODEL.num_kv_heads * (2 * 2 * 128 + 128 + 4)
    cache = share * capacity * per_token
    for program in (first, loop):
        memory = program.memory_analysis()
        assert cache <= memory.output_size_in_bytes < 1.2 * cache
        assert memory.temp_size_in_bytes < 0.5 * cache
        assert hardware.compiled_bytes(program) < 2 * cache
    assert loop.memory_analysis().alias_size_in_bytes >= cache


@pytest.mark.slow  # those of CP heads stand for it in every run
def test_a_tpu_topology():
    mesh = sharding.make(MeshConfig(data=2, fsdp=1, tensor=2), MODEL, aot.devices_of("v5e:2x2"))
    program = Program(MODEL, DRAWN, TokenSelect(SELECT), 0, mesh, valid_vocab=500)
    with dispatch.target_platform("tpu"):
        first, loop, capacity = compiled(program, 4, mesh.params, mesh.named())
    check(first, loop, capacity, share=4 / 4)
    for one in (first, loop):
        # a device holds its own part of the cache and never meets the whole of it
        assert f"bf16[2,2,{capacity},1,128]" in one.as_text()
        assert f"bf16[2,4,{capacity}," not in one.as_text()


@pytest.mark.skipif(bool(gpu_target.missing()), reason="compile-only packages are missing")
def test_an_h100():
    whole = gpu_target.abstract("H100", (), np.int32).sharding
    program = Program(MODEL, DRAWN, TokenSelect(SELECT), valid_vocab=500)
    with gpu_target.target("H100"):
        first, loop, capacity = compiled(
            program, 1, lambda x: jax.tree.map(lambda _: whole, x), whole
        )
    check(first, loop, capacity, share=1)


@pytest.mark.skipif(bool(gpu_target.missing()), reason="compile-only packages are missing")
def test_dense_steps_leave_the_cache_as_it_lies():
    """XLA would put heads first in the whole cache around the loop; no layer is copied either."""
    program = Program(MODEL, DRAWN, Dense(128), valid_vocab=500)
    whole = gpu_target.abstract("H100", (), np.int32).sharding

    def spec(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)

    params = prepared.shapes(MODEL, lambda x: jax.tree.map(lambda _: whole, x))
    key = jax.eval_shape(lambda: jax.random.key(0))
    program, arguments = decode.request(program, [np.zeros(TOKENS, np.int32)], [1], key)
    arguments = jax.tree.map(spec, arguments)
    with gpu_target.target("H100"):
        state = jax.eval_shape(lambda *a: decode.prefill(program, *a), params, *arguments)
        state = jax.tree.map(spec, state)
        limit = jax.ShapeDtypeStruct((), np.int32, sharding=whole)
        loop = decode.advance.lower(program, params, state, arguments.stop_ids, limit).compile()
    memory = loop.memory_analysis()
    assert memory.temp_size_in_bytes < 0.1 * memory.alias_size_in_bytes
