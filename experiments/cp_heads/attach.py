# SPDX-License-Identifier: Apache-2.0
r"""Puts a CP head on a Hugging Face checkpoint directory, whose own files stay as they are.

    python -m experiments.cp_heads.train --config=configs/cp_heads.py:colab --workdir=RUN \
        --config.loss.mode=heads --config.init_from=HF_DIR
    python -m experiments.cp_heads.attach --hf_dir=HF_DIR --checkpoint=RUN [--out=DIR]

Writes cp_head.safetensors and cp_head.json beside the weights, or into --out. Without --checkpoint
the head is a random one of the shape in --config, for timing. The last line is {"head": FILE,
"rank": n, "predicted": n, "parameters": n, "trained": true}.
"""

import pathlib

from absl import flags

from experiments import cli
from lm.cp_heads import checkpoints
from lm.cp_heads.config import CpConfig
from lm.errors import UserError

cli.define_config(data=False, required=False)
HF_DIR = flags.DEFINE_string("hf_dir", None, "the Hugging Face directory; only read")
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "workdir of the run that trained the head")
OUT = flags.DEFINE_string("out", None, "write the head here instead of beside the weights")
flags.mark_flag_as_required("hf_dir")


def main() -> dict[str, object]:
    if CHECKPOINT.value is None and cli.FLAGS.config is None:
        raise UserError("--checkpoint=RUN has the head; without it --config says its shape")
    base = pathlib.Path(HF_DIR.value)
    out = pathlib.Path(OUT.value) if OUT.value else base
    if CHECKPOINT.value is not None:
        return checkpoints.attach_run(base, pathlib.Path(CHECKPOINT.value), out)
    return checkpoints.attach_random(base, cli.config(CpConfig), out)


if __name__ == "__main__":
    cli.run(main)
