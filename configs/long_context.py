# SPDX-License-Identifier: Apache-2.0
"""Small models trained on long-context tasks, as the presets of each paper that needs one.

smoke      bytes, 512 tokens; seconds on a CPU
demo       learns to find and copy digits in 256 tokens, in half a minute on 2 CPU cores
retrieval  one H100, 10 minutes, contexts of up to 2,048 tokens
colab      one small GPU or TPU, contexts of up to 1,024 tokens
"""

from ml_collections import ConfigDict

from configs import common, shapes

_UNUSED = {
    "data": (
        "on_error",
        "limit",
        "min_turns",
        "max_turns",
        "max_number",
        "max_operand",
        "validation_fraction",
        "eval_conversations",
    ),
    "train": ("epochs", "keep_checkpoints"),
    "optimizer": ("b1", "b2", "eps", "final_fraction"),
}


def of_method(config: ConfigDict, **sections: ConfigDict) -> ConfigDict:
    """A preset with a method's own sections, without what tasks that are made on the fly have no
    use for."""
    for section, names in _UNUSED.items():
        for name in names:
            del config[section][name]
    config.update(sections)
    return config


def smoke() -> ConfigDict:
    """Seconds on a CPU: every part runs, nothing is learnt."""
    config = common.smoke()
    config.model = shapes.model(num_layers=2, embed_dim=64, head_dim=16, mlp_dim=128, qk_norm=True)
    config.data.source = "tasks"
    config.data.seq_len = 512
    config.data.window = 8
    config.tasks = tasks = ConfigDict()
    tasks.names = ("niah_single_1", "passkey")
    tasks.min_length = 320
    tasks.max_length = 512
    tasks.growth = 0
    tasks.pace = "documents"
    tasks.questions = 4
    tasks.text_weight = 0.05
    tasks.haystack = ""
    tasks.eval_lengths = (512,)
    tasks.eval_samples = 4
    config.train.batch_size = 2
    config.train.steps = 10
    return config


def demo() -> ConfigDict:
    """0.12 M parameters that find and copy digits, to which a fixed phrase leads. Needles with keys
    of their own take a model of this size several times as long."""
    config = smoke()
    config.model = shapes.model(
        num_layers=2, embed_dim=64, num_kv_heads=4, head_dim=16, mlp_dim=128, qk_norm=True
    )
    config.data.tokenizer = "bpe:512"  # the tasks' own words; digits are tokens
    config.data.window = 16
    config.tasks.names = ("passkey", "number_string")
    config.tasks.min_length = 80
    config.tasks.max_length = 256
    config.tasks.growth = 1000
    config.tasks.questions = 1
    config.tasks.text_weight = 0.0
    config.tasks.eval_lengths = (256,)
    config.tasks.eval_samples = 50
    config.train.batch_size = 4
    config.train.steps = 350
    config.train.checkpoint_every = 350
    config.train.log_every = 25
    config.optimizer.learning_rate = 1e-2
    config.optimizer.warmup_steps = 30
    return config


def colab() -> ConfigDict:
    """6 M parameters. A step is 16 rows of 2,048 tokens, 1.2 TFLOP; 2,000 of them 2.4 PFLOP."""
    config = smoke()
    config.model = shapes.model(
        num_layers=6,
        embed_dim=256,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        mlp_dim=768,
        qk_norm=True,
        dtype="bfloat16",
    )
    config.data.tokenizer = "bpe:4096"
    config.data.seq_len = 2048
    config.data.window = 64
    config.tasks.names = (
        "niah_single_1",
        "niah_multikey_2",
        "niah_multivalue",
        "niah_multiquery",
        "passkey",
        "number_string",
        "kv_retrieval",
    )
    config.tasks.min_length = 128
    config.tasks.max_length = 1024
    config.tasks.growth = 15000
    config.tasks.questions = 16
    config.tasks.text_weight = 0.05
    config.tasks.eval_lengths = (512, 1024, 2048)
    config.tasks.eval_samples = 50
    config.train.batch_size = 16
    config.train.steps = 2000
    config.train.remat = "dots"
    config.train.checkpoint_every = 500
    config.train.log_every = 20
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 100
    return config


def retrieval() -> ConfigDict:
    """27 M parameters. A step is 8 rows of 8,192 tokens at some 0.2 GFLOP a token, 13 TFLOP. Most
    documents are short for half of the way: a smaller model that had 96 to 192 tokens before it
    learnt to retrieve in 500 steps, and had not in 820 with up to 512."""
    config = colab()
    config.model = shapes.model(
        num_layers=8,
        embed_dim=512,
        num_heads=8,
        num_kv_heads=4,
        head_dim=64,
        mlp_dim=1536,
        qk_norm=True,
        dtype="bfloat16",
    )
    config.data.seq_len = 8192
    config.tasks.names = (*config.tasks.names, "niah_multikey_3", "vt")
    config.tasks.max_length = 2048
    config.tasks.growth = 550000
    config.tasks.pace = "doublings"
    config.tasks.eval_lengths = (1024, 2048, 4096)
    config.tasks.eval_samples = 100
    config.tasks.eval_tokens = 128
    config.train.batch_size = 8
    config.train.steps = 5000
    config.train.checkpoint_every = 1000
    config.optimizer.learning_rate = 1.5e-3
    config.optimizer.warmup_steps = 200
    return config


PRESETS = {"smoke": smoke, "demo": demo, "colab": colab, "retrieval": retrieval}


def get_config(preset: str = "smoke") -> ConfigDict:
    """The config of a preset; an unknown name lists the known ones."""
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
    return PRESETS[preset]()
