# SPDX-License-Identifier: Apache-2.0
r"""Sparse prefill (a band and chosen columns) beside dense causal attention, in one run.

    python -m experiments.benchmarks.sparse_attention --out=DIR
    python -m experiments.benchmarks.sparse_attention --lengths=65536 --heads=32x8x128 \
        --contenders=sparse:mosaic_gpu,sparse:triton,dense:mosaic_gpu,jax_cudnn

Forward passes. sparse:NAME and dense:NAME are ours by implementation, jax_cudnn and the other
alternatives of benchmarks.attention are dense. Each sparse contender first has to agree with the
reference on some rows ("difference"). Columns are drawn evenly, others for each KV head. Rates
count 4 N H operations per visible pair. --out receives sparse_attention.jsonl. The last line is
{"rows": [{"method": "sparse:mosaic_gpu", "length": n, "ms": x, "tflops": x, ...}, ...],
"speedups": {"65536": {"sparse:mosaic_gpu/jax_cudnn": x, ...}}, ...}; the exit status is 1 when one
of ours fails or computes something else.
"""

import os

from absl import flags

from experiments import cli
from experiments.benchmarks import recording
from lm import tables
from lm.benchmarks import attention, sparse_attention
from lm.errors import UserError
from lm.progress import say

_PLAN = sparse_attention.Plan()
LENGTHS = flags.DEFINE_list("lengths", [str(n) for n in _PLAN.lengths], "rows and keys")
CONTENDERS = flags.DEFINE_list("contenders", list(_PLAN.contenders), "ours and alternatives")
HEADS = flags.DEFINE_string("heads", _PLAN.heads, "query heads x KV heads x head dim")
COLUMNS = flags.DEFINE_integer("columns", _PLAN.columns, "per KV head", lower_bound=1)
BAND = flags.DEFINE_integer("band", _PLAN.band, "keys, up to a block more", lower_bound=0)
DTYPE = flags.DEFINE_string("dtype", _PLAN.dtype, "of q, k and v")
BATCH = flags.DEFINE_integer("batch", _PLAN.batch, "sequences", lower_bound=1)
REPEATS = flags.DEFINE_integer("repeats", _PLAN.repeats, "samples per contender", lower_bound=3)
SECONDS = flags.DEFINE_float("seconds", _PLAN.seconds, "of samples per contender, about")
OUT = flags.DEFINE_string("out", None, "directory for rows")

_COLUMNS = ("length", "method", "ms", "tflops", "temp_bytes", "difference")


def main() -> dict[str, object]:
    # JAX would take most of the memory before PyTorch comes
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    plan = _plan()
    plan.check()
    folder = recording.folder_of(OUT.value)
    rows = recording.collected("sparse_attention", sparse_attention.measure(plan), folder)
    measured = [row for row in rows if "ms" in row]
    if measured:
        say(tables.text(tables.table(measured, columns=_COLUMNS)))
    for row in rows:
        if reason := row.get("refused") or row.get("failed"):
            say(f"{row['method']} at {row['length']}: {reason}")
    speedups = sparse_attention.speedups(rows)
    result = {"rows": rows, "speedups": speedups, **attention.versions()}
    recording.require(result, rows)
    return result


def _plan() -> sparse_attention.Plan:
    try:
        lengths = tuple(int(length) for length in LENGTHS.value)
    except ValueError:
        raise UserError(f"--lengths={','.join(LENGTHS.value)} are not numbers") from None
    return sparse_attention.Plan(
        lengths=lengths,
        contenders=CONTENDERS.value,
        heads=HEADS.value,
        columns=COLUMNS.value,
        band=BAND.value,
        dtype=DTYPE.value,
        batch=BATCH.value,
        repeats=REPEATS.value,
        seconds=SECONDS.value,
    )


if __name__ == "__main__":
    cli.run(main)
