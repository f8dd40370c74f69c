# SPDX-License-Identifier: Apache-2.0
"""The training step with a CP head, compiled whole for hardware that is not here."""

import os

import jax
import pytest

from lm import aot, setup, sharding, train
from lm.config import DataConfig, LoraConfig, MeshConfig, ModelConfig, TrainConfig
from lm.cp_heads import compiling
from lm.cp_heads.config import CpConfig
from lm.cp_heads.head import HeadConfig
from lm.cp_heads.losses import LossConfig
from ops import dispatch
from tests import gpu_target

# read when the TPU compiler is loaded
os.environ.update(
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_WORKER_ID="0",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
)
ROWS, LENGTH = 4, 256


def config_of(mode, vocab=0, **options):
    model = ModelConfig(
        vocab_size=512, num_layers=2, embed_dim=128, num_heads=2, num_kv_heads=2, head_dim=64,
        mlp_dim=128, dtype="bfloat16", lora=LoraConfig(rank=4 if mode == "lora" else 0),
    )  # fmt: skip
    return CpConfig(
        model=model,
        data=DataConfig(seq_len=LENGTH),
        train=TrainConfig(batch_size=ROWS, steps=1),
        mesh=MeshConfig(data=2, fsdp=1, tensor=2),
        head=HeadConfig(2, 2, "linear", expander_rank=8, draft_vocab=vocab),
        loss=LossConfig(mode=mode, **options),
    )


def problem(config, mesh):
    resolved = setup.Setup(config, config, None, None, valid_vocab=500)
    return compiling.problem(resolved, mesh)


def test_a_tpu_topology():
    config = config_of("joint", vocab=256, fraction=0.25)
    mesh = sharding.make(config.mesh, config.model, aot.devices_of("v5e:2x2"))
    made = problem(config, mesh)
    with dispatch.target_platform("tpu"):
        lowered = aot.lower(config, made.objective, made.trained, made.frozen, made.batch, mesh)
    memory = lowered.compile().memory_analysis()
    assert 0 < memory.temp_size_in_bytes < 2**30


@pytest.mark.skipif(bool(gpu_target.missing()), reason="compile-only packages are missing")
def test_an_h100():
    config = config_of("lora", lora_layers=1)
    made = problem(config, None)
    optimizer = train.make_optimizer(config.optimizer, 1)
    step = train.make_step(made.objective, optimizer, config.train, config.model.dtype)
    state = jax.eval_shape(lambda p: train.init_state(p, optimizer, 0, None), made.trained)
    arguments = jax.tree.map(
        lambda x: gpu_target.abstract("H100", x.shape, x.dtype), (state, made.frozen, made.batch)
    )
    with gpu_target.target("H100"):
        program = gpu_target.compile(jax.jit(step, donate_argnums=0), *arguments)
    assert program.kernels  # attention is a kernel of ours
    assert 0 < program.memory.temp_size_in_bytes < 2**30
