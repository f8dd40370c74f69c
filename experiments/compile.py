# SPDX-License-Identifier: Apache-2.0
"""Compiles a config's whole train step for a TPU topology on this machine, without a TPU.

    python -m experiments.compile --config=configs/single_pass.py:paper --topology=v5p:4x4x4
    python -m experiments.compile --config=configs/cp_heads.py:python_100m --topology=v5e:2x2

Runs the real TPU compiler (libtpu from `make setup EXTRA=dev`). What a config trains is told by its
sections. Exit status 1 when the step does not fit the chip's memory. The last line is
{"parameters": n, "chips": n, "bytes_per_chip": n, "hbm_bytes": n, "flops_per_chip": x,
"compile_s": x}.
"""

import dataclasses
import os

os.environ.update(
    JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", TPU_WORKER_ID="0"
)

from absl import flags

from experiments import cli
from lm import aot
from lm.config import Config
from lm.cp_heads import compiling
from lm.cp_heads.config import CpConfig

# the first whose config has all sections of the given one; a new method is a line
PROBLEMS: tuple[tuple[type[Config], aot.Problems], ...] = (
    (Config, aot.edges),
    (CpConfig, compiling.problem),
)

cli.define_config(data=False)
TOPOLOGY = flags.DEFINE_string("topology", None, "for example v5e:4x4, v5p:4x4x4 or v6e:8x8")
flags.mark_flag_as_required("topology")


def main() -> dict[str, object]:
    given = set(cli.FLAGS.config)
    fitting = (p for p in PROBLEMS if given <= {field.name for field in dataclasses.fields(p[0])})
    # of a section that none has, the plain config says so
    cls, problems = next(fitting, PROBLEMS[0])
    result = aot.compile_step(cli.config(cls), TOPOLOGY.value, problems)
    if result["bytes_per_chip"] > result["hbm_bytes"]:
        raise cli.CheckFailed(result, f"needs more than the chip's {result['hbm_bytes']} bytes")
    return result


if __name__ == "__main__":
    cli.run(main)
