# SPDX-License-Identifier: Apache-2.0
"""The TPU kernels of linear_log_prob: numbers in Pallas' simulation of a TPU, with its checks on,
and compilation by the real TPU compiler, which accepts other programs than the simulation does."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as simulation
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lm.benchmarks import linear_log_prob_check as check
from ops import _linear_log_prob_tpu as tpu
from ops import _linear_log_prob_xla as chunks
from ops import dispatch
from ops.linear_log_prob import linear_log_prob
from pallas_kernels import linear_log_prob_tpu as kernels
from pallas_kernels import tpu_interpret
from pallas_kernels.linear_log_prob_tpu import BlockSizes
from tests.ops.op_cases import arrays, jit
from tests.ops.op_tolerances import assert_close
from tests.ops.test_linear_log_prob import problem, value_and_gradients

# Read when the TPU compiler is loaded: ask no metadata server who we are, and do not take the lock
# that lets only one process use a TPU, since no process does and another test worker may compile.
os.environ.update(
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_WORKER_ID="0",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
)

CHECKED = pltpu.InterpretParams(
    detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan"
)


@pytest.fixture
def checked(monkeypatch):
    """Small blocks in the simulation; a race fails the test."""
    monkeypatch.setattr(tpu, "block_sizes", lambda *arguments: BlockSizes(128, 256, 128))
    with tpu_interpret.simulated(CHECKED):
        yield
    assert simulation.races is not None
    assert not simulation.races.races_found
    pltpu.reset_tpu_interpret_mode_state()


def compare(arguments, softcap=None, valid_vocab=None):
    expected = value_and_gradients("reference", softcap, valid_vocab, None, *arguments)
    actual = value_and_gradients("pallas_tpu", softcap, valid_vocab, None, *arguments)
    assert [x.dtype for x in jax.tree.leaves(actual)] == [
        x.dtype for x in jax.tree.leaves(expected)
    ]
    assert_close(actual, expected, arguments[0].dtype)


def test_ragged_blocks_and_settings(checked):
    """Rows and columns that fill no block, and one that is excluded."""
    compare(problem(150, 128, 520), 3.0, 519)


def test_bfloat16_within_what_rounding_allows(checked):
    case = dataclasses.replace(check.SMALL_CASES[0], dim=128, softcap=None)
    rows = list(check.sweep(("pallas_tpu",), ("bfloat16",), (case,)))
    assert len(rows) == 2
    assert all(row["passed"] for row in rows), rows


def test_blocks_of_padding_are_not_visited(monkeypatch):
    """Rows full of NaN leave no trace where they fill blocks; for dw these are no steps at all.
    Nothing but padding gives zeros everywhere."""
    monkeypatch.setattr(tpu, "block_sizes", lambda *arguments: BlockSizes(128, 256, 128))
    steps = []

    def record(token, point, core):
        steps.append(tuple(int(x) for x in point))
        return token

    x, w, targets, weights = problem(384, 128, 512)
    targets = targets.at[:256].set(-1)
    x = x.at[:256].set(jnp.nan)

    @jit
    def both(x, w, targets):
        def loss(x, w):
            return linear_log_prob(x, w, targets, weights, implementation="pallas_tpu")[0]

        return jax.value_and_grad(loss, (0, 1))(x, w)

    with tpu_interpret.simulated(dataclasses.replace(CHECKED, grid_point_recorder=record)):
        results = both(x, w, targets)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(results))
        assert len(steps) == 3 * 2 + 2 * 1
        nothing = both(jnp.nan_to_num(x), w, jnp.full_like(targets, -1))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(nothing))


@pytest.mark.parametrize("first", [300, 600])
def test_shards_of_the_vocabulary(first, checked):
    """What one device computes of rows whose targets lie on any device; the last shard has no valid
    column at all, the one before lacks a block of them."""
    x, w, targets, _ = problem(130, 128, 300)
    targets = jnp.where(targets < 0, targets, 37 * targets % 900)
    first = jnp.int32(first)
    cotangents = [jnp.where(targets < 0, 0.0, c) for c in arrays(1, (130,), (130,))]

    def both(terms, settings):
        def finite(x, w):
            lse, chosen = terms(x, w, targets, first, settings)
            total = sum(
                jnp.sum(jnp.where(v > -jnp.inf, c * v, 0.0))
                for c, v in zip(cotangents, (lse, chosen), strict=True)
            )
            kept = [jnp.where(targets < 0, 0.0, values) for values in (lse, chosen)]
            return total, kept

        return jit(jax.value_and_grad(finite, (0, 1), has_aux=True))(x, w)

    expected = both(chunks._terms, chunks.Settings(130, chunks._XlaPasses(3.0, 500)))
    call = tpu._Call(3.0, 500, BlockSizes(128, 256, 128), 1 << 20, CHECKED)
    assert_close(both(tpu._terms, call), expected, "float32")


def test_a_frozen_argument_costs_no_product():
    x, w, targets, _ = problem(130, 128, 300)

    def kernels_of(*asked):
        def loss(x, w):
            return jnp.sum(linear_log_prob(x, w, targets, implementation="pallas_tpu"))

        with dispatch.target_platform("tpu"):
            text = str(jax.make_jaxpr(jax.grad(loss, asked) if asked else loss)(x, w))
        return text.count("name=linear_log_prob_forward"), text.count(
            "name=linear_log_prob_gradient"
        )

    assert kernels_of() == kernels_of(0) == (1, 0)
    assert kernels_of(1) == kernels_of(0, 1) == (1, 1)


@pytest.mark.parametrize(
    ("shape", "dtypes", "reason"),
    [
        ((8, 40), ("float32",) * 2, "40 columns of x; multiples of 128 are served"),
        ((8, 128), ("float16",) * 2, "types float16 and float16; one of bfloat16 and"),
        ((8, 128), ("float32", "bfloat16"), "types float32 and bfloat16; one of"),
        ((8, 1 << 16), ("float32",) * 2, "a tile of 65536 columns does not fit 48 MiB"),
    ],
)
def test_what_is_not_served_is_refused(shape, dtypes, reason):
    x, w = (jax.ShapeDtypeStruct(shape, dtype) for dtype in dtypes)
    targets = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
    with dispatch.target_platform("tpu"), pytest.raises(dispatch.Unsupported, match=reason):
        jax.eval_shape(lambda *a: linear_log_prob(*a, implementation="pallas_tpu"), x, w, targets)


def test_other_platforms_are_refused():
    x, w, targets, _ = problem(8, 128, 30)
    with pytest.raises(dispatch.Unsupported, match=r"^pallas_tpu: runs on TPU \(here: cpu\)"):
        linear_log_prob(x, w, targets, implementation="pallas_tpu")


def test_block_sizes():
    """As large as memory allows, cut into nearly equal blocks of rows."""
    for D, itemsize, mib in ((1024, 2, 48), (2048, 2, 48), (4096, 4, 48), (8192, 2, 96)):
        blocks = kernels.block_sizes(32768, D, 128256, itemsize, mib << 20)
        assert blocks.vmem_bytes(D, itemsize) <= mib << 20
        larger = dataclasses.replace(blocks, rows=2 * blocks.rows, columns=2 * blocks.columns)
        assert blocks.rows == 1024 or larger.vmem_bytes(D, itemsize) > mib << 20
    assert kernels.block_sizes(32768, 2048, 128256, 2, 48 << 20) == BlockSizes(1024, 512, 256)
    assert kernels.block_sizes(1100, 128, 300, 2, 48 << 20) == BlockSizes(640, 384, 128)
    with pytest.raises(ValueError, match="multiples of 128"):
        BlockSizes(100, 512, 256)


def compiled(topology, R, D, V, dtype="bfloat16", **settings):
    """Bytes of temporaries of one device of a 2x2 topology that has R rows and all of w."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    number = len(devices)
    mesh = jax.make_mesh((number,), ("data",), axis_types=(AxisType.Auto,), devices=devices)

    def shape(spec, *dims, dtype=dtype):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, spec))

    def gradients(x, w, targets, weights):
        def loss(x, w):
            return linear_log_prob(x, w, targets, weights, **settings)[0]

        value, (dx, dw) = jax.value_and_grad(loss, (0, 1))(x, w)
        return value[None], dx, dw[None]

    rows, whole = P("data"), P()
    specs = (rows, whole, rows, rows)
    # the gradient of each device's rows alone: what is measured is one device's kernels
    split = jax.shard_map(gradients, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)
    R *= number
    arguments = (
        shape(rows, R, D),
        shape(whole, V, D),
        shape(rows, R, dtype="int32"),
        shape(rows, R, dtype="float32"),
    )
    with dispatch.target_platform("tpu"):
        program = jax.jit(split).lower(*arguments).compile()
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == 2
    return program.memory_analysis().temp_size_in_bytes


TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_compiles_for_tpu(topology):
    """Small blocks, so that three of them compile quickly; every setting, and no block is full."""
    dtype = "float32" if topology.startswith("v5p") else "bfloat16"
    settings = {"softcap": 30.0, "valid_vocab": 900} if dtype == "float32" else {}
    compiled(topology, 200, 256, 1003, dtype, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("D", [2048, 4096])
def test_real_sizes_compile(topology, D):
    """Beside arguments and results, arrays of the size of x; the logits would take 128 of them."""
    assert compiled(topology, 8192, D, 128256) < 3 * 8192 * D * 2
