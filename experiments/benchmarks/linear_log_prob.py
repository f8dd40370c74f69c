# SPDX-License-Identifier: Apache-2.0
r"""Our linear layer with log-probabilities beside every alternative on this machine, in one run.

    python -m experiments.benchmarks.linear_log_prob --rows=32768 --dim=2048 --vocab=128256 \
        --out=DIR
    python -m experiments.benchmarks.linear_log_prob --tune --forms=weighted,general --seconds=1 \
        --out=DIR
    python -m experiments.benchmarks.linear_log_prob --check

Forms: weighted (the mean over rows, whose gradients are made with the value), general (a cotangent
per row) and frozen_w (general, without the gradient of w). Contenders: triton, pallas_tpu,
xla and reference are ours; products (the matrix products alone: the ceiling),
jax_materialised, jax_materialised_half, jax_chunks, torch_compiled and liger are not. Whoever is
absent or refuses is listed with the reason. Rates count 3 products of 2 * rows * dim * vocab for
weighted and frozen_w and 4 for general, of every contender. --tune times chunk sizes and kernel
settings of ours instead, and says which are best within 2 GiB of temporaries; --check compares ours
with float64 on smaller arrays. --out receives linear_log_prob.jsonl (a row as soon as it is
measured; tune_ and check_ before its name), a table in csv and a plot. The last line is {"rows":
[{"form": ..., "implementation": ..., "ms": x, "ms_p25": x, "ms_p75": x, "tflops": x, "temp_bytes":
n, "agrees": true, ...}, ...], "ratios": {"weighted": {"triton/products": x, "triton time/liger": x,
"triton time/best": x, ...}, ...}, ...}; with --tune "best" instead of "ratios".
"""

import os
import pathlib
from collections.abc import Iterator

from absl import flags

from experiments import cli
from experiments.benchmarks import recording
from lm import plots, tables
from lm.benchmarks import attention, linear_log_prob_check, linear_log_prob_tune
from lm.benchmarks import linear_log_prob as benchmark
from lm.errors import UserError
from lm.progress import say
from ops import dispatch

_PLAN = benchmark.Plan()
ROWS = flags.DEFINE_integer("rows", _PLAN.rows, "rows of x")
DIM = flags.DEFINE_integer("dim", _PLAN.dim, "columns of x and w")
VOCAB = flags.DEFINE_integer("vocab", _PLAN.vocab, "rows of w")
DTYPE = flags.DEFINE_string("dtype", _PLAN.dtype, "of x and w")
FORMS = flags.DEFINE_list("forms", list(_PLAN.forms), "weighted, general, frozen_w")
CONTENDERS = flags.DEFINE_list("contenders", list(_PLAN.contenders), "ours and alternatives")
REPEATS = flags.DEFINE_integer("repeats", _PLAN.repeats, "samples per contender", lower_bound=3)
SECONDS = flags.DEFINE_float("seconds", _PLAN.seconds, "of samples per contender, about")
TUNE = flags.DEFINE_bool("tune", False, "time chunk sizes and kernel settings of ours")
CHECK = flags.DEFINE_bool("check", False, "compare ours with float64")
SMALL = flags.DEFINE_bool("small", False, "small arrays for --check")
OUT = flags.DEFINE_string("out", None, "directory for rows, table and plot")

_COLUMNS = (
    "form",
    "implementation",
    "variant",
    "ms",
    "ms_p25",
    "ms_p75",
    "tflops",
    "temp_bytes",
    "difference_value",
    "difference_dx",
    "difference_dw",
    "agrees",
)


def main() -> dict[str, object]:
    # JAX would take most of the memory before PyTorch comes
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    plan = benchmark.Plan(
        ROWS.value,
        DIM.value,
        VOCAB.value,
        DTYPE.value,
        FORMS.value,
        CONTENDERS.value,
        REPEATS.value,
        SECONDS.value,
    )
    plan.check()
    if TUNE.value and CHECK.value:
        raise UserError("--tune and --check are two commands")
    if CHECK.value:
        return _check(plan)
    return _tune(plan) if TUNE.value else _measure(plan)


def _measure(plan: benchmark.Plan) -> dict[str, object]:
    rows = _collected("linear_log_prob", benchmark.measure(plan))
    measured = [row for row in rows if "ms" in row]
    if OUT.value and measured:
        shown = [{**row, "case": row["form"], "length": row["rows"]} for row in measured]
        figure = plots.rates(shown, "TFLOP/s", "rows")
        (pathlib.Path(OUT.value) / "linear_log_prob.png").write_bytes(plots.png(figure))
    result = {"rows": rows, "ratios": benchmark.ratios(rows), **attention.versions()}
    if failed := benchmark.failures(rows):
        raise cli.CheckFailed(result, failed[0])
    return result


def _tune(plan: benchmark.Plan) -> dict[str, object]:
    rows = _collected("tune_linear_log_prob", linear_log_prob_tune.tune(plan))
    best = {}
    for form in plan.forms:
        group = [row for row in rows if row["form"] == form]
        for fits, key in ((True, "within 2 GiB"), (False, "of all")):
            for name, row in linear_log_prob_tune.best(group, fits).items():
                best.setdefault(form, {})[f"{name}, best {key}"] = {
                    entry: row[entry] for entry in ("variant", "ms", "temp_bytes")
                }
                say(f"{form}: {name}, best {key}: {row['variant']}, {row['ms']:.4g} ms")
    result = {"rows": rows, "best": best, **attention.versions()}
    if not best:
        raise cli.CheckFailed(result, "nothing to tune runs here")
    return result


def _check(plan: benchmark.Plan) -> dict[str, object]:
    cases = linear_log_prob_check.SMALL_CASES if SMALL.value else linear_log_prob_check.CASES
    names = [name for name in plan.contenders if name in dispatch.IMPLEMENTATIONS]
    rows = _collected("check_linear_log_prob", linear_log_prob_check.sweep(names, cases=cases))
    served = [row for row in rows if "refused" not in row]
    failed = [row for row in served if not row["passed"]]
    result = {"rows": rows, "failed": len(failed), **attention.versions()}
    if failed:
        raise cli.CheckFailed(
            result, f"{len(failed)} of {len(served)} fail; the first: {failed[0]}"
        )
    if not served:
        raise cli.CheckFailed(result, "no implementation served a call")
    return result


def _collected(name: str, found: Iterator[dict[str, object]]) -> list[dict[str, object]]:
    """The rows, written as they come, then shown."""
    folder = recording.folder_of(OUT.value)
    rows = recording.collected(name, found, folder)
    done = [row for row in rows if "refused" not in row and "failed" not in row]
    if done:
        say(tables.text(tables.table(done, columns=None if CHECK.value else _COLUMNS)))
    reasons = {
        (row.get("variant", row["implementation"]), row.get("refused") or row.get("failed")): None
        for row in rows
        if row not in done
    }
    for about, reason in reasons:
        say(f"{about}: {str(reason).removeprefix(f'{about}: ')}")
    if folder:
        recording.write_csv(folder / f"{name}.csv", rows)
    return rows


if __name__ == "__main__":
    cli.run(main)
