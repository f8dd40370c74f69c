# SPDX-License-Identifier: Apache-2.0
r"""Our attention beside every alternative on this machine, in one run: rates on visible pairs only.

    python -m experiments.benchmarks.attention --out=DIR
    python -m experiments.benchmarks.attention --lengths=8192,32768 --cases=one_pass,causal \
        --heads=32x8x128 --contenders=mosaic_gpu,torch_flex,torch_cudnn

Masks: one_pass (a conversation of 64 human, 512 thought and 192 response tokens a turn, as training
lays it out), documents (packed short ones), async (programs of promises and blocks), causal, and
sliding_window. Contenders: mosaic_gpu, triton, pallas_tpu, xla and reference are ours; torch_flex,
torch_cudnn, torch_flash, jax_cudnn, jax_triton and jax_mosaic are not; the last five are dense.
Whoever is absent or refuses is listed with the reason. Rates count 4 N H operations per visible
pair forward and 3.5 times as many with the backward pass. --out receives attention.jsonl (a row as
soon as it is measured), attention.csv and a plot per choice of heads and pass. The last line is
{"rows": [{"case": ..., "implementation": ..., "ms": x, "tflops": x, "temp_bytes": n, ...}, ...],
"ratios": {"one_pass 8192 32x8x128 forward": {"mosaic_gpu/torch_flex": x, ...}, ...}, ...}.
"""

import os
import pathlib

from absl import flags

from experiments import cli
from experiments.benchmarks import recording
from lm import plots, tables
from lm.benchmarks import attention
from lm.config import require_positive
from lm.errors import UserError
from lm.progress import say

_PLAN = attention.Plan()
CASES = flags.DEFINE_list("cases", list(_PLAN.cases), "masks")
LENGTHS = flags.DEFINE_list("lengths", [str(n) for n in _PLAN.lengths], "rows and keys")
HEADS = flags.DEFINE_list("heads", list(_PLAN.heads), "query heads x KV heads x head dim")
CONTENDERS = flags.DEFINE_list("contenders", list(_PLAN.contenders), "ours and alternatives")
PASSES = flags.DEFINE_list("passes", list(_PLAN.passes), "forward, forward_backward")
DTYPE = flags.DEFINE_string("dtype", _PLAN.dtype, "of q, k and v")
BATCH = flags.DEFINE_integer("batch", _PLAN.batch, "sequences", lower_bound=1)
REPEATS = flags.DEFINE_integer("repeats", _PLAN.repeats, "samples per contender", lower_bound=3)
SECONDS = flags.DEFINE_float("seconds", _PLAN.seconds, "of samples per contender, about")
OUT = flags.DEFINE_string("out", None, "directory for rows, table and plots")

_COLUMNS = (
    "case",
    "length",
    "heads",
    "pass",
    "implementation",
    "ms",
    "tflops",
    "temp_bytes",
    "difference",
)


def main() -> dict[str, object]:
    # JAX would take most of the memory before PyTorch comes
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    plan = _plan()
    plan.check()
    folder = recording.folder_of(OUT.value)
    rows = recording.collected("attention", attention.measure(plan), folder)
    measured = [row for row in rows if "tflops" in row]
    _say(rows, measured)
    if folder:
        _write(folder, rows, measured)
    result = {"rows": rows, "ratios": attention.ratios(rows), **attention.versions()}
    recording.require(result, rows)
    return result


def _plan() -> attention.Plan:
    try:
        lengths = tuple(int(length) for length in LENGTHS.value)
    except ValueError:
        raise UserError(f"--lengths={','.join(LENGTHS.value)} are not numbers") from None
    for length in lengths:
        require_positive("--lengths", length)
    return attention.Plan(
        CASES.value,
        lengths,
        HEADS.value,
        CONTENDERS.value,
        PASSES.value,
        DTYPE.value,
        BATCH.value,
        REPEATS.value,
        SECONDS.value,
    )


def _say(rows: list[dict[str, object]], measured: list[dict[str, object]]) -> None:
    if measured:
        say(tables.text(tables.table(measured, columns=_COLUMNS)))
    reasons: dict[tuple[object, object], dict[object, None]] = {}
    for row in rows:
        if "tflops" not in row:
            reason = (row["implementation"], row.get("refused") or row.get("failed"))
            reasons.setdefault(reason, {})[row["case"]] = None
    for (name, reason), cases in reasons.items():
        say(f"{name} on {', '.join(cases)}: {reason}")


def _write(
    folder: pathlib.Path, rows: list[dict[str, object]], measured: list[dict[str, object]]
) -> None:
    recording.write_csv(folder / "attention.csv", rows)
    for heads, passed in dict.fromkeys((row["heads"], row["pass"]) for row in measured):
        shown = [row for row in measured if (row["heads"], row["pass"]) == (heads, passed)]
        name = f"attention_{heads}_{passed}.png"
        (folder / name).write_bytes(plots.png(plots.rates(shown)))


if __name__ == "__main__":
    cli.run(main)
