# SPDX-License-Identifier: Apache-2.0
"""Prefill and the decode loop with drafts, compiled whole for hardware that is not here."""

import os

import jax
import numpy as np
import pytest

from lm import aot, hardware, sharding
from lm.config import MeshConfig, ModelConfig, SamplingConfig
from lm.cp_heads import decode, head
from lm.cp_heads.drafters import Heads, Target
from lm.cp_heads.head import HeadConfig
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
    vocab_size=512, num_layers=2, embed_dim=128, num_heads=4, num_kv_heads=2, head_dim=64,
    mlp_dim=128, dtype="bfloat16",
)  # fmt: skip
HEAD = HeadConfig(2, 3, "linear", expander_rank=8, draft_vocab=256)
DRAWN = SamplingConfig(temperature=0.7, top_k=20, top_p=0.9, max_new_tokens=64)


def compiled(program, place, whole):
    """Both programs; `place` gives the shardings of parameters, `whole` that of all else."""

    def spec(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def cast(x):
        dtype = MODEL.dtype if np.issubdtype(x.dtype, np.floating) else x.dtype
        return jax.ShapeDtypeStruct(x.shape, dtype)

    params = prepared.shapes(MODEL, place)
    weights = jax.eval_shape(lambda: head.init(jax.random.key(0), HEAD, MODEL))
    prompts = [np.zeros(100, np.int32)] * 4
    key = jax.eval_shape(lambda: jax.random.key(0))
    _, arguments, stops = decode.request(program.target, program.drafter, prompts, [1], key)
    weights = jax.tree.map(cast, weights)
    weights, arguments, stops = jax.tree.map(lambda x: spec(x, whole), (weights, arguments, stops))
    first = decode.prefill.lower(program, params, weights, *arguments, stops).compile()
    state = jax.eval_shape(
        lambda *a: decode.prefill(program, *a), params, weights, *arguments, stops
    )
    state = jax.tree.map(spec, state, first.output_shardings)
    scalar = jax.ShapeDtypeStruct((), np.int32, sharding=whole)
    loop = decode.advance.lower(program, params, weights, state, stops, scalar, scalar).compile()
    return first, loop


def test_a_tpu_topology():
    mesh = sharding.make(MeshConfig(data=2, fsdp=1, tensor=2), MODEL, aot.devices_of("v5e:2x2"))
    target = Target(MODEL, DRAWN, mesh, valid_vocab=500)
    program = decode.Program(target, Heads(HEAD, chains=2), 256)
    with dispatch.target_platform("tpu"):
        for one in compiled(program, mesh.params, mesh.named()):
            assert 0 < hardware.compiled_bytes(one) < 2**25
            # a device holds its own part of the cache and never meets the whole of it
            assert "bf16[2,2,256,1,64]" in one.as_text()
            assert "bf16[2,4,256," not in one.as_text()


@pytest.mark.skipif(bool(gpu_target.missing()), reason="compile-only packages are missing")
def test_an_h100():
    whole = gpu_target.abstract("H100", (), np.int32).sharding
    program = decode.Program(Target(MODEL, DRAWN, valid_vocab=500), Heads(HEAD), 256)
    with gpu_target.target("H100"):
        for one in compiled(program, lambda x: jax.tree.map(lambda _: whole, x), whole):
            assert 0 < hardware.compiled_bytes(one) < 2**25
