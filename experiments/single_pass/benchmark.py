# SPDX-License-Identifier: Apache-2.0
r"""Step time, throughput, peak memory and model FLOPs per mode: same data, model and device, in one
run.

    python -m experiments.single_pass.benchmark --config=configs/single_pass.py:smoke \
        --modes=tree,n_pass

Steps of the modes alternate and medians are compared. --synthetic=8:100,300,100 takes random
conversations of 8 turns with 100 human, 300 thought and 100 response tokens instead of the config's
data. `speedup` is conversations per second of the first mode over the last, `flop_ratio` the same
of model FLOPs per conversation, padding of both counted. The last line is {"rows": [{"mode": ...,
"step_ms": x, "conversations_per_s": x, "peak_bytes": n, "flops": x, ...}, ...], "speedup": x,
"flop_ratio": x, ...}.
"""

from absl import flags

from experiments import cli
from lm import setup
from lm.single_pass import benchmark, pipeline
from lm.workdir import Workdir

cli.define_config()
MODES = flags.DEFINE_list("modes", ["tree", "n_pass"], "first is compared with last")
REPEATS = flags.DEFINE_integer("repeats", 10, "timed steps per mode", lower_bound=1)
SYNTHETIC = flags.DEFINE_string("synthetic", None, "TURNS:HUMAN,THOUGHT,RESPONSE in tokens")
CONVERSATIONS = flags.DEFINE_integer("conversations", 64, "how many to pack", lower_bound=1)
WORKDIR = flags.DEFINE_string("workdir", None, "also append the rows to benchmark.jsonl there")
PRICE = flags.DEFINE_float("chip_price", None, "per chip-hour: adds cost per million conversations")


def main() -> dict[str, object]:
    config = cli.config()
    resolved = setup.resolve(config)
    if SYNTHETIC.value:
        groups = benchmark.synthetic(
            SYNTHETIC.value, CONVERSATIONS.value, resolved.valid_vocab or resolved.model.vocab_size
        )
    else:
        source = setup.conversations(config.data)
        count = min(len(source), CONVERSATIONS.value)
        groups = [pipeline.samples_of(resolved, source[index]) for index in range(count)]
    result = benchmark.benchmark(resolved, groups, MODES.value, REPEATS.value)
    if PRICE.value is not None:
        benchmark.add_cost(result, PRICE.value)
    if WORKDIR.value:
        workdir = Workdir(WORKDIR.value)
        workdir.create(config)
        for row in result["rows"]:
            row = {"kind": "benchmark", "method": row["mode"], "seed": config.train.seed, **row}
            workdir.append("benchmark.jsonl", row)
    return result


if __name__ == "__main__":
    cli.run(main)
