# SPDX-License-Identifier: Apache-2.0
"""One rules table from logical dimensions to mesh axes, and everything that is derived from it."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lm.config import MeshConfig, ModelConfig
from lm.errors import UserError

AXES = ("data", "fsdp", "tensor")

RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
}  # every other dimension (layers, head_dim, rank, length) is whole on each device

_KERNELS = {
    "q": (("embed",), ("heads", "head_dim")),
    "k": (("embed",), ("kv_heads", "head_dim")),
    "v": (("embed",), ("kv_heads", "head_dim")),
    "o": (("heads", "head_dim"), ("embed",)),
    "gate": (("embed",), ("mlp",)),
    "up": (("embed",), ("mlp",)),
    "down": (("mlp",), ("embed",)),
}


# parameters that a method trains beside the model's: {"params": model, "head": these}
_HEAD = {
    ("gate", "kernel"): ("embed", "rank"),
    ("expander", "down"): ("step", "rank", "embed", "width"),
    ("expander", "up"): ("step", "rank", "width", "embed"),
    ("expander", "kernel"): ("step", "rank", "embed", "out"),
    ("expander", "table"): ("step", "rank", "vocab", "embed"),
    ("transition", "logits"): ("step", "rank", "rank"),
    ("transition", "kernel"): ("step", "embed", "rank", "rank"),
    ("vocab", "ids"): ("id",),
}


def dims_of(path: tuple[str, ...]) -> tuple[str | None, ...]:
    """The logical dimensions of a parameter by its path, e.g. ("layers", "attention", "q",
    "kernel"), or ("params", ...) and ("head", ...) where a method trains more than the model."""
    if path[0] == "head":
        return _HEAD[path[1:]]
    if path[0] == "params":
        path = path[1:]
    prefix: tuple[str | None, ...] = ("layers",) if path[0] == "layers" else ()
    leaf = path[-1]
    if leaf == "table":
        return (*prefix, "vocab", "embed")
    if leaf == "scale":
        return (*prefix, None)
    inputs, outputs = _KERNELS[path[-2]]
    shapes = {
        "kernel": (*inputs, *outputs),
        "bias": outputs,
        "lora_a": (*inputs, "rank"),
        "lora_b": ("rank", *outputs),
    }
    return (*prefix, *shapes[leaf])


@dataclasses.dataclass(frozen=True)
class Sharding:
    """A mesh with the rules table; `None` stands for a single device everywhere in `lm`."""

    mesh: Mesh

    def axes(self, dim: str | None) -> tuple[str, ...]:
        """The mesh axes that a logical dimension is split over."""
        return RULES.get(dim, ()) if dim is not None else ()

    def size(self, dim: str) -> int:
        """Over how many devices a logical dimension is split."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes(dim))

    def spec(self, *dims: str | None) -> PartitionSpec:
        """The partition of an array with these logical dimensions; ValueError on a collision."""
        entries, used = [], set()
        for dim in dims:
            axes = self.axes(dim)
            if used & set(axes):
                raise ValueError(f"dimensions {dims} map to mesh axis {used & set(axes)} twice")
            used |= set(axes)
            entries.append(axes if axes else None)
        return PartitionSpec(*entries)

    def named(self, *dims: str | None) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(*dims))

    def constrain(self, x: jax.Array, *dims: str | None) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, self.named(*dims))

    def params(self, tree: Any) -> Any:
        """NamedShardings for parameters, or for optimiser state that mirrors them; scalars are
        replicated."""

        def leaf(path, x):
            keys = tuple(p.key for p in path if isinstance(p, jax.tree_util.DictKey))
            if not keys or np.ndim(x) == 0:
                return NamedSharding(self.mesh, PartitionSpec())
            dims = dims_of(keys)[_apart(path) :]
            for size, dim in zip(np.shape(x), dims, strict=True):
                if dim is not None and size % self.size(dim):
                    raise UserError(
                        f"{'/'.join(keys)}: dimension {dim} of size {size} does not divide over "
                        f"{self.size(dim)} devices (mesh axes {', '.join(self.axes(dim))})"
                    )
            return self.named(*dims)

        return jax.tree_util.tree_map_with_path(leaf, tree)

    def shard_map(self, f: Callable, in_specs: Any, out_specs: Any) -> Callable:
        return jax.shard_map(f, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs)


def _apart(path: Sequence[Any]) -> bool:
    """Whether this is a parameter of one layer that is kept by itself: it has no layers' axis."""
    pairs = itertools.pairwise(path)
    return any(
        getattr(one, "key", None) == "layers" and isinstance(two, jax.tree_util.SequenceKey)
        for one, two in pairs
    )


def make(config: MeshConfig, model: ModelConfig, devices: Any = None) -> Sharding | None:
    """The mesh over `devices` (default: all of them), or None for one device.

    Raises UserError when the axes do not multiply to the number of devices, or the model does not
    divide.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config, len(devices))
    tensor = shape[2]
    if model.num_kv_heads % tensor:
        raise UserError(f"mesh.tensor={tensor} does not divide num_kv_heads={model.num_kv_heads}")
    if len(devices) == 1:
        return None
    axis_types = (AxisType.Auto,) * len(AXES)
    return Sharding(jax.make_mesh(shape, AXES, devices=devices, axis_types=axis_types))


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, int, int]:
    """(data, fsdp, tensor) with -1 filled in."""
    sizes = [config.data, config.fsdp, config.tensor]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"mesh sizes {sizes} must be positive, with at most one -1")
    known = math.prod(size for size in sizes if size != -1)
    sizes = [num_devices // known if size == -1 else size for size in sizes]
    if math.prod(sizes) != num_devices:
        raise UserError(
            f"mesh data={config.data} fsdp={config.fsdp} tensor={config.tensor} does not cover "
            f"{num_devices} device(s)"
        )
    return tuple(sizes)
