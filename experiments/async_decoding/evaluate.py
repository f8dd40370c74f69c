# SPDX-License-Identifier: Apache-2.0
r"""Quality and speed of trained runs on held-out questions, beside the sequential baseline.

    python -m experiments.async_decoding.evaluate --config=configs/async_decoding.py:smoke \
        --checkpoint=DIR[,DIR...] [--baseline=DIR] [--data=FILE] [--compose=spec_kv:128 --draft=DIR]

Each DIR is a workdir of `train`, of any form or stage; what preference optimisation left is
measured after its last round. The baseline is --baseline, or the first DIR of form plain. FILE
holds prompts (AlpacaEval's JSON list, JSONL with an instruction, conversations): --scorer=token_f1
or rouge_l compare with its references, requests is exact and for the embedded data. Answers are
decoded one at a time, twice, for times without compilation; --batch_size above 1 gives no speed-up
on the wall. What was answered before is not answered again.

--compose puts the decoder together with another method, under the names and flags of `benchmark`:
what it costs in quality, and saves. Checkpoints of forms that this decoder does not write, such as
the baseline, answer as ever.

--judge=endpoint (with --url, --model, ...) or --judge=DIR (a Hugging Face directory or a workdir)
adds win rates over the baseline, plain and length-controlled. --judgements=FILE,... reads files of
AlpacaEval's annotations and adds their rates, nothing else needed; --difficulty=FILE, a JSON object
from instructions to numbers, brings that term of the length-controlled rate. --export=FILE writes
the answers as AlpacaEval's list of outputs.

The last line is {"rows": [{"method": ..., "lambda": x | "inf" | null, "quality": x,
"speedup_critical_path": x, "speedup_wall": x, ...}, ...]}; rows go to eval.jsonl of each DIR. Exit
status 1 when a --require does not hold for the last row.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any

from absl import flags

from experiments import cli, compositions, gate
from experiments.async_decoding import compose_flags, endpoint_flags
from lm import prompting, setup
from lm.async_decoding import composed, evaluate, judge, quality, runs, samplers
from lm.async_decoding import compositions as names
from lm.async_decoding.compositions import NONE
from lm.async_decoding.config import AsyncConfig
from lm.async_decoding.decode import Pieces
from lm.async_decoding.endpoint import Endpoint
from lm.async_decoding.runs import Run
from lm.errors import UserError
from lm.transformer import Params

NAMES = ("quality", "quality_difference", "speedup_critical_path", "speedup_wall", "realised")

cli.define_config(required=False)
REQUIRE = gate.define(NAMES)
CHECKPOINT = flags.DEFINE_list("checkpoint", [], "workdirs of runs")
BASELINE = flags.DEFINE_string("baseline", None, "workdir of a sequential run")
SCORER = flags.DEFINE_enum("scorer", "requests", list(quality.SCORERS), "what quality is")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 1, "questions at once")
THREADS = flags.DEFINE_integer("threads", 8, "blocks that are written at once")
SEED = flags.DEFINE_integer("seed", 0, "of what is drawn")
COMPOSE = flags.DEFINE_string("compose", NONE, compose_flags.NAMES)
compose_flags.define()
JUDGE = flags.DEFINE_string("judge", "", "endpoint, or a directory with a model")
REPLIES = flags.DEFINE_string("replies", "judge.jsonl", "where an endpoint's judgements are kept")
JUDGEMENTS = flags.DEFINE_list("judgements", [], "files of AlpacaEval's annotations")
DIFFICULTY = flags.DEFINE_string("difficulty", None, "of --judgements: difficulties of requests")
EXPORT = flags.DEFINE_string("export", None, "file for the answers, as AlpacaEval reads them")
endpoint_flags.define()


def main() -> dict[str, Any]:
    requirements = gate.parse(REQUIRE.value, NAMES)
    if DIFFICULTY.value is not None and not JUDGEMENTS.value:
        raise UserError("--difficulty is of --judgements")
    rows = [_judged(path) for path in JUDGEMENTS.value]
    if not CHECKPOINT.value and not rows:
        raise UserError("give --checkpoint or --judgements")
    if JUDGE.value and not CHECKPOINT.value:
        raise UserError("--judge needs --checkpoint")
    if CHECKPOINT.value:
        rows += _measured(list(map(pathlib.Path, CHECKPOINT.value)))
    elif EXPORT.value:
        raise UserError("--export needs --checkpoint")
    for one in requirements:
        if rows[-1].get(one.name) is None:
            raise UserError(f"--require={one}: no result has a {one.name}")
    failed = gate.failures(requirements, rows[-1])
    result = {"rows": rows}
    if failed:
        raise cli.CheckFailed(result, "; ".join(failed))
    return result


def _measured(paths: list[pathlib.Path]) -> list[dict[str, Any]]:
    if cli.FLAGS.config is None:
        raise UserError("--checkpoint needs --config")
    config = cli.config(AsyncConfig).run()
    parts = compose_flags.parts([COMPOSE.value])
    options = evaluate.Options(
        scorer=SCORER.value,
        batch_size=BATCH_SIZE.value,
        threads=THREADS.value,
        seed=SEED.value,
        compose=COMPOSE.value,
        compose_parts=json.dumps([repr(parts), _weights(parts.draft), _weights(parts.heads)]),
        judge=_judge(),
        judge_name=JUDGE.value if JUDGE.value != "endpoint" else str(cli.FLAGS.model),
        judge_parts=_weights(JUDGE.value) or str(cli.FLAGS.url),
    )
    baseline = pathlib.Path(BASELINE.value) if BASELINE.value else None
    pieces = None if COMPOSE.value == NONE else functools.partial(_pieces, parts)
    make = samplers.decoder(config, THREADS.value, BATCH_SIZE.value, pieces)
    rows = evaluate.run(config, paths, make, options, baseline)["rows"]
    if EXPORT.value:
        evaluate.export(list(dict.fromkeys(paths)), rows, pathlib.Path(EXPORT.value))
    return rows


def _weights(path: str) -> list[tuple[str, int, int]]:
    """What tells the weights of a directory from others that stood there before."""
    found = [one for one in pathlib.Path(path).rglob("*") if one.is_file()] if path else []
    return sorted(
        (str(one.relative_to(path)), one.stat().st_size, one.stat().st_mtime_ns)
        for one in found
        if one.suffix == ".safetensors" or "checkpoints" in one.parts
    )


def _pieces(parts: compositions.Parts, run: Run, params: Params) -> Pieces:
    """The decoder put together with what --compose names, for a model."""
    makers = compositions.makers(prompting.of_run(run.setup, params), parts)
    return composed.pieces(*names.build(COMPOSE.value, makers))


def _judge() -> judge.Judge | None:
    if JUDGE.value == "endpoint":
        return judge.by_endpoint(Endpoint(endpoint_flags.config(), REPLIES.value))
    endpoint_flags.refuse("--judge=endpoint")
    if not JUDGE.value:
        return None
    path = pathlib.Path(JUDGE.value)
    if setup.is_hf(path):
        return judge.by_checkpoint(prompting.load_hf(path))
    # after preference optimisation the weights are those of a round
    return judge.by_checkpoint(prompting.load_workdir(runs.newest(path)))


def _judged(path: str) -> dict[str, Any]:
    """The row of a file of judgements."""
    file = DIFFICULTY.value
    difficulties = None if file is None else judge.read_difficulties(file)
    judged = judge.read_judgements(path, difficulties)
    rate = dataclasses.asdict(judge.length_controlled(judged))
    return {"kind": "judgements", "method": pathlib.Path(path).stem, "file": path, **rate}


if __name__ == "__main__":
    cli.run(main)
