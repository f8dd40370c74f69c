# SPDX-License-Identifier: Apache-2.0
"""The loop of all threads, compiled whole for hardware that is not here."""

import dataclasses
import os

import jax
import numpy as np
import pytest

from lm import aot, hardware, sharding
from lm.async_decoding import decode, language, tables
from lm.config import MeshConfig, ModelConfig
from lm.text.tokenizers import ByteTokenizer
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
    vocab_size=512, num_layers=2, embed_dim=128, num_heads=8, num_kv_heads=4, head_dim=128,
    mlp_dim=128, dtype="bfloat16",
)  # fmt: skip
SETTINGS = decode.Settings(max_tokens=960, threads=8)
CAPACITY = 8192
TOKENIZER = ByteTokenizer().add_tokens(language.TAGS)


def compiled(mesh, place, whole):
    """The loop for 4 requests; `place` gives the shardings of parameters, `whole` that of all
    else."""
    program = decode.Program(
        MODEL, SETTINGS.sampling, SETTINGS.rules("predicted"), CAPACITY, mesh, None, 500
    )

    def spec(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    params = prepared.shapes(MODEL, place)
    key = jax.eval_shape(lambda: jax.random.key(0))
    known = tables.make(TOKENIZER, TOKENIZER.stop_ids, MODEL.vocab_size)
    arguments = (np.zeros((4, 128), np.int32), *np.ones((2, 4), np.int32), key)
    known, arguments = jax.tree.map(lambda x: spec(x, whole), (known, arguments))
    state = jax.eval_shape(lambda *a: decode.prefill(program, *a), params, known, *arguments)
    split = jax.tree.map(lambda _: whole, state)
    if mesh is not None:
        entries = mesh.named(None, "batch", None, "kv_heads", None)
        split = dataclasses.replace(
            split, pool=decode.Pool(entries, entries, mesh.named("batch", None))
        )
    state = jax.tree.map(spec, state, split)
    limit = jax.ShapeDtypeStruct((), np.int32, sharding=whole)
    return decode.advance.lower(program, params, known, state, limit).compile()


def pool_bytes(requests, heads):
    return 2 * MODEL.num_layers * requests * CAPACITY * heads * MODEL.head_dim * 2


def check(loop, own, kernel):
    """The pool's own bytes come in and go out, in place; a step copies none of them."""
    memory = loop.memory_analysis()
    assert memory.alias_size_in_bytes >= own
    assert memory.temp_size_in_bytes < own / 4
    assert 0 < hardware.compiled_bytes(loop) < 1.5 * own
    assert kernel in loop.as_text()


@pytest.mark.slow  # those of CP heads stand for it in every run
def test_a_tpu_topology():
    mesh = sharding.make(MeshConfig(data=2, fsdp=1, tensor=2), MODEL, aot.devices_of("v5e:2x2"))
    with dispatch.target_platform("tpu"):
        loop = compiled(mesh, mesh.params, mesh.named())
    check(loop, pool_bytes(2, 2), 'custom_call_target="tpu_custom_call"')
    # a device holds its own part of the pool and never meets the whole of it
    assert f"bf16[2,2,{CAPACITY},2,128]" in loop.as_text()
    assert f"bf16[2,4,{CAPACITY}," not in loop.as_text()


@pytest.mark.skipif(bool(gpu_target.missing()), reason="compile-only packages are missing")
def test_an_h100():
    whole = gpu_target.abstract("H100", (), np.int32).sharding
    with gpu_target.target("H100"):
        loop = compiled(None, lambda x: jax.tree.map(lambda _: whole, x), whole)
    check(loop, pool_bytes(4, 4), "triton_kernel_call")
