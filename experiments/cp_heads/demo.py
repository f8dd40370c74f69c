# SPDX-License-Identifier: Apache-2.0
"""The CP demo on the embedded arithmetic: a small model, heads of rank 1, rank r and HMM on it, and
what each of them drafts."""

import dataclasses
import pathlib
import time
from typing import Any

import jax
import numpy as np

from configs import cp_heads as presets
from lm import generate, tables
from lm.config import freeze
from lm.cp_heads import checkpoints, decode, drafters, evaluate, figures, prompts, training
from lm.cp_heads.config import CpConfig
from lm.errors import RunError
from lm.progress import say
from lm.workdir import Workdir

HEADS = {"rank1": (1, "identity"), "cp": (4, "identity"), "hmm": (4, "linear")}
_STEPS = {"trunk": 120, "heads": 80}
_PROMPT = 48  # tokens
_TEXTS = 64
_COLUMNS = (
    "method",
    "expected_tokens_per_call",
    "tokens_per_call",
    "first_accepted",
    "joint_nll",
    "head_parameters",
)


def run(folder: pathlib.Path) -> dict[str, Any]:
    """Runs the whole demo in `folder` and prints its table; returns what the table was made from.

    A second run in the same folder goes on from what is there.

    Raises:
      RunError: greedy decoding with heads differs from plain decoding, or training broke.
    """
    began = time.monotonic()
    config = freeze(presets.get_config("demo").to_dict(), CpConfig)
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, eval_conversations=_TEXTS)
    )
    workdir = Workdir(folder)
    workdir.create(config)
    workdir.record(config)
    say("1/4 trunk: a small model of embedded arithmetic")
    trunk = folder / "trunk"
    training.run(_of(config, "trunk"), Workdir(trunk))
    say(f"2/4 heads for {config.head.predicted} tokens on it, which stays as it is")
    paths = {name: folder / name for name in HEADS}
    for name, (rank, transition) in HEADS.items():
        head = dataclasses.replace(config.head, rank=rank, transition=transition)
        own = dataclasses.replace(_of(config, "heads"), head=head, init_from=str(trunk))
        training.run(own, Workdir(paths[name]))
    say("3/4 evaluate: what each would accept, from teacher forcing alone")
    options = evaluate.Options(prompt_tokens=_PROMPT, batch_size=_TEXTS)
    rows = evaluate.run(config, [*paths.values()], options)["rows"]
    rows = [row for row in rows if row["n"] == config.head.predicted]
    say("4/4 decode: the same greedy text, in fewer trunk calls")
    best = max(rows, key=lambda row: row["expected_tokens_per_call"])
    best["tokens_per_call"] = _decoded(pathlib.Path(best["checkpoint"]), config)
    for row in rows:
        row["first_accepted"] = row["acceptance"][0]
        workdir.append("eval.jsonl", row)
    figures.save(figures.draw(rows), folder / "plots")
    print(tables.text(tables.table(rows, columns=_COLUMNS)))
    print(f"Greedy text of {best['method']} equals plain decoding, token by token.")
    return {"seconds": time.monotonic() - began, "rows": rows}


def _of(config: CpConfig, mode: str) -> CpConfig:
    """The config of the trunk or of the heads; these take the trunk's tokenizer."""
    steps = _STEPS[mode]
    fields = {
        "loss": dataclasses.replace(config.loss, mode=mode, fraction=0.5),
        "train": dataclasses.replace(config.train, steps=steps, checkpoint_every=steps),
    }
    if mode == "heads":
        fields["data"] = dataclasses.replace(config.data, tokenizer="auto")
    return dataclasses.replace(config, **fields)


def _decoded(path: pathlib.Path, config: CpConfig) -> float:
    """Measured tokens per call of greedy decoding. Raises RunError when the text is another."""
    loaded = checkpoints.load(path)
    params = generate.prepare(loaded.model, loaded.params)
    sampling = dataclasses.replace(config.sampling, temperature=0.0)
    texts = prompts.held_out(loaded.setup, _PROMPT)
    stop_ids = loaded.setup.tokenizer.stop_ids
    key = jax.random.key(0)
    target = drafters.Target(loaded.model, sampling, valid_vocab=loaded.setup.valid_vocab)
    drafted, counted = decode.decode(
        target, params, drafters.Heads(loaded.head_config), loaded.head, texts, stop_ids, key
    )
    plain = generate.generate(
        loaded.model, params, texts, sampling, stop_ids, key, valid_vocab=loaded.setup.valid_vocab
    )
    for own, other in zip(drafted, plain, strict=True):
        if not np.array_equal(own.tokens, other.tokens):
            raise RunError(f"{path.name}: greedy text differs from plain decoding")
    return counted.summary()["tokens_per_call"]
