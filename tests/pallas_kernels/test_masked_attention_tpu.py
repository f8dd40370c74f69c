# SPDX-License-Identifier: Apache-2.0
"""The TPU attention kernels: numbers in Pallas' simulation of a TPU, with its checks on, and
compilation by the real TPU compiler, which accepts other programs than the simulation does."""

import dataclasses
import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as simulation
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ops import _masked_attention_tpu as tpu
from ops import block_table, dispatch
from ops.masked_attention import masked_attention
from ops.visibility import Visibility
from pallas_kernels import masked_attention_tpu as kernels
from pallas_kernels import tpu_interpret
from pallas_kernels.masked_attention_tpu import FIRST, LAST, BlockSizes, TileCode
from tests.ops.op_cases import MASKS, arrays, cpu_mesh, jit, visibility
from tests.ops.op_tolerances import assert_close

# Read when the TPU compiler is loaded: ask no metadata server who we are, and do not take the lock
# that lets only one process use a TPU, since no process does and another test worker may compile.
os.environ.update(
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_WORKER_ID="0",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
)

BLOCKS = BlockSizes(128, 128, 128)
CHECKED = pltpu.InterpretParams(
    detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan"
)


@pytest.fixture
def checked(monkeypatch):
    """Small blocks in the simulation; a race fails the test."""
    monkeypatch.setattr(tpu, "block_sizes", lambda *arguments: BLOCKS)
    with tpu_interpret.simulated(CHECKED):
        yield
    assert simulation.races is not None
    assert not simulation.races.races_found
    pltpu.reset_tpu_interpret_mode_state()


@partial(jit, static_argnums=0)
def value_and_gradients(implementation, q, k, v, mask):
    """Outputs, and gradients of a loss that uses every output and log-sum-exp."""

    def loss(q, k, v):
        out, lse = masked_attention(q, k, v, mask, return_lse=True, implementation=implementation)
        probe = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        total = jnp.sum(out.astype(jnp.float32) * probe)
        return total + jnp.sum(jnp.where(lse > -jnp.inf, jnp.sin(lse), 0.0)), (out, lse)

    (_, outputs), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    return outputs, gradients


def problem(B, T, S, N, K, H, dtype="float32"):
    return arrays(0, (B, T, N, H), (B, S, K, H), (B, S, K, H), dtype=dtype)


def compare(q, k, v, mask):
    expected = value_and_gradients("reference", q, k, v, mask)
    actual = value_and_gradients("pallas_tpu", q, k, v, mask)
    assert [x.dtype for x in (actual[0][0], *actual[1])] == [q.dtype] * 4
    assert_close(actual, expected, q.dtype)


@pytest.mark.parametrize("mask", ["tree", "blind", "random"])
def test_float32_against_the_reference(mask, checked):
    compare(*problem(2, 300, 300, 4, 2, 64), visibility(mask, 2, 300))


@pytest.mark.parametrize("mask", ["causal", "documents", "hidden"])
def test_bfloat16_against_the_reference(mask, checked):
    compare(*problem(1, 200, 200, 4, 1, 128, "bfloat16"), visibility(mask, 1, 200))


def test_fewer_rows_than_keys(checked):
    """Rows in the middle of the keys and before the first one; no hidden vectors; one head."""
    mask = Visibility.documents([[150, 100], [290, 0]], 300)
    mask = dataclasses.replace(mask, row_offset=jnp.array([170, -40], jnp.int32))
    compare(*problem(2, 100, 300, 1, 1, 64), mask)


def test_more_rows_than_keys_and_many_heads(checked):
    compare(*problem(1, 150, 100, 8, 1, 64), Visibility.causal(1, 100))


def test_large_head_dim(checked):
    compare(*problem(1, 128, 128, 2, 2, 256), Visibility.causal(1, 128))


def test_attention_split_over_batch_and_heads(checked):
    """Kernels inside shard_map, gradients taken around it; the mask varies over one axis only.

    On two devices: each holds a thread of the host while it waits for the others, and more than
    there are cores never end.
    """
    mesh = cpu_mesh(data=1, tensor=min(2, len(os.sched_getaffinity(0))))
    heads = P("data", None, "tensor")
    q, k, v = problem(2, 140, 140, 4, 2, 64)
    mask = visibility("documents", 2, 140)

    def loss(q, k, v, mask):
        out, lse = masked_attention(q, k, v, mask, return_lse=True, implementation="pallas_tpu")
        seen = jnp.where(lse > -jnp.inf, jnp.cos(lse), 0.0)
        return jax.lax.psum(jnp.sum(jnp.sin(out)) + jnp.sum(seen), ("data", "tensor"))

    specs = (heads, heads, heads, P("data"))
    local = jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=P())

    def whole(q, k, v, mask):
        out, lse = masked_attention(q, k, v, mask, return_lse=True, implementation="reference")
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(lse > -jnp.inf, jnp.cos(lse), 0.0))

    expected = jit(jax.grad(whole, (0, 1, 2)))(q, k, v, mask)
    assert_close(jit(jax.grad(local, (0, 1, 2)))(q, k, v, mask), expected, "float32")


def test_only_needed_tiles_are_visited(monkeypatch):
    """Two documents of one block each: two tiles out of four, and NaN in one document stays in
    it."""
    monkeypatch.setattr(tpu, "block_sizes", lambda *arguments: BLOCKS)
    steps = []

    def record(token, point, core):
        steps.append(tuple(int(x) for x in point))
        return token

    params = dataclasses.replace(CHECKED, grid_point_recorder=record)
    q, k, v = problem(1, 256, 256, 2, 2, 64)
    mask = Visibility.documents([[128, 128]], 256)
    bad = [x.at[:, :128].set(jnp.nan) for x in (q, k, v)]
    with tpu_interpret.simulated(params):
        (out, lse), gradients = value_and_gradients("pallas_tpu", *bad, mask)
    for values in (out, *gradients):
        assert np.isfinite(values[:, 128:]).all()
        assert np.isnan(values[:, :128]).any()
    assert np.isfinite(lse[:, 128:]).all()
    kv_heads, tiles, calls = 2, 2, 3
    assert len(steps) == kv_heads * tiles * calls


def test_full_tiles_are_not_masked():
    """A tile that is called full ignores vectors that would hide all of it."""
    q, k, v = (x.transpose(0, 2, 1, 3) for x in problem(1, 128, 128, 1, 1, 64))
    hidden = jnp.zeros((1, 1, 128), jnp.int32)
    for kind, largest in ((kernels.FULL, 128), (kernels.PARTIAL, 0)):
        _, lse = jit(
            partial(kernels.forward, scale=0.0, blocks=BLOCKS, vmem_bytes=1, interpret=CHECKED)
        )(
            q[:, :, None],
            k,
            v,
            hidden,
            jnp.zeros(1, jnp.int32),
            jnp.array([kind | FIRST | LAST], jnp.int32),
            jnp.int32(1),
        )
        expected = np.full((1, 1, 1, 1, 128), np.log(largest) if largest else -np.inf)
        assert_close(lse, expected, "float32")


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("transposed", [False, True])
def test_tiles_are_the_lists_of_the_block_table(mask, transposed):
    """Every needed tile once, runs in order with their ends marked, one EMPTY tile for a run of
    none."""
    T, blocks = 300, BlockSizes(128, 256, 128)
    mask = visibility(mask, 3, T)
    mask = dataclasses.replace(mask, row_offset=None)
    codes, count = jit(tpu._tiles, static_argnums=(1, 2), static_argnames="transposed")(
        mask, T, blocks, transposed=transposed
    )
    codes = [int(code) for code in codes[: int(count)]]

    table = mask.block_table(T, blocks.q, blocks.k)
    make = block_table.query_blocks if transposed else block_table.key_blocks
    lists = jax.tree.map(np.asarray, make(table))
    code = TileCode(*(lists.kinds.shape[1:]))
    expected, fetched = [], 0
    for b, run in np.ndindex(*lists.counts.shape):
        number = int(lists.counts[b, run])
        for n in range(number):
            flags = int(lists.kinds[b, run, n]) | FIRST * (n == 0) | LAST * (n == number - 1)
            fetched = int(lists.indices[b, run, n])
            expected.append(code.pack(b, run, fetched, flags))
        if not number:
            expected.append(code.pack(b, run, fetched, block_table.EMPTY | FIRST | LAST))
    assert codes == expected
    for tile in codes:
        parts = (f(tile) for f in (code.batch, code.run, code.place, code.flags))
        assert code.pack(*parts) == tile


def test_kinds_are_those_of_the_block_table():
    for name in ("EMPTY", "PARTIAL", "FULL"):
        assert getattr(kernels, name) == getattr(block_table, name)


@pytest.mark.parametrize(
    ("shape", "dtypes", "reason"),
    [
        ((2, 2, 40), ("float32",) * 3, "head dim 40; 64, 128 and 256 are served"),
        ((2, 2, 64), ("float16",) * 3, "types float16, float16 and float16; one of bfloat16 and"),
        (
            (2, 2, 64),
            ("float32", "bfloat16", "float32"),
            "types float32, bfloat16 and float32; one of",
        ),
        ((66, 2, 64), ("bfloat16",) * 3, "33 query heads per key and value head; up to 32"),
    ],
)
def test_what_is_not_served_is_refused(shape, dtypes, reason):
    N, K, H = shape
    q, k, v = (jnp.zeros((1, 8, n, H), t) for n, t in zip((N, K, K), dtypes, strict=True))
    with dispatch.target_platform("tpu"), pytest.raises(dispatch.Unsupported, match=reason):
        masked_attention(q, k, v, Visibility.causal(1, 8), implementation="pallas_tpu")


def test_other_platforms_are_refused():
    q, k, v = problem(1, 8, 8, 1, 1, 64)
    with pytest.raises(dispatch.Unsupported, match=r"^pallas_tpu: runs on TPU \(here: cpu\)"):
        masked_attention(q, k, v, Visibility.causal(1, 8), implementation="pallas_tpu")


def test_long_lists_take_larger_blocks_and_then_are_refused():
    """131072 keys: 1024 * 256 / 2 tiles of 128 rows and 512 keys."""

    def fitted(batch, length=1 << 17):
        q = jax.ShapeDtypeStruct((batch, length, 8, 128), jnp.bfloat16)
        mask = Visibility(jax.ShapeDtypeStruct((batch, length), jnp.int32))
        return tpu._fitting(BlockSizes(128, 512, 256), q, q, mask)

    assert fitted(1).k == 512
    assert fitted(2).k == 1024
    assert fitted(4).k == 2048
    with pytest.raises(dispatch.Unsupported, match=r"8 sequences .* scalar memory has 768"):
        fitted(8)
    with pytest.raises(dispatch.Unsupported, match="split the batch"):
        fitted(1 << 18, 100)


@pytest.mark.parametrize("chip", [None, *kernels._TILES])
def test_block_sizes(chip):
    """Whole multiples of 128 that cut arrays into blocks of nearly equal size."""
    sizes = partial(kernels.block_sizes, chip)
    for head_dim in (64, 128, 256):
        long = sizes(head_dim, 4, 1 << 15, 1 << 15, 2)
        assert (long.q * 4, long.k) == kernels._TILES[chip or "TPU v5"][head_dim]
        assert sizes(head_dim, 4, 1 << 15, 1 << 15, 4).q == long.q // 2
        assert sizes(head_dim, 32, 1 << 15, 1 << 15, 4).q == 128
    assert sizes(128, 4, 1, 300, 2) == BlockSizes(128, 384, 128)
    assert sizes(128, 1, 5, 600, 2) == BlockSizes(128, 384, 128)
    assert sizes(128, 1, 5, 1000, 2) == BlockSizes(128, 512, 256)


def compiled(topology, B, T, N, K, H, dtype="bfloat16", full=False, backward=True):
    """The compiled program of one device of a 2x2 topology; each has B sequences."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    number = len(devices)
    mesh = jax.make_mesh((number,), ("data",), axis_types=(AxisType.Auto,), devices=devices)

    def shape(*dims, dtype=dtype):
        placed = NamedSharding(mesh, P("data"))
        return jax.ShapeDtypeStruct((number * B, *dims), dtype, sharding=placed)

    vectors = [shape(T, dtype="int32")] * (3 if full else 1)
    mask = Visibility(*vectors, row_offset=shape(dtype="int32") if full else None)

    def loss(q, k, v, mask):
        out, lse = masked_attention(q, k, v, mask, return_lse=True)
        return jnp.sum(out.astype(jnp.float32) ** 2) + jnp.sum(lse)

    function = jax.grad(loss, (0, 1, 2)) if backward else lambda *a: loss(*a)[None]
    split = jax.shard_map(function, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    with dispatch.target_platform("tpu"):
        lowered = jax.jit(split).lower(shape(T, N, H), shape(T, K, H), shape(T, K, H), mask)
    program = lowered.compile()
    calls = program.as_text().count('custom_call_target="tpu_custom_call"')
    assert calls == (3 if backward else 1)
    return program.memory_analysis().temp_size_in_bytes


TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_compiles_for_tpu(topology, head_dim):
    """Small blocks, so that nine of them compile quickly; the forward pass alone and with the
    backward."""
    compiled(topology, 1, 256, 2, 2, head_dim, backward=False)
    compiled(topology, 1, 256, 2, 2, head_dim)


def test_float32_with_every_vector_compiles():
    compiled("v5p:2x2x1", 2, 200, 4, 2, 64, "float32", full=True)


def test_memory_of_long_sequences():
    """32768 keys, the blocks of the chip: copies of the arrays in the kernels' layout, and nothing
    of size T times S (a mask of one byte per pair would take 1 GiB, 40 times what they do)."""
    length, head_dim = 1 << 15, 128
    arrays = 3 * length * head_dim * 2  # q, k and v
    assert compiled("v5e:2x2", 1, length, 1, 1, head_dim, full=True) < 4 * arrays


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("topology", [*TOPOLOGIES, "tpu7x:2x2x1"])
def test_the_table_of_blocks_compiles(topology, head_dim):
    compiled(topology, 1, 4096, 8, 2, head_dim, full=True)


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "dtype"), [(2, "bfloat16"), (8, "float32"), (64, "bfloat16")])
def test_groups_and_types_compile_at_their_blocks(heads, dtype):
    """One, four and 32 query heads per key and value head, on the chip with the least VMEM."""
    compiled("v5p:2x2x1", 1, 4096, heads, 2, 256, dtype, full=True)
