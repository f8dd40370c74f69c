# SPDX-License-Identifier: Apache-2.0
"""Token select: attention that reads the cached tokens that a step needs (arXiv 2411.02886).

    python -m experiments.token_select.verify --config=configs/token_select.py:PRESET
    python -m experiments.token_select.generate --config=... --hf_dir=DIR --prompt="..."

smoke        bytes, a random model, contexts of 512; seconds on a CPU
demo         a model that learns to retrieve from 256 tokens on 2 CPU cores
colab        one small GPU or TPU, contexts of up to 1,024 tokens
retrieval    one H100, contexts of up to 2,048 tokens: accuracy against what is read
paper        Qwen2-7B with 128 + 2048 + 512 tokens (--hf_dir); expect 25.1 -> 49.1 on InfiniteBench
paper_llama  Llama-3-8B, the same; expect 8.0 -> 52.5 or so on seven of its tasks

The model and the tasks are those of configs/long_context.py; `select` is what this paper adds.
"""

from ml_collections import ConfigDict

from configs import long_context, shapes


def get_config(preset: str = "smoke") -> ConfigDict:
    """The config of a preset; an unknown name lists the known ones."""
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
    return PRESETS[preset]()


def _select(n_init: int, k: int, n_local: int) -> ConfigDict:
    """The paper's method at a size; a chunk is as long as the window."""
    select = ConfigDict()
    select.n_init = n_init
    select.k = k
    select.n_local = n_local
    select.chunk = n_local
    select.prefill = "select"
    select.vote = "soft"
    select.head_weights = ()
    select.scale_scores = False
    select.gqa = "grouped"
    select.pool = 0
    select.per_kv_head = False
    select.positions = "packed"
    select.rope = "read"
    select.shadow = ""
    select.rescore = 1.25
    select.reuse = 0.0
    select.reuse_prefill = False
    select.coverage = 0.0
    select.shortcut = True
    select.guard_every = 0
    select.guard = "report"
    return select


def smoke() -> ConfigDict:
    """Seconds on a CPU."""
    return long_context.of_method(long_context.smoke(), select=_select(8, 64, 32))


def demo() -> ConfigDict:
    """Five percent of the context beside its ends. A model this small finds tokens by their
    rotation as much as by what they say: it loses them where keys count as position 0."""
    select = _select(4, 13, 32)
    select.prefill = "dense"
    select.positions = "true"
    select.rope = "write"
    return long_context.of_method(long_context.demo(), select=select)


def colab() -> ConfigDict:
    """One small accelerator."""
    return long_context.of_method(long_context.colab(), select=_select(8, 52, 64))


def retrieval() -> ConfigDict:
    """One H100."""
    return long_context.of_method(long_context.retrieval(), select=_select(16, 102, 64))


def paper() -> ConfigDict:
    """Table 1's first model; the published scripts also pool, by 5 to 128, not in its text."""
    config = long_context.of_method(long_context.smoke(), select=_select(128, 2048, 512))
    config.model = shapes.model(
        vocab_size=152064,
        num_layers=28,
        embed_dim=3584,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        mlp_dim=18944,
        rope_theta=1000000.0,
        qkv_bias=True,
        tied_embeddings=False,
        dtype="bfloat16",
    )
    config.tasks.eval_lengths = (4096, 16384, 65536, 131072)
    config.tasks.eval_samples = 100
    return config


def paper_llama() -> ConfigDict:
    """Llama 3 as it was pre-trained on 8,192 tokens: what lies beyond is extrapolated to."""
    config = paper()
    config.model = shapes.model(
        vocab_size=128256,
        num_layers=32,
        embed_dim=4096,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        mlp_dim=14336,
        rope_theta=500000.0,
        norm_eps=1e-5,
        tied_embeddings=False,
        dtype="bfloat16",
    )
    return config


PRESETS = {
    "smoke": smoke,
    "demo": demo,
    "colab": colab,
    "retrieval": retrieval,
    "paper": paper,
    "paper_llama": paper_llama,
}
