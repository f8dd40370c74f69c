# SPDX-License-Identifier: Apache-2.0
"""Compares a Hugging Face checkpoint's logits here with those of transformers.

    python -m experiments.parity --hf_dir=DIR [--prompt=TEXT] [--golden]

The last line of output is JSON: family, max_abs, kl. Exit status 1 when they are beyond the limits.
"""

import pathlib
from typing import Any

from absl import flags

from experiments import cli
from lm.hf import parity

FLAGS = flags.FLAGS
flags.DEFINE_string("hf_dir", None, "directory with config.json and safetensors")
flags.DEFINE_string("prompt", None, "text to run; random tokens without it")
flags.DEFINE_bool("golden", False, "compare with tokens.npy and logits.npy of the directory")
flags.DEFINE_integer("seed", 0, "of the random tokens")
flags.DEFINE_float("max_abs", parity.MAX_ABS, "largest difference of two logits that passes")
flags.DEFINE_float("max_kl", parity.MAX_KL, "largest mean KL divergence that passes, in nats")
flags.mark_flag_as_required("hf_dir")


def main() -> dict[str, Any]:
    """The comparison; CheckFailed beyond the limits."""
    result = parity.parity(
        pathlib.Path(FLAGS.hf_dir), prompt=FLAGS.prompt, golden=FLAGS.golden, seed=FLAGS.seed
    )
    # written so that a NaN fails
    if not (result["max_abs"] <= FLAGS.max_abs and result["kl"] <= FLAGS.max_kl):
        limits = f"max_abs <= {FLAGS.max_abs:g} and kl <= {FLAGS.max_kl:g}"
        raise cli.CheckFailed(result, f"the logits differ beyond {limits}")
    return result


if __name__ == "__main__":
    cli.run(main)
