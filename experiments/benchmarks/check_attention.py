# SPDX-License-Identifier: Apache-2.0
"""Attention against the float32 reference under random masks, on this machine's device.

    python -m experiments.benchmarks.check_attention --implementation=mosaic_gpu,triton --out=DIR

Trees, async programs and sliding windows, alone and packed, with every group size and head dim. An
implementation that refuses a call is listed with its reason; one that serves it must be within the
tolerance, exactly zero where nothing is seen, and the same bit for bit when run again, or the exit
status is 1. --out receives attention_check.jsonl (a row per mask, as soon as it is checked) and
attention_check.md. The last line is {"lines": [{"implementation": ..., "cases": n, "passed": n,
"error_out": x, ...}, ...], "failed": n, ...}.
"""

import collections
import time

import jax
from absl import flags

from experiments import cli
from experiments.benchmarks import recording
from lm import tables
from lm.benchmarks import attention_check
from lm.errors import UserError
from lm.progress import say

IMPLEMENTATION = flags.DEFINE_list("implementation", ["xla"], "which to check")
DTYPES = flags.DEFINE_list("dtypes", list(attention_check.DTYPES), "the first meets all masks")
CASES = flags.DEFINE_integer("cases", 200, "masks", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "of the first mask")
SMALL = flags.DEFINE_bool("small", False, "short arrays, for machines without an accelerator")
WORKERS = flags.DEFINE_integer("workers", 4, "programs compiled at a time", lower_bound=1)
OUT = flags.DEFINE_string("out", None, "directory for the rows and the table")


def main() -> dict[str, object]:
    shapes = attention_check.SMALL_SHAPES if SMALL.value else attention_check.SHAPES
    began = time.monotonic()
    if not any(IMPLEMENTATION.value) or not any(DTYPES.value):
        raise UserError("--implementation and --dtypes: name some to check")
    folder = recording.folder_of(OUT.value)
    if folder:
        (folder / "attention_check.jsonl").write_text("")
    found = attention_check.sweep(
        IMPLEMENTATION.value, DTYPES.value, CASES.value, SEED.value, shapes, WORKERS.value
    )
    rows = recording.collected("attention_check", found, folder)
    lines = attention_check.summary(rows)
    say(tables.text(tables.table(lines)))
    result = {
        "lines": lines,
        "served": sum("refused" not in row for row in rows),
        "failed": len(attention_check.failures(rows)),
        "seconds": time.monotonic() - began,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    if folder:
        (folder / "attention_check.md").write_text(attention_check.markdown(lines))
    _require(result, rows)
    return result


def _require(result: dict[str, object], rows: list[dict[str, object]]) -> None:
    failed = attention_check.failures(rows)
    if failed:
        counts = collections.Counter(row["implementation"] for row in failed)
        said = ", ".join(f"{name} {count}" for name, count in counts.items())
        first = {key: failed[0][key] for key in ("family", "seed", "dtype", "T", "S", "H")}
        raise cli.CheckFailed(result, f"masks that fail: {said}; the first is {first}")
    served = {row["implementation"] for row in rows if "refused" not in row}
    unserved = [name for name in IMPLEMENTATION.value if name not in served]
    if unserved:
        raise cli.CheckFailed(result, f"served no call: {', '.join(unserved)}")


if __name__ == "__main__":
    cli.run(main)
