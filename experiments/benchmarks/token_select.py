# SPDX-License-Identifier: Apache-2.0
"""Token selection beside its alternatives on this machine, stage by stage, in one run.

    python -m experiments.benchmarks.token_select --out=DIR
    python -m experiments.benchmarks.token_select --tokens=524288 --modes=decode --shadow=,int8
    python -m experiments.benchmarks.token_select --tune

First every implementation has to select and attend as XLA does by the true keys (rows "overlap"),
then stages are timed: score (products and their log-sum-exp), vote (products into votes),
importance (both), top_k, select (votes to the list), attend (over the list, keys rotated when
read), step (select and attend). A step with a shadow picks 1.25 k candidates by the codes and ranks
them by the true keys; shadows are timed for the first contender. Contenders: triton and xla are
ours; published is TokenSelect's formulation in plain JAX, dense reads the whole cache; torch and
flashinfer where they are installed. bandwidth_share is of what a copy reaches in the same run.
--out receives token_select.jsonl (a row as soon as it is measured), token_select.csv and plots. The
last line is {"rows": [{"stage": ..., "tokens": n, "ms": x, "bandwidth_share": x}, ...], ...}; the
exit status is 1 when one of ours selects or attends to something else.
"""

import dataclasses
import os
import pathlib
from typing import Any

from absl import flags

from experiments import cli
from experiments.benchmarks import recording
from lm import plots, tables
from lm.benchmarks import attention, selection, selection_tune
from lm.errors import UserError
from lm.progress import say
from lm.token_select.config import SelectConfig

_PLAN = selection.Plan()
TOKENS = flags.DEFINE_list("tokens", [str(n) for n in _PLAN.tokens], "in the cache")
MODES = flags.DEFINE_list("modes", list(_PLAN.modes), "decode, chunk")
SHADOW = flags.DEFINE_list("shadow", list(_PLAN.shadows), "none (empty), int8, fp8")
CONTENDERS = flags.DEFINE_list("contenders", list(_PLAN.contenders), "ours and alternatives")
HEADS = flags.DEFINE_string("heads", _PLAN.heads, "query heads x KV heads x head dim")
DTYPE = flags.DEFINE_string("dtype", _PLAN.dtype, "of the cache")
K = flags.DEFINE_integer("k", _PLAN.config.k, "selected tokens", lower_bound=1)
N_INIT = flags.DEFINE_integer("n_init", _PLAN.config.n_init, "first tokens", lower_bound=0)
N_LOCAL = flags.DEFINE_integer("n_local", _PLAN.config.n_local, "last tokens", lower_bound=1)
CHUNK = flags.DEFINE_integer("chunk", _PLAN.config.chunk, "queries of a chunk", lower_bound=1)
REPEATS = flags.DEFINE_integer("repeats", _PLAN.repeats, "samples per stage", lower_bound=2)
SCALE_SCORES = flags.DEFINE_bool("scale_scores", False, "products times head dim ** -0.5")
LOOP_SECONDS = flags.DEFINE_float("loop_seconds", _PLAN.loop_seconds, "of one loop, about")
COPIED = flags.DEFINE_integer("copied", _PLAN.copied, "numbers that the copy moves", lower_bound=1)
TUNE = flags.DEFINE_bool("tune", False, "time block sizes of the kernels instead")
KERNELS = flags.DEFINE_list("kernels", [], "with --tune: which (default: all)")
OUT = flags.DEFINE_string("out", None, "directory for rows, table and plot")

_COLUMNS = ("mode", "tokens", "method", "shadow", "stage", "ms", "bandwidth_share", "overlap")


def main() -> dict[str, object]:
    # JAX would take most of the memory before PyTorch comes
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    plan = _plan()
    plan.check()
    if KERNELS.value and not TUNE.value:
        raise UserError("--kernels needs --tune")
    name = "tune_token_select" if TUNE.value else "token_select"
    folder = recording.folder_of(OUT.value)
    found = selection_tune.tune(plan, KERNELS.value) if TUNE.value else selection.measure(plan)
    rows = recording.collected(name, found, folder)
    say(tables.text(tables.table(rows, columns=None if TUNE.value else _COLUMNS)))
    for row in rows:
        if reason := row.get("refused") or row.get("failed"):
            say(f"{row['method']} ({row['mode']}, {row['tokens']} tokens): {reason}")
    if folder and not TUNE.value:
        _write(folder, rows)
    result = {"rows": rows, **attention.versions()}
    recording.require(result, rows)
    return result


def _plan() -> selection.Plan:
    try:
        tokens = tuple(int(number) for number in TOKENS.value)
    except ValueError:
        raise UserError(f"--tokens={','.join(TOKENS.value)} are not numbers") from None
    config = SelectConfig(
        n_init=N_INIT.value,
        n_local=N_LOCAL.value,
        k=K.value,
        chunk=CHUNK.value,
        scale_scores=SCALE_SCORES.value,
    )
    return dataclasses.replace(
        _PLAN,
        tokens=tokens,
        modes=MODES.value,
        shadows=SHADOW.value or ("",),
        contenders=CONTENDERS.value,
        heads=HEADS.value,
        dtype=DTYPE.value,
        config=config,
        repeats=REPEATS.value,
        loop_seconds=LOOP_SECONDS.value,
        copied=COPIED.value,
    )


def _write(folder: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    recording.write_csv(folder / "token_select.csv", rows)
    for mode in dict.fromkeys(row["mode"] for row in rows if "mode" in row):
        shown = [
            {
                "implementation": " ".join(filter(None, (row["method"], row["shadow"]))),
                "case": row["stage"],
                "length": row["tokens"],
                "tflops": row["ms"],
            }
            for row in rows
            if row.get("mode") == mode and "ms" in row and row["stage"] in ("step", "full")
        ]
        if shown:
            figure = plots.rates(shown, ylabel="ms of a step")
            (folder / f"token_select_{mode}.png").write_bytes(plots.png(figure))


if __name__ == "__main__":
    cli.run(main)
