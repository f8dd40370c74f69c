# SPDX-License-Identifier: Apache-2.0
r"""The gradient of the embedding table beside other ways to sum it, in one run.

    python -m experiments.benchmarks.lookup --tokens=32768 --vocab=768 --dim=384 --out=DIR

float32 is ours; indexing is what autodiff makes of table[tokens], which sums in the table's type;
one_hot is a matrix product, sorted a sum over sorted tokens. Tokens follow Zipf's law. --out
receives lookup.jsonl. The last line is {"rows": [{"implementation": ..., "ms": x, "ms_p25": x,
"ms_p75": x, "relative_error": x, ...}, ...], "ratios": {name: its time over ours}, ...}.
"""

from absl import flags

from experiments import cli
from experiments.benchmarks import recording
from lm import tables
from lm.benchmarks import attention, lookup
from lm.progress import say

_PLAN = lookup.Plan()
TOKENS = flags.DEFINE_integer("tokens", _PLAN.tokens, "that are looked up")
VOCAB = flags.DEFINE_integer("vocab", _PLAN.vocab, "rows of the table")
DIM = flags.DEFINE_integer("dim", _PLAN.dim, "columns of the table")
DTYPE = flags.DEFINE_string("dtype", _PLAN.dtype, "of table and gradient")
CONTENDERS = flags.DEFINE_list("contenders", list(_PLAN.contenders), "ours and alternatives")
REPEATS = flags.DEFINE_integer("repeats", _PLAN.repeats, "samples per contender", lower_bound=3)
SECONDS = flags.DEFINE_float("seconds", _PLAN.seconds, "of samples per contender, about")
OUT = flags.DEFINE_string("out", None, "directory for rows")


def main() -> dict[str, object]:
    plan = lookup.Plan(
        TOKENS.value,
        VOCAB.value,
        DIM.value,
        DTYPE.value,
        tuple(CONTENDERS.value),
        REPEATS.value,
        SECONDS.value,
    )
    plan.check()
    rows = recording.collected("lookup", lookup.measure(plan), recording.folder_of(OUT.value))
    say(tables.text(tables.table(rows, columns=("implementation", "ms", "relative_error"))))
    times = {row["implementation"]: row["ms"] for row in rows}
    own = times.get(lookup.OWN)
    ratios = {name: ms / own for name, ms in times.items()} if own else {}
    return {"rows": rows, "ratios": ratios, **attention.versions()}


if __name__ == "__main__":
    cli.run(main)
