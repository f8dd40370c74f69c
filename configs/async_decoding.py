# SPDX-License-Identifier: Apache-2.0
"""Async decoding: a model promises parts of its answer and writes them at once (arXiv 2502.11517).

    python -m experiments.async_decoding.train --config=configs/async_decoding.py:PRESET \
        --workdir=DIR [--config.stage=sft] [--config.threads.form=plain]
    python -m experiments.async_decoding.train --config=configs/async_decoding.py:PRESET \
        --workdir=DIR2 --config.stage=preference --config.init_from=DIR

smoke  0.1 M, short requests, a trained BPE; seconds on 2 CPU cores: tests, first contact, verify
demo   0.1 M, requests of three parts of one step; 2 CPU cores
colab  20 M, requests of four to eight parts; one small GPU or TPU, meant for under 30 minutes
       (not measured)
study  for `study`, a dozen trainings on one large GPU: colab's size in Gemma's shape, longer parts,
       annotators that differ
paper  Gemma 7B's shape and the published SFT: batches of 8, learning rate 1e-5 linear to 0, 4
       epochs. Give it `init_from`, and annotated answers as data.source: neither is here
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
    config.stage = "sft"
    config.threads = threads = ConfigDict()
    threads.form = "async"
    threads.positions = "predicted"
    threads.recount = True

    config.requests = requests = ConfigDict()
    requests.kinds = ("sums", "facts", "plan", "linked", "chain")
    requests.min_parts = 3
    requests.max_parts = 3
    requests.min_steps = 1
    requests.max_steps = 2
    requests.fields = 3
    requests.max_number = 9
    requests.max_operand = 9

    config.preference = preference = ConfigDict()
    preference.quality_weight = 2.0
    preference.rounds = 2
    preference.prompts = 8
    preference.samples = 10
    preference.speed = "critical_path"
    preference.alpha = 0.9
    preference.beta = 1.0
    preference.learning_rate = 3e-4
    preference.prompts_at_once = 8
    preference.scorer = "requests"
    preference.baseline = ""

    config.model = shapes.model(num_layers=2, embed_dim=64, head_dim=16, mlp_dim=192, qk_norm=True)
    for key in ("min_turns", "max_turns", "max_number", "max_operand"):  # of arithmetic alone
        del config.data[key]
    config.data.source = "requests"
    config.data.tokenizer = "bpe:600"
    config.data.limit = 500
    config.train.weighting = "per_token"
    config.train.steps = 20
    return config


def demo() -> ConfigDict:
    """Requests that 0.1 M parameters learn in half a million tokens: three parts of one step of 1
    each. Five parts, or steps of up to 9, take minutes longer. Parts are short beside their
    promises, so that threads save little here."""
    config = smoke()
    config.requests.max_steps = 1
    config.requests.fields = 2
    config.requests.max_operand = 1
    config.data.limit = 4000
    config.data.seq_len = 256
    config.data.eval_conversations = 64
    config.train.batch_size = 4
    config.train.steps = 500
    config.train.checkpoint_every = 250
    config.train.log_every = 20
    config.optimizer.learning_rate = 1e-2
    config.optimizer.warmup_steps = 20
    config.sampling.max_new_tokens = 200
    config.preference.prompts = 64
    config.preference.samples = 8
    return config


def colab() -> ConfigDict:
    """One small accelerator: the embedded requests in full."""
    config = smoke()
    config.model = shapes.model(
        num_layers=8,
        embed_dim=384,
        num_heads=6,
        num_kv_heads=6,
        head_dim=64,
        mlp_dim=1024,
        qk_norm=True,
        dtype="bfloat16",
    )
    config.requests.update(
        min_parts=4, max_parts=8, min_steps=5, max_steps=7, fields=8, max_number=20
    )
    config.data.tokenizer = "bpe:1000"
    config.data.limit = 20000
    config.data.seq_len = 1024
    config.data.window = 256
    config.data.eval_conversations = 256
    config.train.batch_size = 32
    config.train.steps = 4000
    config.train.remat = "dots"
    config.train.checkpoint_every = 500
    config.train.log_every = 20
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 100
    config.sampling.max_new_tokens = 600
    config.preference.prompts = 512
    config.preference.learning_rate = 3e-5
    return config


def study() -> ConfigDict:
    """One large GPU: every model of the recipe, so each is trained briefly."""
    config = colab()
    # as Gemma: with embeddings scaled to 1, words are looked up far sooner, see docs/results
    config.model.update(qk_norm=False, norm_plus_one=True, scale_embeddings=True)
    config.model.activation = "gelu_tanh"
    # numbers of up to 20: with one digit, too many guesses are right
    config.requests.update(min_parts=5, max_parts=8, min_steps=6, max_steps=8, max_operand=5)
    # half of the annotators promise less than they could, one in ten too much: preferring has
    # something to learn
    config.requests.annotators = ("half",) * 5 + ("best",) * 4 + ("all",)
    del config.requests.fields  # as by default; a config has fewer than 80 keys
    config.data.limit = 12000
    config.data.eval_conversations = 512
    config.data.seq_len = 2048  # two or three examples, for fuller rows
    config.preference.prompts = 1024
    config.preference.prompts_at_once = 64
    config.train.batch_size = 16
    # what a base has learnt about writing in a row has to be unlearnt: after 400 steps parts are
    # still not found without the one before
    config.train.steps = 1600  # the base takes twice as many
    config.train.epochs = 4  # of a round's pairs: 256 steps at most
    config.train.log_every = 50
    config.optimizer.learning_rate = 2e-3
    config.preference.learning_rate = 1e-4
    config.sampling.max_new_tokens = 720
    return config


def paper() -> ConfigDict:
    """A 7B model on annotated answers. It needs a pod or 4 GPUs of 80 GB; nothing here was run."""
    config = smoke()
    config.model = shapes.model(
        vocab_size=0,
        num_layers=28,
        embed_dim=3072,
        num_heads=16,
        num_kv_heads=16,
        head_dim=256,
        mlp_dim=24576,
        activation="gelu_tanh",
        norm_plus_one=True,
        scale_embeddings=True,
        dtype="bfloat16",
    )
    config.data.tokenizer = "auto"
    config.data.limit = 0
    config.data.seq_len = 2048
    config.data.window = 256
    config.train.batch_size = 8
    config.train.steps = 0
    config.train.epochs = 4
    config.train.remat = "full"
    config.train.checkpoint_every = 500
    config.optimizer.learning_rate = 1e-5
    config.optimizer.schedule = "linear"
    config.optimizer.final_fraction = 0.0
    config.optimizer.weight_decay = 0.0
    config.sampling.max_new_tokens = 1024
    config.preference.prompts = 10000
    config.preference.learning_rate = 1e-6
    return config


PRESETS = {"smoke": smoke, "demo": demo, "colab": colab, "study": study, "paper": paper}
