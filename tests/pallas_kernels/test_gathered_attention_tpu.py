# SPDX-License-Identifier: Apache-2.0
"""The TPU kernel of gathered attention: numbers in Pallas' simulation of a TPU, with its checks on,
and compilation by the real TPU compiler."""

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

from ops import _gathered_attention_tpu as tpu
from ops import dispatch
from ops.gathered_attention import gathered_attention
from pallas_kernels import gathered_attention_tpu as kernels
from pallas_kernels import tpu_interpret
from tests.ops.op_cases import arrays, cpu_mesh, jit
from tests.ops.op_tolerances import assert_close

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
    """Blocks of 4 entries in the simulation; a race fails the test."""
    settings = kernels.Settings
    monkeypatch.setattr(kernels, "Settings", lambda **given: settings(**given, block=4))
    with tpu_interpret.simulated(CHECKED):
        yield
    assert simulation.races is not None
    assert not simulation.races.races_found
    pltpu.reset_tpu_interpret_mode_state()


def problem(T=1, N=4, K=2, B=3, S=40, M=12, H=128, dtype="float32"):
    """A part of a list, a full list of a sequence shorter than T, and an empty list."""
    q, k, v = arrays(0, (B, T, N, H), (B, S, K, H), (B, S, K, H), dtype=dtype)
    indices = np.random.default_rng(1).integers(0, S, (B, M))
    counts = np.array([7, M, 0])[:B]
    indices = np.where(np.arange(M) < counts[:, None], indices, -7)
    lengths = np.array([S, 2, S - 5])[:B]
    arguments = {"indices": indices, "counts": counts, "lengths": lengths}
    arguments = {name: jnp.asarray(x, jnp.int32) for name, x in arguments.items()}
    return {"q": q, "k": k, "v": v, **arguments}


def run(implementation, arguments, **settings):
    settings |= {"return_lse": True, "implementation": implementation}
    return jit(lambda a: gathered_attention(**a, **settings))(arguments)


def compare(arguments, **settings):
    expected = run("reference", arguments, **settings)
    actual = run("pallas_tpu", arguments, **settings)
    assert actual[0].dtype == arguments["q"].dtype
    assert_close(actual, expected, arguments["q"].dtype)


def rotations(sequences, M=12):
    angles = np.random.default_rng(2).uniform(-3, 3, (sequences, 1, M, 64))
    return tuple(jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin))


def test_decode_with_one_table_of_rotations(checked):
    compare(problem() | {"rope": rotations(1)}, scale=0.3)


def test_a_chunk_of_queries_in_blocks_and_chunks(checked, monkeypatch):
    """Blocks of 6 and 5 tokens; 24 rows of a KV head in two chunks, which have 128 each; the cache
    has another type than the queries."""
    monkeypatch.setattr(tpu, "_tokens", lambda *arguments: 6)
    monkeypatch.setattr(tpu, "_LARGEST_CHUNK", 16)
    arguments = problem(11, N=8)
    compare(arguments | {name: arguments[name].astype(jnp.bfloat16) for name in ("k", "v")})


def test_a_layer_of_a_stack_rotated_when_read(checked):
    """Every sequence has its own rotations."""
    arguments = problem(2, dtype="bfloat16") | {"rope": rotations(3)}
    for name in ("k", "v"):
        other = jnp.full_like(arguments[name], jnp.nan)
        arguments[name] = jnp.stack([other, arguments[name]])
    compare(arguments | {"layer": jnp.int32(1)})


def test_heads_on_several_devices(checked):
    """On two devices: each holds a thread of the host while it waits for the others. The simulation
    mixes what varies over devices with what does not, which the check of those types forbids."""
    arguments = problem(N=8, K=4)
    expected = run("reference", arguments)[0]
    heads = P(None, None, "tensor")
    specs = {"q": heads, "k": heads, "v": heads, "indices": P(), "counts": P(), "lengths": P()}
    split = jax.shard_map(
        lambda a: gathered_attention(**a, implementation="pallas_tpu"),
        mesh=cpu_mesh(tensor=min(2, len(os.sched_getaffinity(0)))),
        in_specs=(specs,),
        out_specs=heads,
        check_vma=False,
    )
    assert_close(jit(split)(arguments), expected, "float32")


def test_only_filled_blocks_are_copied(checked):
    """Two full blocks of four: what the other entries stand for, slot 0, is not read."""
    arguments = problem(B=1)
    indices = 1 + np.arange(12)[None] % 39
    arguments |= {"counts": jnp.array([8]), "indices": jnp.asarray(indices)}
    expected = run("reference", arguments)
    listed = (np.arange(40) > 0) & (np.arange(40) < 9)
    for name in ("k", "v"):
        arguments[name] = jnp.where(listed[None, :, None, None], arguments[name], jnp.nan)
    assert_close(run("pallas_tpu", arguments), expected, "float32")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"H": 64}, "head dim 64; 128 and 256 are served"),
        ({"K": 1}, "1 key and value heads; 2, 4, 8, 16, 32 are served"),
        ({"dtype": "float16"}, "q of type float16; bfloat16 and float32 are served"),
        ({"M": 1 << 17}, "131072 entries per list; 65536 fit the scalar memory"),
        ({"K": 8, "N": 8, "H": 256, "M": 60000, "rope": 1}, "take .* MiB of the core's memory"),
        ({"rope": 2}, "rope tables per KV head"),
        ({"per_head": True}, "lists per KV head"),
    ],
)
def test_what_is_not_served_is_refused(change, reason):
    tables, per_head = change.pop("rope", 0), change.pop("per_head", False)
    arguments = problem(**change)
    M, H = arguments["indices"].shape[1], arguments["q"].shape[3]
    if tables:
        arguments["rope"] = (jnp.zeros((1, tables, M, H // 2)),) * 2
    if per_head:
        arguments["indices"] = jnp.stack([arguments["indices"]] * 2, axis=1)
        arguments["counts"] = jnp.stack([arguments["counts"]] * 2, axis=1)
    with dispatch.target_platform("tpu"), pytest.raises(dispatch.Unsupported, match=reason):
        gathered_attention(**arguments, implementation="pallas_tpu")


def test_other_platforms_are_refused():
    with pytest.raises(dispatch.Unsupported, match=r"^pallas_tpu: runs on TPU \(here: cpu\)"):
        gathered_attention(**problem(), implementation="pallas_tpu")


def test_long_chunks_are_cut_into_blocks_that_fit():
    """4096 tokens of 32 heads: as many at a time as three quarters of the memory hold."""
    q = jax.ShapeDtypeStruct((1, 4096, 32, 128), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, 1, 8192, 8, 128), jnp.bfloat16)
    for memory in (48 << 20, 96 << 20):
        tokens = tpu._tokens(q, k, 2688, True, memory)
        rows, chunks = tpu._rows(4 * tokens)
        assert rows * chunks >= 4 * tokens
        assert kernels.vmem_needed(8 * chunks, rows, 8, 128, 2688, 2, True) <= memory * 3 // 4
        assert 128 <= tokens < 4096
    assert tpu._tokens(q.update(shape=(1, 512, 32, 128)), k, 2688, True, 96 << 20) == 512


def compiled(topology, T=1, N=8, K=8, H=128, S=1024, M=300, dtype="bfloat16", rope=False):
    """The program of one device of a topology; a sequence and two layers on each."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    number = len(devices)
    mesh = jax.make_mesh((number,), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    batch, stack = P("data"), P(None, "data")

    def shape(*dims, dtype="int32", spec=batch):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, spec))

    arguments = {
        "q": shape(number, T, N, H, dtype=dtype),
        "k": shape(2, number, S, K, H, dtype=dtype, spec=stack),
        "v": shape(2, number, S, K, H, dtype=dtype, spec=stack),
        "layer": shape(spec=P()),
        "indices": shape(number, M),
        "counts": shape(number),
        "lengths": shape(number),
    }
    if rope:
        arguments["rope"] = (shape(1, 1, M, H // 2, dtype="float32", spec=P()),) * 2
    split = jax.shard_map(
        lambda a: gathered_attention(**a, return_lse=True),
        mesh=mesh,
        in_specs=(jax.tree.map(lambda x: x.sharding.spec, arguments),),
        out_specs=batch,
    )
    with dispatch.target_platform("tpu"):
        program = jax.jit(split).lower(arguments).compile()
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == 1
    return program.memory_analysis().temp_size_in_bytes


TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_compiles_for_tpu(topology):
    """Nothing of the size of the cache is copied."""
    cache = 2 * 65536 * 8 * 128 * 2
    assert compiled(topology, S=65536, rope=True) < cache // 16


def test_chunks_compile():
    compiled("v6e:2x2", T=140, N=32, K=8)


@pytest.mark.slow
@pytest.mark.parametrize("topology", [*TOPOLOGIES, "tpu7x:2x2x1"])
@pytest.mark.parametrize("T", [1, 512])
@pytest.mark.parametrize(
    ("N", "K", "H", "dtype"),
    [
        (32, 8, 128, "bfloat16"),
        (8, 2, 256, "bfloat16"),
        (32, 32, 128, "bfloat16"),
        (16, 4, 128, "float32"),
        (16, 16, 256, "float32"),
    ],
)
def test_real_sizes_compile(topology, T, N, K, H, dtype):
    compiled(topology, T, N, K, H, S=65536, M=2688, dtype=dtype, rope=True)
