# SPDX-License-Identifier: Apache-2.0
"""The single-pass demo on the embedded arithmetic: plan, verify, benchmark, compare, report."""

import dataclasses
import json
import pathlib
import time
from typing import Any

import jax

from configs import single_pass as presets
from lm import report, report_rows, setup, tables
from lm.config import Config, freeze
from lm.errors import RunError
from lm.progress import Progress, say
from lm.single_pass import benchmark, compare, inspection, layouts, pipeline, plan, verify
from lm.workdir import Workdir

MODES = ("tree", "n_pass")
_VERIFIED = 3  # conversations
_TIMED = 200


def run(folder: pathlib.Path) -> dict[str, Any]:
    """Runs the whole demo in `folder` and prints its table; returns what the table was made from.

    A second run in the same folder goes on from what is there.

    Raises:
      RunError: the tree does not train what the N passes train, or training broke.
    """
    began = time.monotonic()
    config = freeze(presets.get_config("demo").to_dict())
    workdir = Workdir(folder)
    workdir.create(config)
    workdir.record(config)
    say("1/5 plan: what each mode costs, from counts alone")
    _plan(config, workdir)
    say(f"2/5 verify: {_VERIFIED} conversations, losses and gradients of tree against n_pass")
    checked = _verify(config, workdir)
    say(f"3/5 benchmark: steps of the modes in turn, {_TIMED} conversations")
    _benchmark(config, workdir)
    say("4/5 compare: train each mode on the same data, then let it hold unseen conversations")
    # a gradient near zero at the end of training says nothing about noise: leave that out
    rows = compare.compare(config, workdir, compare.Options(MODES, noise=False))
    say("5/5 report")
    made = report.write([folder])
    report.save_figures(made, folder)
    _print(folder)
    return {"seconds": time.monotonic() - began, "verify": checked, "rows": rows}


def _plan(config: Config, workdir: Workdir) -> None:
    resolved = setup.resolve(config, workdir.path / "tokenizer")
    source = setup.conversations(config.data)
    with Progress("plan", len(source)) as progress:

        def conversations():
            for index in range(len(source)):
                yield pipeline.samples_of(resolved, source[index])
                progress.advance()

        result = plan.plan(
            conversations(),
            resolved.model,
            seq_len=config.data.seq_len,
            window=config.data.window,
            rows_per_chip=config.train.batch_size,
        )
    workdir.write("plan.json", json.dumps(result, indent=2) + "\n")
    shown = pipeline.samples_of(resolved, source[0])
    (tree,), _ = layouts.layouts_of(shown, "tree")
    inspection.save_picture(tree, workdir.path / "plots" / "mask.png", "one conversation as a tree")


def _verify(config: Config, workdir: Workdir) -> dict[str, Any]:
    resolved = setup.resolve(config, workdir.path / "tokenizer")
    source = setup.conversations(config.data, "validation")
    with jax.default_matmul_precision("highest"):
        params = setup.initial_params(resolved)
        findings = verify.verify(resolved, params, [source[i] for i in range(_VERIFIED)])
    problems = findings.problems(verify.TOLERANCES[resolved.model.dtype])
    if problems:
        raise RunError(f"verify: {'; '.join(problems)}")
    found = dataclasses.asdict(findings)
    workdir.append("eval.jsonl", {"kind": "verify", "method": "tree", **found})
    say(
        f"verified {findings.edges} trained tokens: losses within {findings.max_abs_loss:.1e} nats,"
        f" gradients within {findings.max_rel_grad:.1e} of their largest"
    )
    return found


def _benchmark(config: Config, workdir: Workdir) -> None:
    resolved = setup.resolve(config, workdir.path / "tokenizer")
    source = setup.conversations(config.data)
    groups = [pipeline.samples_of(resolved, source[i]) for i in range(_TIMED)]
    for row in benchmark.benchmark(resolved, groups, MODES)["rows"]:
        row = {"kind": "benchmark", "method": row["mode"], "seed": config.train.seed, **row}
        workdir.append("benchmark.jsonl", row)


def _print(folder: pathlib.Path) -> None:
    measured = report.compared(report_rows.gather([folder])[0])
    print(tables.text(tables.comparison(measured)))
    for line in report.verdict(measured):
        print(line)
