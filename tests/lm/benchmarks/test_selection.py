# SPDX-License-Identifier: Apache-2.0
"""What the token selection benchmark times: stages that compute what they say, in loops that keep
every turn; whole steps compiled for a GPU that is not here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.benchmarks import loops, selection, selection_problem, selection_stages
from lm.benchmarks.attention_problem import Heads
from lm.errors import UserError
from lm.token_select.config import SelectConfig
from tests import gpu_target
from tests.ops.op_cases import jit

HEADS = Heads(4, 2, 8)
CONFIG = SelectConfig(n_init=4, n_local=16, k=32, chunk=8)


def problem(mode="decode", heads=HEADS, config=CONFIG, tokens=300, dtype="float32"):
    return selection_problem.make(mode, tokens, heads, config, dtype)


def run(problem, stage):
    given = problem.small, selection_problem.large(problem)
    return jit(selection_stages.ours(problem, "xla")[stage].run)(*given)


def test_a_step_reads_first_best_and_last_tokens():
    case = problem()
    slots, counts = run(case, "select")
    q, k = (np.asarray(x, np.float64) for x in (case.small["query"][0], case.buffers.k[0, 0]))
    products = np.einsum("kgh,skh->kgs", q.reshape(2, 2, 8), k[4:284])
    weights = np.exp(products - products.max(-1, keepdims=True))
    votes = (weights / weights.sum(-1, keepdims=True)).sum((0, 1))
    best = np.sort(np.argsort(-votes)[:32]) + 4
    assert counts[0] == 52
    np.testing.assert_array_equal(slots[0], [*range(4), *best, *range(284, 300)])
    plain = selection_stages.published(case)["select"].run
    given = case.small, selection_problem.large(case)
    np.testing.assert_array_equal(jit(plain)(*given), best)


def test_loops_run_every_turn_and_change_nothing():
    """Counts turns on the host, with the input that each saw."""
    seen = []

    def stage(small, large):
        jax.debug.callback(lambda x, n: seen.append((float(x[0]), int(n))), small["x"], small["n"])
        return large * small["x"], small["n"]

    small = {"x": jnp.array([1.5, 0.0]), "n": jnp.int32(7)}
    compiled = loops.lower(stage, small, jnp.float32(3.0), 5).compile()
    out = compiled(small, jnp.float32(3.0))
    jax.effects_barrier()
    assert seen == [(1.5, 7)] * 5
    assert out["x"][0] == 1.5
    assert out["n"] == 7


def test_names_and_lengths_that_do_not_exist():
    for change, reason in (
        ({"modes": ["prefill"]}, "mode 'prefill'"),
        ({"shadows": ["int4"]}, "shadow 'int4'"),
        ({"contenders": ["mosaic"]}, "contender 'mosaic'"),
        ({"tokens": [2688]}, "selection of 2688 needs more"),
    ):
        with pytest.raises(UserError, match=reason):
            selection.Plan(**change).check()


@pytest.mark.skipif(bool(gpu_target.missing()), reason=f"not installed: {gpu_target.missing()}")
@pytest.mark.parametrize(("mode", "shadow"), [("decode", "int8"), ("chunk", "")])
def test_whole_steps_compile_for_an_h100(mode, shadow):
    """As the benchmark times them, selection's own code included; every kernel by Triton."""
    config = SelectConfig(n_init=4, n_local=128, k=300, chunk=128)
    case = problem(mode, Heads(8, 2, 64), config, 20_000, "bfloat16").with_shadow(shadow)
    stages = selection_stages.ours(case, "triton")
    given = case.small, selection_problem.large(case)
    small, large = jax.tree.map(lambda x: gpu_target.abstract("H100", x.shape, x.dtype), given)
    with gpu_target.target("H100"):
        program = gpu_target.triton_kernels(loops.lower(stages["step"].run, small, large, 3))
    names = {kernel.name for kernel in program}
    assert {"scan", "normalizer", "vote", "count", "tally", "write", "attend"} <= names
    assert not [kernel for kernel in program if kernel.spilled]
