# SPDX-License-Identifier: Apache-2.0
"""Makes the figures of a workdir again from its rows, and report.html with them.

    python -m experiments.single_pass.plot --workdir=DIR

The last line is {"plots": [paths]}.
"""

from absl import flags

from experiments import cli
from lm import report

WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run", required=True)


def main() -> dict[str, object]:
    made = report.write([WORKDIR.value])
    return {"plots": report.save_figures(made, WORKDIR.value)}


if __name__ == "__main__":
    cli.run(main)
