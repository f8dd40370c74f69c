# SPDX-License-Identifier: Apache-2.0
"""Writes a trained run as a Hugging Face checkpoint: adapters merged, with tokenizer and template.

    python -m experiments.export --checkpoint=WORKDIR --hf_dir=DIR [--dtype=bfloat16]

The last line is {"hf_dir": path, "family": ..., "parameters": n}.
"""

import pathlib

from absl import flags

from experiments import cli
from lm import setup, transformer
from lm.hf import weights

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "workdir of the run", required=True)
HF_DIR = flags.DEFINE_string("hf_dir", None, "directory to write", required=True)
FAMILY = flags.DEFINE_string("family", None, "of Hugging Face (default: the first that fits)")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "of the weights")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace weights that are there")


def main() -> dict[str, object]:
    resolved, params = setup.load_workdir(pathlib.Path(CHECKPOINT.value))
    weights.save(
        HF_DIR.value,
        resolved.model,
        params,
        FAMILY.value,
        tokenizer=resolved.tokenizer,
        # a tokenizer without a template of its own gets none by default
        template=resolved.template if resolved.config.data.template else None,
        dtype=DTYPE.value,
        overwrite=OVERWRITE.value,
    )
    return {
        "hf_dir": HF_DIR.value,
        "family": weights.read_fields(HF_DIR.value)["architectures"][0],
        "parameters": transformer.count_parameters(resolved.model),
    }


if __name__ == "__main__":
    cli.run(main)
