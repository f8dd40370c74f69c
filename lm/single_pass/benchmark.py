# SPDX-License-Identifier: Apache-2.0
"""Step time, throughput, memory and FLOPs of several modes: same data, model and device, in one
run.

All modes give rows of the same shape, so one compiled step serves them all, and steps of the modes
alternate: what differs is only what the rows hold.
"""

import dataclasses
import statistics
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from lm import hardware, jobs, losses, setup, sharding, train
from lm.data import packing
from lm.errors import UserError
from lm.progress import Progress
from lm.single_pass import layouts
from lm.single_pass.samples import Sample


@dataclasses.dataclass
class _Mode:
    """The rows of one mode and the times of its steps."""

    name: str
    rows: list[packing.Row]
    conversations: int
    seconds: list[float] = dataclasses.field(default_factory=list)
    flops: list[float] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)


def synthetic(spec: str, count: int, vocabulary: int, seed: int = 0) -> list[list[Sample]]:
    """Conversations of random tokens: "TURNS:HUMAN,THOUGHT,RESPONSE", such as "8:100,300,100"."""
    try:
        turns, lengths = spec.split(":")
        turns, (human, thought, response) = int(turns), map(int, lengths.split(","))
        if min(turns, human, response) < 1 or thought < 0:
            raise ValueError
    except ValueError:
        raise UserError(
            f"--synthetic={spec!r} is not TURNS:HUMAN,THOUGHT,RESPONSE, such as 8:100,300,100"
        ) from None
    rng = np.random.default_rng(seed)

    def conversation() -> list[Sample]:
        history, samples = np.zeros(0, np.int32), []
        for turn in range(turns):
            parts = [
                rng.integers(0, vocabulary, n, dtype=np.int32) for n in (human, thought, response)
            ]
            prompt = np.concatenate([history, parts[0]])
            samples.append(
                Sample(
                    np.concatenate([prompt, *parts[1:]]), len(prompt), turn, thought_length=thought
                )
            )
            history = np.concatenate([prompt, parts[2]])
        return samples

    return [conversation() for _ in range(count)]


def benchmark(
    resolved: setup.Setup,
    conversations: Iterable[Sequence[Sample]],
    modes: Sequence[str],
    repeats: int = 10,
    warmup: int = 2,
) -> dict[str, Any]:
    """Median step times of the config's own train step; the first mode is compared with the last.

    Returns rows per mode and `speedup` (conversations per second) and `flop_ratio` (model FLOPs per
    conversation, padding of both counted), each of the first mode against the last.
    """
    if len(modes) < 2:
        raise UserError("--modes needs at least two, such as tree,n_pass")
    config = resolved.config
    groups = [list(samples) for samples in conversations]
    entries = [_rows_of(mode, groups, config.data) for mode in modes]
    mesh = sharding.make(config.mesh, resolved.model)
    jobs.check_batch(config, mesh)
    step, state, frozen, memory = _compiled(resolved, mesh, _batch(entries[0], 0, config))
    with Progress("benchmark", (warmup + repeats) * len(entries)) as progress:
        for repeat in range(-warmup, repeats):
            for entry in entries:
                host = _batch(entry, repeat + warmup, config)
                device = jax.block_until_ready(train.to_device(host, mesh))
                began = time.perf_counter()
                state, sums = step(state, frozen, device)
                jax.block_until_ready((state.step, sums))
                seconds = time.perf_counter() - began
                progress.advance()
                if repeat >= 0:
                    entry.seconds.append(seconds)
                    _count(entry, host, resolved)
    return _result(entries, memory, config.train.batch_size)


def _rows_of(mode: str, groups: Sequence[Sequence[Sample]], data: Any) -> _Mode:
    parsed = layouts.parse_mode(mode)
    made = []
    for samples in groups:
        found, _ = layouts.layouts_of(samples, parsed, data.seq_len, data.overlong)
        made += found
    if not made:
        raise UserError(f"mode {mode}: nothing fits data.seq_len={data.seq_len}")
    rows = packing.pack(made, data.seq_len)
    return _Mode(str(parsed), rows, len(groups))


def _batch(entry: _Mode, index: int, config: Any) -> dict[str, np.ndarray]:
    size = config.train.batch_size
    chosen = [entry.rows[(index * size + i) % len(entry.rows)] for i in range(size)]
    return packing.stack(chosen)


def _compiled(resolved, mesh, host):
    config = resolved.config
    optimizer = train.make_optimizer(config.optimizer, 1000)
    execution = jobs.execution_of(resolved, mesh)
    objective = train.edge_objective(resolved.model, execution, config.train.weighting)
    step = train.make_step(objective, optimizer, config.train, resolved.model.dtype)
    state = train.init_state(
        setup.trained_params(resolved, mesh), optimizer, config.train.seed, mesh
    )
    frozen = setup.frozen_params(resolved, mesh)
    jitted = jax.jit(step, donate_argnums=0)
    compiled = jitted.lower(state, frozen, train.to_device(host, mesh)).compile()
    return compiled, state, frozen, hardware.compiled_bytes(compiled)


def _count(entry: _Mode, host: losses.Batch, resolved: setup.Setup) -> None:
    entry.flops.append(jobs.batch_flops(resolved.model, host))
    entry.tokens.append(int((host["until"] > 0).sum()))


def _result(entries: Sequence[_Mode], memory: int, batch_size: int) -> dict[str, Any]:
    chip = hardware.chip()
    rows = []
    for entry in entries:
        seconds = statistics.median(entry.seconds)
        flops = statistics.mean(entry.flops)
        per_row = entry.conversations / len(entry.rows)
        quartiles = (
            statistics.quantiles(entry.seconds, n=4) if len(entry.seconds) > 1 else [seconds] * 3
        )
        row = {
            "mode": entry.name,
            "step_ms": 1e3 * seconds,
            "step_ms_quartiles": [1e3 * quartiles[0], 1e3 * quartiles[2]],
            "conversations_per_s": per_row * batch_size / seconds,
            "tokens_per_s": statistics.mean(entry.tokens) / seconds,
            "peak_bytes": memory,
            "flops": flops,
            "rows": len(entry.rows),
            "conversations": entry.conversations,
            "fill": float(np.mean([(row["until"] > 0).mean() for row in entry.rows])),
        }
        if chip is not None:
            row["mfu"] = flops / seconds / chip.flops / jax.device_count()
        rows.append(row)

    def per_conversation(row: dict[str, Any]) -> float:
        return row["flops"] * row["rows"] / row["conversations"]

    first, last = rows[0], rows[-1]
    speedup = first["conversations_per_s"] / last["conversations_per_s"]
    flop_ratio = per_conversation(last) / per_conversation(first)
    return {
        "rows": rows,
        "speedup": speedup,
        "flop_ratio": flop_ratio,
        "realised": speedup / flop_ratio,
        "device": jax.devices()[0].device_kind,
    }


def add_cost(result: dict[str, Any], chip_price: float) -> None:
    """Adds `cost` to each row: money per million conversations trained, at a price per chip-
    hour."""
    for row in result["rows"]:
        hours = 1e6 / row["conversations_per_s"] / 3600 * jax.device_count()
        row["cost"] = hours * chip_price
