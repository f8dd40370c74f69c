# SPDX-License-Identifier: Apache-2.0
"""The Hopper attention kernels: what is refused, that they compile for an H100 without one, and
that the lists and vectors which they walk say exactly what the mask says.

Their arithmetic runs nowhere but on the device: tests/ops/test_masked_attention_masks.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ops import _block_lists, dispatch
from ops import _masked_attention_mosaic as op
from ops import block_table as block_tables
from ops.masked_attention import masked_attention
from ops.visibility import Visibility
from pallas_kernels import masked_attention_mosaic_config as configs
from pallas_kernels import mosaic
from pallas_kernels.masked_attention_mosaic_backward import KIND_BITS
from tests import gpu_target
from tests.ops import op_cases

gpu_target.require()
UNIT = mosaic.UNIT
LENGTH = 200  # of rows and keys: the last block is ragged


def shapes(T=64, S=64, N=2, K=1, H=64, dtype="bfloat16"):
    return [
        jax.ShapeDtypeStruct(shape, dtype) for shape in ((1, T, N, H), (1, S, K, H), (1, S, K, H))
    ]


def attend(q, k, v):
    return masked_attention(q, k, v, Visibility.causal(1, k.shape[1]), implementation="mosaic_gpu")


@pytest.mark.parametrize(
    ("arguments", "chip", "reason"),
    [
        ({}, None, "runs on Hopper GPUs (here: cpu)"),
        ({}, "A100", "compute capability 80; 90 is served"),
        ({"H": 96}, "H100", "head dim 96; 64, 128 and 256 are served"),
        ({"dtype": "float32"}, "H100", "float32"),
    ],
)
def test_what_is_not_served_is_refused_with_the_reason(arguments, chip, reason):
    def run():
        with pytest.raises(dispatch.Unsupported, match="mosaic_gpu: ") as refusal:
            jax.eval_shape(attend, *shapes(**arguments))
        assert reason in str(refusal.value)

    if chip is None:
        run()
    else:
        with gpu_target.target(chip):
            run()


def test_hopper_takes_mosaic_first_and_what_it_refuses_goes_to_triton():
    def chosen(**arguments):
        with gpu_target.target("H100"):
            text = jax.jit(lambda q, k, v: masked_attention(q, k, v, Visibility.causal(1, 64)))
            return text.trace(*shapes(**arguments)).jaxpr.pretty_print()

    assert "layout_cast" in chosen()
    assert "layout_cast" not in (text := chosen(dtype="float32"))
    assert "triton_kernel_call" in text


CALLS = {
    "head dim 64, one query head a key head": (200, 200, 2, 2, 64, False),
    "head dim 128, groups of 4, hidden runs": (200, 331, 8, 2, 128, True),
    "head dim 256, groups of 2": (128, 128, 4, 2, 256, False),
}
SPILLED = {64: 64, 128: 640, 256: 4600}  # bytes a thread over all passes, at most


@pytest.fixture(scope="module", params=list(CALLS))
def compiled(request):
    """Forward and backward for an H100."""
    T, S, N, K, H, hidden = CALLS[request.param]

    def gradients(q, k, v, d_out, d_lse, until, runs, row_offset):
        mask = Visibility(until, *runs, row_offset)

        def attend(q, k, v):
            return masked_attention(q, k, v, mask, return_lse=True, implementation="mosaic_gpu")

        outputs, pullback = jax.vjp(attend, q, k, v)
        return outputs, pullback((d_out, d_lse))

    with gpu_target.target("H100"):
        query, key = (2, T, N, H), (2, S, K, H)
        q, k, d_lse, until, offset = (
            gpu_target.abstract("H100", shape, dtype)
            for shape, dtype in (
                (query, "bfloat16"),
                (key, "bfloat16"),
                (query[:3], "float32"),
                (key[:2], "int32"),
                ((2,), "int32"),
            )
        )
        runs = (until, until) if hidden else (None, None)
        program = gpu_target.compile(jax.jit(gradients), q, k, k, q, d_lse, until, runs, offset)
    return H, program


def test_forward_and_backward_compile_for_an_h100(compiled):
    head_dim, program = compiled
    kernels = [kernel for kernel in program.kernels if "mosaic" in kernel.name]
    passes = 2 + len(configs.PLANS[head_dim].dk_dv_calls)
    assert len(kernels) == passes
    assert sum(kernel.spilled for kernel in kernels) <= SPILLED[head_dim]


def test_memory_grows_with_the_length_alone():
    """At 32k, beside arguments and results: no more than a few times q, and far from T x S."""

    def attend(q, k, v, until):
        return masked_attention(q, k, v, Visibility(until), implementation="mosaic_gpu")

    with gpu_target.target("H100"):
        q, k, until = (
            gpu_target.abstract("H100", shape, dtype)
            for shape, dtype in (
                ((1, 32768, 8, 128), "bfloat16"),
                ((1, 32768, 2, 128), "bfloat16"),
                ((1, 32768), "int32"),
            )
        )
        program = gpu_target.compile(jax.jit(attend), q, k, k, until)
    assert program.memory.temp_size_in_bytes < 8 * 32768 * 128 * 2 / 8


def test_heads_and_sequences_are_split_over_gpus():
    """Under jax.shard_map, whose types the block lists must have as well."""
    types = (AxisType.Auto,) * 2
    gpus = np.array(gpu_target.devices("H100", 4)).reshape(2, 2)
    mesh = Mesh(gpus, ("data", "tensor"), axis_types=types)
    split, whole = PartitionSpec("data", None, "tensor"), PartitionSpec("data")

    def attend(q, k, v, until):
        return masked_attention(q, k, v, Visibility(until), implementation="mosaic_gpu")

    def placed(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    mapped = jax.shard_map(attend, mesh=mesh, in_specs=(split,) * 3 + (whole,), out_specs=split)
    with gpu_target.target("H100"):
        q, k = (placed((4, 128, N, 64), "bfloat16", split) for N in (8, 4))
        program = gpu_target.compile(jax.jit(mapped), q, k, k, placed((4, 128), "int32", whole))
    assert [kernel for kernel in program.kernels if "mosaic" in kernel.name]


def from_vectors(vectors, rows, keys):
    """[rows, keys] as the kernels test it: unsigned comparisons against the padded vectors."""
    vectors = np.asarray(vectors)[:, keys]
    with np.errstate(over="ignore"):
        sees = np.uint32(rows[:, None] - keys[None]) < np.uint32(vectors[0])[None]
        if len(vectors) == 3:
            sees &= np.uint32(rows[:, None] - vectors[1][None]) >= np.uint32(vectors[2])[None]
    return sees


MASKED = [op_cases.visibility(name, 3, LENGTH, seed) for seed, name in enumerate(op_cases.MASKS)]


@pytest.mark.parametrize("mask", MASKED, ids=op_cases.MASKS)
@pytest.mark.parametrize("group", [1, 2])
def test_tiles_of_queries_meet_exactly_the_visible_keys(mask, group):
    rows, units = mosaic.tile_rows(group), 2
    q = jax.ShapeDtypeStruct((3, LENGTH, group, 64), "bfloat16")
    k = jax.ShapeDtypeStruct((3, LENGTH, 1, 64), "bfloat16")
    counts, blocks = (np.asarray(x) for x in op._query_tiles(mask, q, k, units))
    vectors = np.asarray(op._vectors(mask))
    dense, seen = op_cases.dense(mask, LENGTH), np.zeros((3, LENGTH + 128, LENGTH + 128), bool)
    for b in range(3):
        for tile in range(counts.shape[1]):
            full, needed = counts[b, tile]
            at = np.arange(tile * rows, (tile + 1) * rows)
            for place in range(-(-needed // units) * units):
                keys = blocks[b, tile, place] * UNIT + np.arange(UNIT)
                unmasked = place < full // units * units
                part = True if unmasked else from_vectors(vectors[b], at, keys)
                block = np.ix_(at, keys)
                assert not (seen[b][block] & part).any()
                seen[b][block] |= part
    np.testing.assert_array_equal(seen[:, :LENGTH, :LENGTH], dense)
    assert not seen[:, :, LENGTH:].any()


@pytest.mark.parametrize("mask", MASKED, ids=op_cases.MASKS)
def test_tiles_of_keys_meet_exactly_the_rows_that_see_them(mask):
    q = jax.ShapeDtypeStruct((3, LENGTH, 2, 64), "bfloat16")
    order, counts, entries = (np.asarray(x) for x in op._key_tiles(mask, q))
    vectors = np.asarray(op._vectors(mask))
    dense, seen = op_cases.dense(mask, LENGTH), np.zeros((3, LENGTH + 128, LENGTH + 128), bool)
    for b in range(3):
        assert sorted(order[b]) == list(range(len(order[b])))
        for tile in range(counts.shape[1]):
            full, needed = counts[b, tile]
            for place, entry in enumerate(entries[b, tile, :needed]):
                at = (entry >> (2 * KIND_BITS)) * UNIT + np.arange(UNIT)
                for half in range(2):
                    keys = order[b, 2 * tile + half] * UNIT + np.arange(UNIT)
                    kind = (entry >> (half * KIND_BITS)) & 3
                    if place >= full and kind == block_tables.EMPTY:
                        continue
                    part = True if place < full else from_vectors(vectors[b], at, keys)
                    seen[b][np.ix_(at, keys)] |= part
    np.testing.assert_array_equal(seen[:, :LENGTH, :LENGTH], dense)
    assert not seen[:, :, LENGTH:].any()


def test_lists_from_extreme_vectors():
    """Entries far outside of the array neither overflow nor show."""
    low, high = -(2**31), 2**31 - 1
    until = jnp.array([[high, 3, low, 4]], jnp.int32)
    mask = Visibility(until, jnp.array([[low, 2, 0, high]]), jnp.array([[high, 3, high, low]]))
    vectors = np.asarray(op._vectors(mask))
    rows = np.arange(4)
    np.testing.assert_array_equal(
        from_vectors(vectors[0], rows, np.arange(4)), np.asarray(mask.as_array(4))[0]
    )


def test_splits_of_query_heads_grow_where_tiles_are_few():
    def splits(length, N, K):
        q = jax.ShapeDtypeStruct((1, length, N, 64), "bfloat16")
        return op._splits(q, jax.ShapeDtypeStruct((1, length, K, 64), "bfloat16"))

    assert splits(128, 32, 8) == 4  # no more than heads in a group
    assert splits(8192, 32, 8) == 2
    assert splits(32768, 32, 8) == 1
    assert splits(128, 6, 2) == 1  # three heads are not halved


def test_full_first_orders_full_then_partial():
    table = jnp.array([[[2, 0, 1, 2, 1], [0, 0, 0, 0, 0]]], jnp.int8)
    counts, blocks = _block_lists.full_first(table, spare=1)
    np.testing.assert_array_equal(counts, [[[2, 4], [0, 0]]])
    np.testing.assert_array_equal(blocks, [[[0, 3, 2, 4, 5, 5], [5] * 6]])
