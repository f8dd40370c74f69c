# SPDX-License-Identifier: Apache-2.0
"""What a draft costs and what it saves, of whole requests: its own time, the time to the first
token, the time to the last, and memory, beside dense attention and methods without a draft.

Timing is that of `lm.long_context.benchmark`. Memory of keys and values is counted from shapes:
`cache_bytes` are alive while decoding; `prefill_cache_bytes` at most during prefill, which for
methods that evict are the kept lists and one layer's whole keys and values; `draft_bytes` are the
draft's parameters and its own cache, which is gone before the target begins.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from lm import generate, hardware, transformer
from lm.config import ModelConfig, SamplingConfig
from lm.draft_inference.draft import Draft, Drafter, FirstLayers
from lm.draft_inference.methods import Methods
from lm.draft_inference.proposals import InBlocks
from lm.errors import UserError
from lm.long_context import benchmark, decode
from lm.long_context.benchmark import Options, Row
from lm.long_context.methods import DENSE
from lm.long_context.policy import Method

METHODS = ("speckv", "specpc", "speckv_pc", DENSE, "snapkv")


def random_draft(model: ModelConfig, valid_vocab: int | None, seed: int) -> Draft:
    """A draft of a shape, its parameters at random."""
    params = benchmark.random_params(model, seed)
    return Draft(model, params, valid_vocab, "", f"random, seed {seed}")


def rows(
    model: ModelConfig,
    params: transformer.Params,
    methods: Methods,
    options: Options,
    valid_vocab: int | None = None,
) -> Iterator[Row]:
    """Rows as they come, one per context, batch size and method.

    `draft_ms` is part of `ttft_ms` (None without a draft); `total_ms` ends with the last of
    `new_tokens` tokens; `requests_per_s` is of whole batches, one after the other; `peak_bytes`
    counts parameters of both models. Raises UserError.
    """
    if options.filled:
        raise UserError("--filled has no prompt that a draft could read")
    policies = options.policies(model, methods)
    for row in benchmark.benchmark(model, params, methods, options, valid_vocab):
        yield complete(row, model, policies[row["method"]], options)


def complete(row: Row, model: ModelConfig, policy: Method, options: Options) -> Row:
    """A row of `lm.long_context.benchmark` with what it says of whole requests."""
    row = {"draft_ms": None, **row, "kind": "request"}
    row["decode_tokens_per_s"] = row.pop("tokens_per_s")
    names = ("total_ms", "requests_per_s", "prefill_cache_bytes", "draft_bytes")
    row |= dict.fromkeys(names)
    if "failed" in row:
        return row
    decoding = 1e3 * options.new_tokens * row["batch"] / row["decode_tokens_per_s"]
    row["total_ms"] = row["ttft_ms"] + decoding
    row["requests_per_s"] = 1e3 * row["batch"] / row["total_ms"]
    size = generate.bucket(row["context"])
    layer = cache_bytes(dataclasses.replace(model, num_layers=1), row["batch"], size)
    drops = decode.drops(policy, SamplingConfig(max_new_tokens=options.draws))
    row["prefill_cache_bytes"] = row["cache_bytes"] + (layer if drops else 0)
    drafter = getattr(policy, "drafter", None)
    own, held = draft_bytes(drafter, model, row["batch"], size, options.draws)
    if held is not None:
        row["draft_bytes"] = own + held
        # the draft looks before the target's cache is made
        looking = own + held + parameter_bytes(model)
        row["peak_bytes"] = max(row["peak_bytes"] + own, looking)
    return row


def cache_bytes(model: ModelConfig, batch: int, tokens: int) -> int:
    """Keys and values of so many tokens, in all layers."""
    size = jnp.dtype(model.dtype).itemsize
    return 2 * model.num_layers * batch * tokens * model.num_kv_heads * model.head_dim * size


def parameter_bytes(model: ModelConfig) -> int:
    """In the compute dtype."""
    return transformer.count_parameters(model) * jnp.dtype(model.dtype).itemsize


def draft_bytes(
    drafter: Drafter | None, target: ModelConfig, batch: int, prompt: int, tokens: int
) -> tuple[int, int | None]:
    """Bytes of a draft's own parameters, and of its cache of a padded prompt and new tokens; the
    latter None where it is not known from shapes (no draft, or the target's own under LAQ++)."""
    if isinstance(drafter, Draft):
        return parameter_bytes(drafter.model), cache_bytes(drafter.model, batch, prompt + tokens)
    if isinstance(drafter, InBlocks):
        lists = cache_bytes(target, batch, drafter.slots(prompt, tokens))
        return drafter.proposals.bytes, lists
    if isinstance(drafter, FirstLayers):
        part = dataclasses.replace(target, num_layers=drafter.layers)
        return 0, cache_bytes(part, batch, prompt + tokens)
    return 0, None


def layers_that_fit(
    target: ModelConfig, draft: ModelConfig | None, batch: int, tokens: int, memory: int
) -> int:
    """How many of the target's layers fit beside the draft, with dense attention's cache of
    `tokens` tokens a sequence. Raises UserError when not one does."""
    if draft is not None:
        memory -= parameter_bytes(draft) + cache_bytes(draft, batch, tokens)
    return benchmark.layers_that_fit(target, "", batch * tokens, memory)


def memory() -> int:
    """Bytes that programs may use on the first device. Raises UserError where it does not say."""
    statistics = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in statistics:
        return statistics["bytes_limit"]
    known = hardware.chip()
    if known is None:
        raise UserError("--layers=0: this device does not say how much memory it has")
    return known.memory


def ratio(found: list[dict[str, Any]], name: str) -> float | None:
    """Dense attention's over the first method's, of `name`, at the last context; None where one of
    the two was not measured."""
    last = [row for row in found if row["context"] == found[-1]["context"]] if found else []
    dense = next((row[name] for row in last if row["method"] == DENSE), None)
    mine = next((row[name] for row in last if row["method"] != DENSE), None)
    return dense / mine if dense and mine else None
