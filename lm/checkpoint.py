# SPDX-License-Identifier: Apache-2.0
"""Orbax checkpoints of training state, data position and what the run knew at that step."""

import dataclasses
import pathlib
import shutil
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from lm.errors import RunError, UserError

_ASIDE = ".damaged"
_FULL = ("No space left on device", "Disk quota exceeded", "File too large")


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint as read back; the data iterator is set in place."""

    step: int
    state: Any
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints of one workdir. Saving is asynchronous; a step appears only when it is
    whole."""

    def __init__(self, directory: pathlib.Path, keep: int = 2):
        self.directory = directory
        self._damaged: list[int] = []  # steps that cannot be read
        self._report_partial()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        handlers = {
            "state": ocp.StandardCheckpointHandler(),
            "data": grain.checkpoint.CheckpointHandler(),
            "meta": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(
            directory.absolute(), options=options, item_handlers=handlers
        )

    def _report_partial(self) -> None:
        """Half-written checkpoints are never read: say so instead of resuming from an older step
        silently."""
        if not self.directory.is_dir():
            return
        for path in sorted(self.directory.iterdir()):
            if path.is_dir() and not _whole(path) and path.suffix != _ASIDE:
                logging.warning("ignoring the half-written checkpoint %s", path)
                self._damaged += [int(path.name)] if path.name.isdigit() else []

    def steps(self) -> list[int]:
        """Whole checkpoints, oldest first."""
        steps = sorted(self._manager.all_steps())
        return [step for step in steps if _whole(self.directory / str(step))]

    def save(
        self, step: int, state: Any, data: grain.DatasetIterator, meta: dict[str, Any]
    ) -> None:
        """Starts writing; errors of an earlier write surface here or in `wait`.

        A step that cannot be read is set aside first, since nothing is written below the newest.

        Raises:
          RunError: no room on the disk, or a newer checkpoint is in the way.
        """
        self._check_room(state)
        self._set_aside()
        with _disk_errors():
            saved = self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=grain.checkpoint.CheckpointSave(data),
                    meta=ocp.args.JsonSave(meta),
                ),
            )
        if not saved:
            raise RunError(
                f"{self.directory} took no checkpoint of step {step}: it has a newer one"
            )

    def _set_aside(self) -> None:
        """Renames what cannot be read."""
        if not self._damaged:
            return
        if not jax.process_index():
            for step in self._damaged:
                path = self.directory / str(step)
                target = path.with_suffix(_ASIDE)
                shutil.rmtree(target, ignore_errors=True)
                logging.warning("%s is set aside as %s", path, target.name)
                path.rename(target)
        multihost_utils.sync_global_devices("damaged checkpoints are aside")
        self._damaged.clear()
        self._manager.reload()

    def _check_room(self, state: Any) -> None:
        """Refuses before the write what cannot succeed: half a checkpoint helps nobody."""
        arrays = [x for x in jax.tree.leaves(state) if isinstance(x, jax.Array)]
        needed = sum(
            shard.data.nbytes
            for x in arrays
            for shard in x.addressable_shards
            if not shard.replica_id
        )
        free = shutil.disk_usage(self.directory).free
        if needed > free:
            raise RunError(
                f"cannot write the checkpoint: No space left on device ({needed / 2**20:.1f} MiB "
                f"needed, {free / 2**20:.1f} MiB free in {self.directory})"
            )

    def wait(self) -> None:
        """Until every started write is whole on disk."""
        with _disk_errors():
            self._manager.wait_until_finished()

    def restore(self, abstract: Any, data: grain.DatasetIterator | None = None) -> Restored | None:
        """The newest readable checkpoint, or None. `abstract` gives shapes, dtypes and shardings.

        An unreadable checkpoint is skipped with a message; one of another shape raises UserError.
        """
        for step in reversed(self.steps()):
            items = {"state": ocp.args.StandardRestore(abstract), "meta": ocp.args.JsonRestore()}
            if data is not None:
                items["data"] = grain.checkpoint.CheckpointRestore(data)
            try:
                check_shapes(self._manager.item_metadata(step).state, abstract, self.directory)
                out = self._manager.restore(step, args=ocp.args.Composite(**items))
            except UserError:
                raise
            except Exception as error:
                logging.warning(
                    "ignoring the unreadable checkpoint %s (%s)",
                    self.directory / str(step),
                    str(error).splitlines()[0],
                )
                self._damaged.append(step)
                continue
            return Restored(step, out.state, out.meta)
        return None

    def stored_params(self) -> Any:
        """Shapes and dtypes of the parameters in the newest readable checkpoint; None without."""
        for step in reversed(self.steps()):
            try:
                params = self._manager.item_metadata(step).state["params"]
            except Exception:  # `restore` says what is wrong with it
                continue
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        return None

    def reached_preemption(self, step: int) -> bool:
        """Whether the hosts have agreed to stop at this step (several processes only)."""
        return self._manager.reached_preemption(step)

    def close(self) -> None:
        self._manager.close()


def any_whole(directory: pathlib.Path) -> bool:
    """Whether a directory of checkpoints has one that can be read."""
    return directory.is_dir() and any(map(_whole, directory.iterdir()))


def _whole(path: pathlib.Path) -> bool:
    """Whether Orbax finished writing this step and none of its parts is missing."""
    parts = [path / name for name in ("state", "data", "meta")]
    return (
        path.name.isdigit()
        and (path / "_CHECKPOINT_METADATA").exists()
        and all(part.is_dir() for part in parts)
    )


def check_shapes(stored: Any, wanted: Any, where: pathlib.Path) -> None:
    """Raises UserError naming the first parameter that is missing or has another shape."""
    if stored is None:
        raise ValueError("no metadata")
    stored = _shapes(stored)
    for name, shape in _shapes(wanted).items():
        if name not in stored:
            raise UserError(f"checkpoint {where} has no {name}: it is of another model")
        if stored[name] != shape:
            raise UserError(
                f"checkpoint {where} is of another shape: {name} is {list(stored[name])} there, "
                f"{list(shape)} in this config"
            )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    def name(path):
        parts = (str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)
        return "/".join(parts)

    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))[0]
    return {name(path): tuple(leaf.shape) for path, leaf in leaves if leaf is not None}


class _disk_errors:
    """Turns the many faces of a full disk into one clear line."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> None:
        if error is not None and any(text in str(error) for text in _FULL):
            raise RunError(f"cannot write the checkpoint: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    text = next((t for t in _FULL if t in str(error)), "")
    return text or str(error).splitlines()[0]
