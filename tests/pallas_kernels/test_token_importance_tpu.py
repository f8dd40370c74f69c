# SPDX-License-Identifier: Apache-2.0
"""The TPU kernels of token importance: numbers in Pallas' simulation of a TPU, with its checks on,
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

from ops import dispatch
from ops.token_importance import token_importance
from pallas_kernels import token_importance_tpu as kernels
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
    """Blocks of 128 slots in the simulation; a race fails the test."""
    monkeypatch.setattr(kernels, "block_size", lambda slots, size: 128)
    with tpu_interpret.simulated(CHECKED):
        yield
    assert simulation.races is not None
    assert not simulation.races.races_found
    pltpu.reset_tpu_interpret_mode_state()


def problem(W=1, N=4, K=2, B=3, S=300, H=128, dtype="float32"):
    """The sequences see a part from the second block on, nothing, all of it."""
    q, k = arrays(0, (B, W, N, H), (B, S, K, H), dtype=dtype)
    begin = jnp.array([140, 40, 0])[:B]
    end = jnp.array([280, 30, S])[:B, None] - jnp.arange(W)[None, ::-1]
    return {"q": q, "k": k, "begin": begin, "end": end}


def run(implementation, arguments, **settings):
    settings |= {"return_lse": True, "implementation": implementation}
    return jit(lambda a: token_importance(**a, **settings))(arguments)


def compare(arguments, **settings):
    expected = run("reference", arguments, **settings)
    assert_close(run("pallas_tpu", arguments, **settings), expected, "float32")


@pytest.mark.parametrize(
    "settings",
    [
        {"heads": "all", "reduce": "max"},
        {"heads": "kv", "reduce": "mean", "gqa": "modulo"},
        {"heads": "query", "reduce": "sum", "normalize": False},
        {"heads": "query", "reduce": "max", "gqa": "modulo", "normalize": False},
    ],
)
def test_a_window_of_rows(settings, checked):
    rng = np.random.default_rng(1)
    weights = {"row_weights": rng.standard_normal((3, 3)), "head_weights": rng.random(4)}
    weights = {name: jnp.asarray(x, jnp.float32) for name, x in weights.items()}
    compare(problem(3) | weights, **settings)


@pytest.mark.parametrize(
    "settings",
    [{}, {"heads": "kv", "normalize": False}, {"heads": "query", "gqa": "modulo", "scale": 0.3}],
)
def test_one_row(settings, checked):
    arguments = problem() | {"head_weights": jnp.array([1.0, 0.5, -1.0, 0.0])}
    compare(arguments, **settings)


@pytest.mark.parametrize(
    ("W", "codes", "scales"), [(1, "int8", "bfloat16"), (2, "float8_e4m3fn", "float32")]
)
def test_shadow_keys_of_a_stack(W, codes, scales, checked):
    """bfloat16 queries; codes of 8 bits are exact in bfloat16."""
    arguments = problem(W, dtype="bfloat16")
    rng = np.random.default_rng(2)
    arguments["k"] = jnp.asarray(rng.integers(-100, 100, (3, 3, 300, 2, 128)), codes)
    arguments["k_scale"] = jnp.asarray(rng.random((3, 3, 300, 2)) * 0.02, scales)
    compare(arguments | {"layer": jnp.int32(1)})


def test_heads_on_several_devices(checked):
    """On two devices: each holds a thread of the host while it waits for the others. The simulation
    mixes what varies over devices with what does not, which the check of those types forbids."""
    arguments = problem(N=8, K=4)
    expected = run("reference", arguments)[0]
    heads = P(None, None, "tensor")
    specs = {"q": heads, "k": heads, "begin": P(), "end": P()}
    split = jax.shard_map(
        lambda a: jax.lax.psum(token_importance(**a, implementation="pallas_tpu"), "tensor"),
        mesh=cpu_mesh(tensor=min(2, len(os.sched_getaffinity(0)))),
        in_specs=(specs,),
        out_specs=P(),
        check_vma=False,
    )
    assert_close(jit(split)(arguments), expected, "float32")


def test_only_blocks_in_the_range_are_read(checked):
    """Keys of the blocks before and behind it are NaN."""
    arguments = problem(B=1, S=600)
    arguments["begin"], arguments["end"] = jnp.array([140]), jnp.array([[250]])
    expected = run("reference", arguments)
    slots = jnp.arange(600)[None, :, None, None]
    outside = (slots < 128) | (slots >= 256)
    arguments["k"] = jnp.where(outside, jnp.nan, arguments["k"])
    assert_close(run("pallas_tpu", arguments), expected, "float32")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"H": 64}, "head dim 64; 128 and 256 are served"),
        ({"K": 1}, "1 key and value heads; 2, 4, 8, 16, 32 are served"),
        ({"dtype": "float16"}, "q of type float16 and k of type float16; q of bfloat16 or float32"),
        ({"W": 257}, "257 rows of 4 heads; up to 1024 rows of all heads are served"),
    ],
)
def test_what_is_not_served_is_refused(change, reason):
    with dispatch.target_platform("tpu"), pytest.raises(dispatch.Unsupported, match=reason):
        token_importance(**problem(**change), implementation="pallas_tpu")


def test_other_platforms_are_refused():
    with pytest.raises(dispatch.Unsupported, match=r"^pallas_tpu: runs on TPU \(here: cpu\)"):
        token_importance(**problem(), implementation="pallas_tpu")


def test_block_sizes():
    assert kernels.block_size(1 << 20, 8 * 128 * 2) == 512
    assert kernels.block_size(300, 8 * 128 * 2) == 384
    assert kernels.block_size(1 << 20, 32 * 256 * 4) == 128


def compiled(topology, W=1, N=8, K=8, H=128, S=1024, dtype="bfloat16", codes=None, **settings):
    """The program of one device of a topology; a sequence and two layers on each."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    number = len(devices)
    mesh = jax.make_mesh((number,), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    batch, stack = P("data"), P(None, "data")

    def shape(*dims, dtype="int32", spec=batch):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, spec))

    arguments = {
        "q": shape(number, W, N, H, dtype=dtype),
        "k": shape(2, number, S, K, H, dtype=codes or dtype, spec=stack),
        "layer": shape(spec=P()),
        "begin": shape(number),
        "end": shape(number, W),
    }
    if codes:
        arguments["k_scale"] = shape(2, number, S, K, dtype="bfloat16", spec=stack)
    split = jax.shard_map(
        lambda a: token_importance(**a, **settings),
        mesh=mesh,
        in_specs=(jax.tree.map(lambda x: x.sharding.spec, arguments),),
        out_specs=batch,
    )
    with dispatch.target_platform("tpu"):
        program = jax.jit(split).lower(arguments).compile()
    calls = program.as_text().count('custom_call_target="tpu_custom_call"')
    assert calls == (1 if W == 1 or not settings.get("normalize", True) else 2)
    return program.memory_analysis().temp_size_in_bytes


TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_compiles_for_tpu(topology):
    """The keys are not copied; the products of 8 heads take a 64th of the stack."""
    keys = 2 * 65536 * 8 * 128 * 2
    assert compiled(topology, S=65536) < keys // 16


def test_windows_of_shadow_keys_compile():
    compiled("v6e:2x2", 3, codes="int8", heads="query", reduce="max")


@pytest.mark.slow
@pytest.mark.parametrize("topology", [*TOPOLOGIES, "tpu7x:2x2x1"])
@pytest.mark.parametrize("W", [1, 4])
@pytest.mark.parametrize(
    ("N", "K", "H", "dtype", "codes"),
    [(32, 8, 128, "bfloat16", codes) for codes in (None, "int8", "float8_e4m3fn")]
    + [(8, 2, 256, "bfloat16", None), (32, 32, 128, "bfloat16", "int8")]
    + [(16, 4, 128, "float32", None), (16, 16, 256, "float32", None)],
)
def test_real_sizes_compile(topology, W, N, K, H, dtype, codes):
    compiled(topology, W, N, K, H, 65536, dtype, codes)
