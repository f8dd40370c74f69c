# SPDX-License-Identifier: Apache-2.0
r"""Block configurations of the attention kernels, timed on this machine's device.

    python -m experiments.benchmarks.tune_attention --implementation=triton --heads=32x8x128 \
        --out=DIR

Each pass of the kernel starts from its table and moves one setting at a time while that is faster,
by the geometric mean over the masks of --cases. The entries to put into the kernel's table are
printed; --out receives tune_attention.jsonl with all that was tried and what did not compile. The
last line is {"rows": [{"implementation": ..., "pass": ..., "H": n, "entry": ..., "ms": x,
"table_ms": x, ...}, ...], ...}.
"""

import json
import pathlib

from absl import flags

from experiments import cli
from lm.benchmarks import attention, tune
from lm.benchmarks.attention_check import DTYPES
from lm.benchmarks.attention_problem import parse_heads
from lm.errors import UserError
from lm.progress import say

IMPLEMENTATION = flags.DEFINE_list("implementation", list(tune.TUNABLES), "which to tune")
PASSES = flags.DEFINE_list("passes", None, "some of the kernel's; default all")
HEADS = flags.DEFINE_list("heads", ["16x16x64", "32x8x128", "8x4x256"], "one per head dim")
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", list(DTYPES), "of q, k and v")
CASES = flags.DEFINE_list("cases", ["one_pass", "causal"], "masks")
LENGTH = flags.DEFINE_integer("length", 16384, "rows and keys", lower_bound=1)
OUT = flags.DEFINE_string("out", None, "directory for everything that was tried")


def main() -> dict[str, object]:
    rows = []
    for name in IMPLEMENTATION.value:
        if name not in tune.TUNABLES:
            raise UserError(f"implementation {name!r} is not one of {', '.join(tune.TUNABLES)}")
        for heads in map(parse_heads, HEADS.value):
            for pass_name in PASSES.value or tune.TUNABLES[name].passes:
                row = tune.tune(name, pass_name, heads, DTYPE.value, CASES.value, LENGTH.value)
                rows.append(row | attention.versions())
                say(
                    f"{name}, {pass_name}, head dim {heads.H}: {row['entry']}, {row['ms']:.3f} ms "
                    f"(table {row['table_ms']:.3f}, {len(row['tried_ms'])} tried, "
                    f"{len(row['rejected'])} out)"
                )
                _append(rows[-1])
    return {"rows": rows, **attention.versions()}


def _append(row: dict[str, object]) -> None:
    if OUT.value:
        folder = pathlib.Path(OUT.value)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "tune_attention.jsonl").open("a") as lines:
            lines.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    cli.run(main)
