# SPDX-License-Identifier: Apache-2.0
"""The draft's pass and the target's, compiled whole for hardware that is not here."""

import dataclasses
import os

import jax
import numpy as np
import pytest

from lm import aot, hardware, sharding
from lm.config import MeshConfig, ModelConfig, SamplingConfig
from lm.draft_inference import compression
from lm.draft_inference import draft as drafts
from lm.draft_inference.config import DraftSettings
from lm.draft_inference.methods import Methods
from lm.long_context import decode
from lm.long_context.program import Program
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
SMALL = dataclasses.replace(MODEL, num_layers=1, embed_dim=128)
DRAWN = SamplingConfig(temperature=0.7, max_new_tokens=32)
TOKENS = 6_000  # beyond the sparse prefill's 4,096
SHORT = 1_500


def compiled(name, mesh, batch, length, place, whole):
    """(the draft's program, the target's prefill, slots of a list)"""

    def spec(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    method = Methods(DraftSettings(layers=1)).make(name, 256)
    program = Program(MODEL, DRAWN, method, 0, mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    prompts = [np.zeros(length, np.int32)] * batch
    program, request = decode.request(program, prompts, [1], key)
    request = jax.tree.map(lambda x: spec(x, whole), request)
    extra = program.policy.extra
    P = request.tokens.shape[1] - extra
    tokens = jax.ShapeDtypeStruct((batch, P), np.int32, sharding=whole)
    watch = None if method.compressor is None else method.compressor.watch(SMALL.num_layers)
    looking = drafts._Looking(SMALL, DRAWN, max(extra, 1), watch, mesh, None, None, 0)
    rest = request.lengths, request.indices, request.stop_ids, request.key
    look = drafts._look.lower(looking, prepared.shapes(SMALL, place), tokens, *rest).compile()
    if method.compressor is not None:
        importance = jax.ShapeDtypeStruct((batch, P), np.float32, sharding=whole)
        shorter = compression.compress.lower(
            method.compressor, request._replace(tokens=tokens), importance, extra
        )
        made = shorter.compile() and shorter.out_info[0]
        request = request._replace(tokens=spec(made.tokens, whole))
    if method.votes:
        rows = jax.ShapeDtypeStruct((batch,), np.int32, sharding=whole)
        width = request.tokens.shape[1] + (extra if method.compressor is not None else 0)
        tokens = jax.ShapeDtypeStruct((batch, width), np.int32, sharding=whole)
        request = request._replace(tokens=tokens, rows=rows)
    params = prepared.shapes(MODEL, place)
    first = decode.prefill.lower(program, params, *request).compile()
    return look, first, program.capacity


def kept_bytes(capacity, batch):
    return 2 * 2 * 128 * MODEL.num_layers * MODEL.num_kv_heads * capacity * batch


@pytest.mark.slow  # those of CP heads stand for it in every run
def test_a_tpu_topology():
    mesh = sharding.make(MeshConfig(data=2, fsdp=1, tensor=2), MODEL, aot.devices_of("v5e:2x2"))
    with dispatch.target_platform("tpu"):
        look, first, capacity = compiled("speckv_pc", mesh, 2, SHORT, mesh.params, mesh.named())
    assert capacity == 320  # 256 of the prompt, 32 new ones, the last one again
    # what comes out is a device's quarter of the lists, and not the prompt's keys
    out = first.memory_analysis().output_size_in_bytes
    assert kept_bytes(capacity, 2) / 4 <= out < kept_bytes(capacity, 2)
    assert hardware.compiled_bytes(look) > 0


@pytest.mark.slow  # eviction and CP heads compile in every run
@pytest.mark.skipif(bool(gpu_target.missing()), reason="compile-only packages are missing")
def test_an_h100():
    whole = gpu_target.abstract("H100", (), np.int32).sharding
    with gpu_target.target("H100"):
        look, first, capacity = compiled(
            "speckv", None, 1, TOKENS, lambda x: jax.tree.map(lambda _: whole, x), whole
        )
    out = first.memory_analysis().output_size_in_bytes
    assert kept_bytes(capacity, 1) <= out < 2 * kept_bytes(capacity, 1)
    # the draft holds all of a prompt in its own cache, and keeps nothing of it
    cache = 2 * 2 * 128 * SMALL.num_layers * SMALL.num_kv_heads * TOKENS
    assert look.memory_analysis().temp_size_in_bytes >= cache
    assert look.memory_analysis().output_size_in_bytes < 4096
