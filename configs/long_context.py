# SPDX-License-Identifier: Apache-2.0
"""Small models trained on long-context tasks, as the presets of each paper that needs one.

smoke      bytes, 256 tokens; seconds on a CPU
demo       learns to retrieve from 256 tokens in half a minute on 2 CPU cores
retrieval  one H100, 10 minutes, contexts of up to 4,096 tokens
colab      one small GPU or TPU, contexts of up to 1,024 tokens
"""

from ml_collections import ConfigDict

from configs import common, shapes


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
    tasks.questions = 4
    tasks.text_weight = 0.05
    tasks.haystack = ""
    tasks.eval_lengths = (512,)
    tasks.eval_samples = 4
    config.train.batch_size = 2
    config.train.steps = 10
    return config


def demo() -> ConfigDict:
    config = smoke()
    config.model = shapes.model(
        num_layers=2,
        embed_dim=128,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        mlp_dim=256,
        qk_norm=True,
    )
    config.data.tokenizer = "bpe:1200"
    config.data.seq_len = 512
    config.data.window = 16
    config.tasks.names = ("niah_single_1", "niah_multikey_2", "passkey")
    config.tasks.min_length = 80
    config.tasks.max_length = 256
    config.tasks.growth = 1000
    config.tasks.questions = 8
    config.tasks.eval_lengths = (256,)
    config.tasks.eval_samples = 50
    config.train.batch_size = 4
    config.train.steps = 300
    config.train.checkpoint_every = 300
    config.train.log_every = 20
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 30
    return config


PRESETS = {"smoke": smoke, "demo": demo}


def get_config(preset: str = "smoke") -> ConfigDict:
    return PRESETS[preset]()
