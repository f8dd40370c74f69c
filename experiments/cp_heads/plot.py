# SPDX-License-Identifier: Apache-2.0
"""Makes the figures against rank again from the rows of workdirs, or of any JSONL files.

    python -m experiments.cp_heads.plot --workdir=DIR[,DIR...] [--rows=FILE.jsonl,...]

They go to plots/ in the first workdir, or to --out. The last line is {"plots": [paths]}.
"""

import pathlib

from absl import flags

from experiments import cli
from lm.cp_heads import figures
from lm.errors import UserError

WORKDIR = flags.DEFINE_list("workdir", [], "directories of runs, compared in one figure")
ROWS = flags.DEFINE_list("rows", [], "files of rows, as in docs/results")
OUT = flags.DEFINE_string("out", None, "where the figures go (default: plots/ of the first)")


def main() -> dict[str, object]:
    paths = [pathlib.Path(path) for path in (*WORKDIR.value, *ROWS.value)]
    if not paths:
        raise UserError("which rows? give --workdir or --rows")
    if OUT.value is None and not WORKDIR.value:
        raise UserError("--rows alone needs --out, a folder for the figures")
    folder = pathlib.Path(OUT.value) if OUT.value else paths[0] / "plots"
    return {"plots": figures.save(figures.draw(figures.gather(paths)), folder)}


if __name__ == "__main__":
    cli.run(main)
