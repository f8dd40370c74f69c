# SPDX-License-Identifier: Apache-2.0
"""CP heads: drafting several tokens at once from a rank-r joint (arXiv 2410.17765).

    python -m experiments.cp_heads.train --config=configs/cp_heads.py:PRESET --workdir=DIR

smoke        0.9 M, bytes of the standard library; seconds on 2 CPU cores: tests, first contact
demo         the embedded arithmetic, a trained BPE; a minute on 2 CPU cores: `make demo`
colab        20 M, a trained BPE; one small GPU or TPU, meant for under 30 minutes (not measured)
python_100m  100 M, a trained BPE, installed packages included; one H100, meant for half an hour:
             `experiments.cp_heads.study` compares ranks and transitions on one target
paper        the published setting as far as it is known: 56 M, n = 4, rank 4, `full` expanders, on
             a corpus of your own (data.source); the paper's data are not here
"""

from ml_collections import ConfigDict

from configs import common, shapes


def get_config(preset: str = "smoke") -> ConfigDict:
    """The config of a preset; an unknown name lists the known ones."""
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
    return PRESETS[preset]()


def smoke() -> ConfigDict:
    """Seconds on a CPU, its study a minute."""
    study = ConfigDict()
    study.ranks = (1, 2)
    study.lengths = (3,)
    study.hmm = "linear"
    study.head_steps = 30
    study.head_batch = 4
    study.draft_layers = 1
    study.draft_dim = 32
    study.draft_steps = 20
    study.prompt_tokens = 32
    study.new_tokens = 24
    study.repeats = 2
    study.batches = ()
    study.check_tokens = 500
    return _studied(_base(), study)


def _studied(config: ConfigDict, study: ConfigDict) -> ConfigDict:
    """With a comparison of heads, and without what files of source code have no use for."""
    config.study = study
    for name in ("on_error", "min_turns", "max_turns", "max_number", "max_operand"):
        del config.data[name]
    for name in ("b1", "b2", "eps"):
        del config.optimizer[name]
    return config


def _base() -> ConfigDict:
    """What the presets share."""
    config = common.smoke()
    config.head = head = ConfigDict()
    head.rank = 4
    head.predicted = 4
    head.transition = "identity"
    head.expander = "low_rank"
    head.expander_rank = 16
    head.noise = 0.1
    head.draft_vocab = 0

    config.loss = loss = ConfigDict()
    loss.mode = "joint"
    loss.lora_layers = 0
    loss.next_token = 1.0
    loss.head = 0.3
    loss.discount = 1.0
    loss.balance = 0.01
    loss.distill = 0.0
    loss.fraction = 1.0

    config.data.source = "python"
    config.data.seq_len = 128
    return config


def demo() -> ConfigDict:
    """The embedded arithmetic: regular enough for a model of a minute to draft well."""
    config = _base()
    config.model = shapes.model(num_layers=2, embed_dim=64, head_dim=16, mlp_dim=192, qk_norm=True)
    config.data.source = "arithmetic"
    config.data.tokenizer = "bpe:400"
    config.data.seq_len = 192
    config.data.limit = 1000
    config.data.max_number = 9
    config.train.batch_size = 4
    config.train.steps = 120
    config.train.checkpoint_every = 120
    config.train.log_every = 10
    config.optimizer.learning_rate = 1e-2
    config.optimizer.warmup_steps = 20
    return config


def colab() -> ConfigDict:
    """One small accelerator."""
    config = _base()
    config.model = shapes.model(
        num_layers=8,
        embed_dim=384,
        num_heads=6,
        num_kv_heads=6,
        head_dim=64,
        mlp_dim=1024,
        dtype="bfloat16",
    )
    config.head.expander_rank = 64
    config.data.source = "python+site"
    config.data.tokenizer = "bpe:8000"
    config.data.seq_len = 1024
    config.data.window = 256
    config.data.eval_conversations = 64
    config.train.batch_size = 32
    config.train.steps = 3000
    config.train.remat = "dots"
    config.train.checkpoint_every = 500
    config.train.log_every = 20
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 100
    return config


def python_100m() -> ConfigDict:
    """The target of the comparison of ranks: train it with loss.mode=trunk, then heads on it."""
    config = colab()
    config.model = shapes.model(
        num_layers=12,
        embed_dim=768,
        num_heads=12,
        num_kv_heads=6,
        head_dim=64,
        mlp_dim=2304,
        qk_norm=True,
        dtype="bfloat16",
    )
    config.data.tokenizer = "bpe:16000"
    config.data.eval_conversations = 256
    config.train.batch_size = 64
    config.train.steps = 2000
    config.train.keep_checkpoints = 1
    config.sampling.max_new_tokens = 192
    config.loss.fraction = 0.25
    study = ConfigDict()
    study.ranks = (1, 2, 4, 8)
    study.lengths = (4, 8)
    study.hmm = "linear"
    study.head_steps = 1200
    study.head_batch = 16
    study.draft_layers = 2
    study.draft_dim = 256
    study.draft_steps = 1000
    study.prompt_tokens = 64
    study.new_tokens = 256
    study.repeats = 5
    study.batches = (8, 32)
    study.check_tokens = 100_000
    return _studied(config, study)


def paper() -> ConfigDict:
    """One 80 GB GPU. Expect joint loss to fall with the rank and first-token loss not to move."""
    config = colab()
    config.model = shapes.model(
        num_layers=8,
        embed_dim=512,
        num_heads=8,
        num_kv_heads=8,
        head_dim=64,
        mlp_dim=1536,
        tied_embeddings=False,
        dtype="bfloat16",
    )
    config.head.expander = "full"
    config.data.tokenizer = "bpe:32000"
    config.data.seq_len = 1024
    config.train.batch_size = 128
    config.train.steps = 10000
    return config


PRESETS = {
    "smoke": smoke,
    "demo": demo,
    "colab": colab,
    "python_100m": python_100m,
    "paper": paper,
}
