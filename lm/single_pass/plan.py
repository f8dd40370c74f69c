# SPDX-License-Identifier: Apache-2.0
"""What each mode would cost on given data and a given model, from counts alone: nothing is run.

FLOPs are those of the model, as `lm.flops` counts them.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from absl import logging

from lm.config import ModelConfig, require_choice
from lm.data import packing
from lm.data.layout import Layout
from lm.errors import DataError
from lm.flops import adapter_parameters, training_flops, trunk_parameters
from lm.single_pass import layouts
from lm.single_pass.samples import Sample

BASELINE = "n_pass"
DEFAULT_MODES = ("tree", "paper", "n_pass", "n_pass_merged")
_LOGIT_ROWS = 1024  # rows of logits that exist at a time in `linear_log_prob`
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def parameters(model: ModelConfig) -> int:
    """All parameters of the base model, up to norms and biases."""
    tables = 1 if model.tied_embeddings else 2
    return trunk_parameters(model) + tables * model.vocab_size * model.embed_dim


def training_memory(model: ModelConfig, tokens: int, remat: str = "none", shards: int = 1) -> int:
    """Estimated bytes per chip of a training step over `tokens` tokens per chip.

    With P base parameters, P' trained ones (P, or the adapters'), c bytes of the compute dtype:

        state        (4 P + 12 P') / shards: float32 parameters, gradients and two Adam moments
        cast copy    c P / shards, when c < 4
        residuals    c tokens D (L + 1): what the scan over layers keeps under any policy
        layer        c tokens (5 D + 2 N H + 2 K H + 3 F): inputs of all products, norms and gates
                     "none": of all layers; "full" and "dots": of the one being recomputed
        dots         c tokens (2 D + 2 N H + 2 K H + 2 F) L under "dots": outputs of the linear maps
                     and of attention
        edges        c tokens D for the gathered rows, 4 V times the rows of logits at a time

    Attention keeps no [T, S] array. Temporaries of the compiler and fragmentation are not counted.
    """
    require_choice("remat", remat, ("none", "full", "dots"))
    D, F, L = model.embed_dim, model.mlp_dim, model.num_layers
    heads, kv_heads = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    width = _DTYPE_BYTES[model.dtype]
    base, adapters = parameters(model), adapter_parameters(model)
    trained = adapters if model.lora.rank else base
    state = (4 * (base + adapters) + 12 * trained) / shards
    cast = width * (base + adapters) / shards if width < 4 else 0
    layer = 5 * D + 2 * heads + 2 * kv_heads + 3 * F
    dots = 2 * D + 2 * heads + 2 * kv_heads + 2 * F
    per_token = D * (L + 1) + D + layer * (L if remat == "none" else 1)
    if remat == "dots":
        per_token += dots * L
    logits = 4 * model.vocab_size * min(tokens, _LOGIT_ROWS)
    return int(state + cast + width * tokens * per_token + logits)


@dataclasses.dataclass
class _Costs:
    """Running totals of one mode."""

    mode: layouts.Mode
    seq_len: int
    window: int
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    tokens: int = 0  # whole conversations, before packing
    edges: int = 0
    pairs: int = 0
    longest: int = 0
    packed_pairs: int = 0  # after packing split or dropped what does not fit
    refused: str | None = None
    _waiting: list[Layout] = dataclasses.field(default_factory=list)

    def add(self, samples: Sequence[Sample], overlong: str) -> None:
        if self.refused is not None:
            return
        try:
            whole, report = layouts.layouts_of(samples, self.mode)
            longest = max(max(layout.length, layout.num_edges) for layout in whole)
            found = whole
            if longest > self.seq_len:  # packing must split it or lose some of it
                found, report = layouts.layouts_of(samples, self.mode, self.seq_len, overlong)
        except DataError as error:
            self.refused = str(error)
            logging.warning("plan: mode %s refuses the data: %s", self.mode, error)
            return
        self.tokens += sum(layout.length for layout in whole)
        self.edges += sum(layout.num_edges for layout in whole)
        self.pairs += sum(layout.pairs for layout in whole)
        self.longest = max(self.longest, longest)
        self._count(report.counts())
        self.packed_pairs += sum(layout.pairs for layout in found)
        self._waiting += found
        if len(self._waiting) >= self.window:
            self.flush()

    def flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        sizes = [max(layout.length, layout.num_edges) for layout in waiting]
        bins = packing.assign(sizes, self.seq_len)
        self._count(packing.fill(waiting, len(bins), self.seq_len))

    def _count(self, counts: dict[str, int]) -> None:
        for name, count in counts.items():
            self.counts[name] = self.counts.get(name, 0) + count

    def summary(self, model: ModelConfig, remat: str, shards: int, rows: int) -> dict[str, Any]:
        counts = self.counts
        numbers = [counts.get(name, 0) for name in ("tokens", "edges", "row_tokens")]
        packed_tokens, packed_edges, row_tokens = numbers
        return {
            "tokens": self.tokens,
            "edges": self.edges,
            "pairs": self.pairs,
            "flops": training_flops(model, self.tokens, self.edges, self.pairs),
            "padded_flops": training_flops(model, row_tokens, packed_edges, self.packed_pairs),
            "layouts": counts.get("layouts", 0),
            "longest": self.longest,
            "rows": counts.get("rows", 0),
            "row_tokens": row_tokens,
            "fill": packed_tokens / row_tokens if row_tokens else 0.0,
            "memory_bytes": training_memory(model, rows * self.seq_len, remat, shards),
            "memory_bytes_longest": training_memory(model, self.longest, remat, shards),
            **{name: counts.get(name, 0) for name in layouts.COUNTS},
        }


def plan(
    conversations: Iterable[Sequence[Sample]],
    model: ModelConfig,
    modes: Sequence[str] = DEFAULT_MODES,
    seq_len: int = 4096,
    window: int = 256,
    *,
    overlong: str = "drop",
    rows_per_chip: int = 1,
    shards: int = 1,
    remat: str = "none",
) -> dict[str, Any]:
    """The cost of each mode on the samples of each conversation, packed as training packs them.

    Args:
      conversations: per conversation its samples; read once, held a window of layouts at a time.
      modes: as `layouts.parse_mode` reads them. `n_pass`, the baseline, is always among them.
      seq_len, window, overlong: of packing, see `lm.data.packing` and `layouts.layouts_of`.
      rows_per_chip: rows of `seq_len` that a chip holds in one (micro)batch, for the memory.
      shards: over how many chips parameters and optimiser state are divided.
      remat: "none", "full" or "dots".

    Returns:
      `conversations`, `samples`, `seq_len`, `window`, `parameters`, and `modes`: per mode a dict,
      or None when it refuses the data (the reason is logged, and in `refused`). In it: `tokens`,
      `edges` (trained), `pairs` (visible) and `flops` of whole conversations, `padded_flops` of the
      rows that they pack into, `token_ratio`, `predicted_speedup` and `padded_speedup` against
      n_pass, `layouts`, `longest` (the least seq_len that needs no split), `rows`, `fill`,
      `memory_bytes` of a step and `memory_bytes_longest` of one over the longest layout alone, and
      what was dropped, truncated and split, as in `layouts.Report`.

    Raises:
      UserError: unknown mode, `overlong` or `remat`.
    """
    parsed = dict.fromkeys(str(layouts.parse_mode(mode)) for mode in (*modes, BASELINE))
    costs = {name: _Costs(layouts.parse_mode(name), seq_len, window) for name in parsed}
    count = samples_count = 0
    for samples in conversations:
        count += 1
        samples_count += len(samples)
        for cost in costs.values():
            cost.add(samples, overlong)
    results: dict[str, dict[str, Any] | None] = {}
    for name, cost in costs.items():
        cost.flush()
        summary = cost.summary(model, remat, shards, rows_per_chip)
        results[name] = summary if cost.refused is None else None
    for result in filter(None, results.values()):
        _compare(result, results[BASELINE])
    return {
        "conversations": count,
        "samples": samples_count,
        "seq_len": seq_len,
        "window": window,
        "parameters": parameters(model),
        "modes": results,
        "refused": {name: cost.refused for name, cost in costs.items() if cost.refused},
    }


def _compare(result: dict[str, Any], base: dict[str, Any]) -> None:
    """Adds how many times less than n_pass a mode needs; None when there is nothing to compare."""
    ratios = {
        "token_ratio": "tokens",
        "predicted_speedup": "flops",
        "padded_speedup": "padded_flops",
    }
    for ratio, name in ratios.items():
        result[ratio] = base[name] / result[name] if result[name] else None


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """`predicted_speedup`, n_pass FLOPs over tree FLOPs, and `packing`, the fill of each mode."""
    modes = result["modes"]
    tree = modes.get("tree")
    return {
        "predicted_speedup": tree["predicted_speedup"] if tree else None,
        "packing": {name: mode and mode["fill"] for name, mode in modes.items()},
    }


def lines(result: dict[str, Any]) -> list[str]:
    """The plan as a table for people."""
    head = f"{'mode':<14}{'tokens':>12}{'pairs':>14}{'FLOPs':>10}{'speed-up':>10}{'fill':>7}"
    head += f"{'memory':>11}"
    out = [f"{result['conversations']} conversations, {result['samples']} turns", head]
    for name, mode in result["modes"].items():
        if mode is None:
            out.append(f"{name:<14}refused: {result['refused'][name]}")
            continue
        speedup = mode["predicted_speedup"]
        out.append(
            f"{name:<14}{mode['tokens']:>12,}{mode['pairs']:>14,}{mode['flops']:>10.3g}"
            f"{speedup if speedup is None else round(speedup, 2)!s:>10}{mode['fill']:>7.1%}"
            f"{mode['memory_bytes'] / 2**30:>7.2f} GiB"
        )
    return out
