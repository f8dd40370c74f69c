# SPDX-License-Identifier: Apache-2.0
"""Draft inference: a small model says what a large one may forget (arXiv 2506.08373).

    python -m experiments.draft_inference.verify --config=configs/draft_inference.py:PRESET

smoke        bytes, random models, contexts of 512; seconds on a CPU
demo         a target that learns to find digits in 256 tokens on 2 CPU cores, and its draft
colab        one small GPU or TPU, contexts of up to 1,024 tokens, 3 seeds
retrieval    one H100, contexts of up to 2,048 tokens, 3 seeds: accuracy against what is kept
paper        Llama-3.2-1B drafts for Llama-3.1-8B (--hf_dir, --config.draft.path)
paper_qwen   Qwen2.5-0.5B drafts for Qwen2.5-14B; LongBench at 256 tokens: SnapKV 43.0, SpecKV
             46.1, SpecKV-PC 46.5, dense 47.8 (a 32B target, as noted)
smoke_draft, demo_draft, colab_draft, retrieval_draft, paper_draft, paper_qwen_draft
             the draft of each: a run, or shapes, of its own

The tasks are those of configs/long_context.py; `draft` is what this paper adds.
"""

from ml_collections import ConfigDict, config_dict

from configs import long_context, shapes


def get_config(preset: str = "smoke") -> ConfigDict:
    """The config of a preset; an unknown name lists the known ones."""
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
    return PRESETS[preset]()


def _draft(budget: int, window: int, prompt_budget: int, prompt_window: int, near: int):
    """The paper's methods at a size; `near`: neighbours that share votes and are kept."""
    draft = ConfigDict()
    draft.path = ""
    draft.layers = 0
    draft.budget = budget
    draft.lookahead = config_dict.placeholder(int)
    draft.window = window
    draft.kernel = 7
    draft.reduce = "max"
    draft.pool = "max"
    draft.band = 2048
    draft.columns = 2048
    draft.floor = 0.2
    draft.coverage = 0.0
    draft.least = 64
    draft.prompt = prompt = ConfigDict()
    prompt.budget = prompt_budget
    prompt.window = prompt_window
    prompt.kernel = near
    prompt.neighbors = near
    prompt.lookahead = 1
    prompt.first_layer = config_dict.placeholder(int)
    prompt.weighted = True
    prompt.reduce = "max"
    prompt.positions = "packed"
    return draft


def smoke() -> ConfigDict:
    """Seconds on a CPU."""
    draft = _draft(budget=64, window=16, prompt_budget=256, prompt_window=16, near=8)
    draft.band = 128
    draft.columns = 128
    draft.least = 32
    return long_context.of_method(long_context.smoke(), draft=draft)


def smoke_draft() -> ConfigDict:
    """Half as wide."""
    config = smoke()
    config.model.embed_dim = 32
    config.model.mlp_dim = 64
    return config


def demo() -> ConfigDict:
    """Some tenth of a context of 256 tokens."""
    draft = _draft(budget=26, window=8, prompt_budget=96, prompt_window=16, near=8)
    draft.band = 128
    draft.columns = 128
    draft.least = 13
    draft.prompt.chunk = 8  # SpecPrefill's own 32 do not fit a tenth of the context
    config = long_context.of_method(long_context.demo(), draft=draft)
    config.train.steps = 240  # two models are trained
    config.train.checkpoint_every = 240
    return config


def demo_draft() -> ConfigDict:
    """0.05 M parameters beside the target's 0.12 M."""
    config = demo()
    config.model.embed_dim = 48
    config.model.num_kv_heads = 2
    config.model.mlp_dim = 64
    return config


def colab() -> ConfigDict:
    """6 M parameters; 64 tokens are 6 % of 1,024."""
    draft = _draft(budget=64, window=16, prompt_budget=256, prompt_window=32, near=16)
    draft.band = 512
    draft.columns = 512
    draft.least = 32
    draft.seeds = (0, 1, 2)
    return long_context.of_method(long_context.colab(), draft=draft)


def colab_draft() -> ConfigDict:
    """A fifth of it."""
    config = colab()
    config.model.num_layers = 4
    config.model.embed_dim = 128
    config.model.num_heads = 2
    config.model.num_kv_heads = 2
    config.model.mlp_dim = 384
    return config


def retrieval() -> ConfigDict:
    """27 M parameters; 192 tokens are 9 % of 2,048. Each trained pair (`study --pairs`) is
    evaluated with three seeds of samples."""
    draft = _draft(budget=192, window=32, prompt_budget=512, prompt_window=32, near=16)
    draft.seeds = (0, 1, 2)
    return long_context.of_method(long_context.retrieval(), draft=draft)


def retrieval_draft() -> ConfigDict:
    """4 M parameters."""
    config = retrieval()
    config.model.num_layers = 4
    config.model.embed_dim = 256
    config.model.num_heads = 4
    config.model.num_kv_heads = 2
    config.model.mlp_dim = 768
    return config


def paper() -> ConfigDict:
    """The Llama pair."""
    config = long_context.of_method(long_context.smoke(), draft=_draft(256, 32, 2048, 64, 32))
    config.model = _short(shapes.llama_3_1_8b())
    config.tasks.eval_lengths = (4096, 8192, 16384, 32768, 65536)
    config.tasks.eval_samples = 500
    return config


def paper_draft() -> ConfigDict:
    """Llama-3.2-1B."""
    config = paper()
    config.model = _short(shapes.llama_3_2_1b())
    return config


def _short(model: ConfigDict) -> ConfigDict:
    """Without what the defaults of `RopeScaling` say."""
    for name in ("low_freq_factor", "high_freq_factor", "original_max_positions"):
        del model.rope_scaling[name]
    return model


def paper_qwen() -> ConfigDict:
    """The Qwen pair: more neighbours."""
    config = long_context.of_method(long_context.smoke(), draft=_draft(256, 32, 2048, 64, 64))
    config.model = _qwen(48, 5120, 40, 8, 128, 13824, 152064)
    config.tasks.eval_lengths = (4096, 8192, 16384, 32768)
    config.tasks.eval_samples = 500
    return config


def paper_qwen_draft() -> ConfigDict:
    """Qwen2.5-0.5B."""
    config = paper_qwen()
    config.model = _qwen(24, 896, 14, 2, 64, 4864, 151936, tied_embeddings=True)
    return config


def _qwen(layers, embed, heads, kv_heads, head_dim, mlp, vocabulary, tied_embeddings=False):
    return shapes.model(
        vocab_size=vocabulary,
        num_layers=layers,
        embed_dim=embed,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_dim=mlp,
        rope_theta=1000000.0,
        qkv_bias=True,
        tied_embeddings=tied_embeddings,
        dtype="bfloat16",
    )


PRESETS = {
    "smoke": smoke,
    "smoke_draft": smoke_draft,
    "demo": demo,
    "demo_draft": demo_draft,
    "colab": colab,
    "colab_draft": colab_draft,
    "retrieval": retrieval,
    "retrieval_draft": retrieval_draft,
    "paper": paper,
    "paper_draft": paper_draft,
    "paper_qwen": paper_qwen,
    "paper_qwen_draft": paper_qwen_draft,
}
