# SPDX-License-Identifier: Apache-2.0
"""The keys that every experiment has, at values for a smoke run on a CPU."""

from ml_collections import ConfigDict

from configs import shapes


def smoke() -> ConfigDict:
    """Seconds on a CPU; an experiment sets `data.source` and adds keys of its own."""
    config = ConfigDict()
    config.model = shapes.model()
    config.init_from = ""
    config.data = _data()
    config.train = _train()
    config.optimizer = _optimizer()
    config.mesh = ConfigDict({"data": 1, "fsdp": -1, "tensor": 1})
    config.sampling = ConfigDict(
        {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 64}
    )
    return config


def _data() -> ConfigDict:
    data = ConfigDict()
    data.source = "arithmetic"
    data.tokenizer = "auto"
    data.template = ""
    data.on_error = "stop"
    data.seq_len = 512
    data.window = 64
    data.limit = 0
    data.seed = 0
    data.min_turns = 2
    data.max_turns = 4
    data.max_number = 20
    data.max_operand = 9
    data.validation_fraction = 0.1
    data.eval_conversations = 16
    return data


def _train() -> ConfigDict:
    train = ConfigDict()
    train.batch_size = 4
    train.accumulate = 1
    train.steps = 30
    train.epochs = 1
    train.remat = "none"
    train.implementation = ""
    train.checkpoint_every = 10
    train.keep_checkpoints = 2
    train.log_every = 5
    train.seed = 0
    return train


def _optimizer() -> ConfigDict:
    optimizer = ConfigDict()
    optimizer.learning_rate = 3e-3
    optimizer.schedule = "cosine"
    optimizer.warmup_steps = 10
    optimizer.final_fraction = 0.1
    optimizer.b1 = 0.9
    optimizer.b2 = 0.95
    optimizer.eps = 1e-8
    optimizer.weight_decay = 0.01
    optimizer.clip_norm = 1.0
    return optimizer
