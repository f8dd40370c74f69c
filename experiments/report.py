# SPDX-License-Identifier: Apache-2.0
"""Writes report.html about one workdir or several, from the rows in them.

    python -m experiments.report DIR [DIR ...]

The page is self-contained and goes into the first workdir; a comparison's runs come along by
themselves. The last line is {"report": path, "figures": n, "rows": n}.
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from experiments import cli
from lm import report

WORKDIR = flags.DEFINE_multi_string("workdir", [], "a workdir; may be given several times")


def main() -> dict[str, object]:
    made = report.write(WORKDIR.value)
    path = pathlib.Path(WORKDIR.value[0]) / "report.html"
    return {"report": str(path), "figures": len(made.figures), "rows": made.rows}


def as_flags(arguments: Sequence[str]) -> list[str]:
    """The same arguments with every bare word turned into a --workdir."""
    out, value = [], False
    for argument in arguments:
        bare = not argument.startswith("-") and not value
        out.append(f"--workdir={argument}" if bare else argument)
        value = argument in ("--workdir", "-workdir")
    return out


if __name__ == "__main__":
    sys.argv[1:] = as_flags(sys.argv[1:])
    cli.run(main)
