# SPDX-License-Identifier: Apache-2.0
"""Single-pass training of multi-turn reasoning conversations (arXiv 2504.18246).

    python -m experiments.single_pass.train --config=configs/single_pass.py:PRESET --workdir=DIR

smoke     0.9 M, bytes; seconds on 2 CPU cores: tests, first contact, verify
demo      learns the embedded arithmetic in a minute or two on 2 CPU cores: `make demo`
colab     20 M, bytes; one small GPU or TPU, meant for under 30 minutes (not measured)
llama_1b  Llama-3.2-1B shape at seq_len 19,456; one 80 GB GPU: the speed benchmark
paper     Llama-3.1-8B shape; v5p:4x4x4 or v6e:8x8 (64 chips). The paper reports 1.54x over N-pass
          at 8B; expected here is `plan`'s predicted_speedup on the data at hand
lora      adapters on the checkpoint in init_from; one 80 GB GPU (not measured)
"""

from ml_collections import ConfigDict

from configs import common, shapes


def get_config(preset: str = "smoke") -> ConfigDict:
    """The config of a preset; an unknown name lists the known ones."""
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
    return PRESETS[preset]()


def smoke() -> ConfigDict:
    """Seconds on a CPU."""
    config = common.smoke()
    data = config.data
    data.policy = "interleaved"
    data.think_open = "<think>"
    data.think_close = "</think>"
    data.mode = "tree"
    data.overlong = "drop"
    data.tools = False
    config.train.weighting = "per_token"
    config.train.verify_every = 0
    return config


def demo() -> ConfigDict:
    """Learns single-digit arithmetic over three to six turns; `compare` trains one epoch of it."""
    config = smoke()
    config.model = shapes.model(num_layers=2, embed_dim=64, head_dim=16, mlp_dim=192, qk_norm=True)
    config.data.tokenizer = "bpe:400"
    config.data.seq_len = 384
    config.data.limit = 2200
    config.data.min_turns = 3
    config.data.max_turns = 6
    config.data.max_number = 9
    config.data.eval_conversations = 48
    config.train.steps = 250
    config.train.batch_size = 4
    config.train.checkpoint_every = 100
    config.train.log_every = 10
    config.optimizer.learning_rate = 1e-2
    config.optimizer.warmup_steps = 30
    return config


def colab() -> ConfigDict:
    """One small accelerator."""
    config = smoke()
    config.model = shapes.model(
        num_layers=8,
        embed_dim=384,
        num_heads=6,
        num_kv_heads=6,
        head_dim=64,
        mlp_dim=1024,
        dtype="bfloat16",
    )
    config.data.seq_len = 4096
    config.data.window = 256
    config.data.eval_conversations = 256
    config.train.log_every = 20
    config.train.batch_size = 16
    config.train.steps = 2000
    config.train.remat = "dots"
    config.train.checkpoint_every = 500
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 100
    return config


def llama_1b() -> ConfigDict:
    """The shape and length of the speed claim."""
    config = smoke()
    config.model = shapes.llama_3_2_1b()
    config.data.seq_len = 19456
    config.data.window = 256
    config.train.batch_size = 1
    config.train.remat = "full"
    config.optimizer.learning_rate = 1e-5
    return config


def paper() -> ConfigDict:
    """8B on 64 chips: one row of 16,384 tokens a chip."""
    config = llama_1b()
    config.model = shapes.llama_3_1_8b()
    config.data.seq_len = 16384
    config.train.batch_size = 64
    config.train.steps = 2000
    config.train.checkpoint_every = 200
    config.train.keep_checkpoints = 2
    config.optimizer.warmup_steps = 60
    config.optimizer.weight_decay = 0.0
    return config


def lora() -> ConfigDict:
    """Adapters on the checkpoint in `init_from`, whose shape replaces `model`."""
    config = llama_1b()
    config.model.lora.rank = 16
    config.data.seq_len = 8192
    config.optimizer.learning_rate = 2e-4
    config.train.steps = 500
    return config


PRESETS = {
    "smoke": smoke,
    "demo": demo,
    "colab": colab,
    "llama_1b": llama_1b,
    "paper": paper,
    "lora": lora,
}
