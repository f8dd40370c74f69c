# SPDX-License-Identifier: Apache-2.0
"""What every command shares: flags, one clear line on bad input, exit statuses, the JSON line at
the end.

Exit status 0: done; 1: a check failed or the run broke; 2: bad input.
"""

import json
import math
import os
import re
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from lm.config import Config, freeze
from lm.errors import RunError, UserError
from ops.dispatch import IMPLEMENTATIONS, Unsupported

FLAGS = flags.FLAGS
C = TypeVar("C", bound=Config)
N = TypeVar("N", int, float)


class CheckFailed(Exception):
    """A check did not hold: its result is still printed, the reason goes to stderr, exit status
    1."""

    def __init__(self, result: dict[str, Any], reason: str):
        super().__init__(reason)
        self.result = result


def define_config(data: bool = True, workdir: bool = False, required: bool = True) -> None:
    """Defines --config, and --data and --workdir where a command takes them."""
    config_flags.DEFINE_config_file(
        "config",
        help_string="FILE.py:PRESET; override keys as --config.section.key=value",
    )
    if required:
        flags.mark_flag_as_required("config")
    if data:
        flags.DEFINE_string(
            "data", None, "conversations to use instead of the config's (JSON, JSONL, .gz)"
        )
    if workdir:
        flags.DEFINE_string("workdir", None, "directory of the run")
        flags.mark_flag_as_required("workdir")


def config(cls: type[C] = Config, flag: str = "config") -> C:
    """The frozen config of this command: the preset, overrides, and --data.

    flag: another flag of a config file, which --data is not about; nor is a --data that a command
      defines for itself.
    """
    try:
        values = getattr(FLAGS, flag).to_dict()
    except OSError as error:
        raise UserError(f"--{flag}: cannot read the file: {_last_line(error)}") from error
    own = FLAGS.find_module_defining_flag("data") == __name__
    if flag == "config" and own and FLAGS.data is not None:
        values.setdefault("data", {})["source"] = FLAGS.data
    source = values.get("data", {}).get("source")
    if isinstance(source, str) and os.path.exists(source):
        # as it is recorded: what was held out is found again from any directory
        values["data"]["source"] = os.path.abspath(source)
    return freeze(values, cls)


def define_implementation(about: str = "of the ops (default: the first that serves)") -> None:
    """Defines --implementation."""
    flags.DEFINE_enum("implementation", None, list(IMPLEMENTATIONS), about)


def implementation() -> str | None:
    """That of --implementation, else of --config; None: for each op the first that serves."""
    given = FLAGS.config if "config" in FLAGS else None
    return FLAGS.implementation or (given and given.get("train", {}).get("implementation")) or None


def define_distributed() -> None:
    """Defines --distributed, for commands that run on every host of a pod."""
    flags.DEFINE_bool("distributed", False, "join the other hosts of a pod before anything else")


def initialize_distributed() -> None:
    """Joins the other hosts, which JAX finds from the environment (Cloud TPU, Slurm, MPI)."""
    if FLAGS.distributed:
        jax.distributed.initialize()


def numbers(name: str, texts: Sequence[str], kind: type[N] = int) -> tuple[N, ...]:
    """The values of a list flag: whole numbers, or with `kind` float any. Raises UserError."""
    try:
        return tuple(kind(text) for text in texts)
    except ValueError:
        wanted = "whole numbers" if kind is int else "numbers"
        raise UserError(f"--{name}={','.join(texts)}: {wanted} needed") from None


def run(main: Callable[[], dict[str, Any]]) -> None:
    """Parses flags, calls `main` and prints what it returns as the last line of output, as JSON."""

    def wrapped(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            _exit(2, f"unexpected argument {argv[1]!r}; flags start with --")
        logging.set_verbosity(logging.WARNING)
        try:
            result = main()
        except CheckFailed as error:
            _print(error.result)
            _exit(1, f"check failed: {error}")
        except UserError as error:
            _exit(2, str(error))
        except Unsupported as error:
            _exit(2, f"{error}{_hint()}")
        except RunError as error:
            _exit(1, str(error))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            _exit(1, f"out of device memory: {' '.join(str(error).split())[:200]}")
        except OSError as error:
            _exit(1, f"{error.filename or 'input/output'}: {error.strerror or error}")
        except KeyboardInterrupt:
            _exit(130, "interrupted")
        _print(result)

    threading.excepthook = _thread_failed
    _show_flags_in_help()
    app.run(wrapped, flags_parser=_parse)


def _hint() -> str:
    """What to do about an op that the named implementation does not serve: a mix of implementations
    under one name would be measured as what it is not."""
    if "implementation" not in FLAGS or FLAGS.implementation is None:
        return ""
    return "; without --implementation every op takes the first that serves"


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        return FLAGS(argv)
    except (AttributeError, KeyError) as error:
        # ml_collections: an override of a key that the config does not have
        keys = [a for a in argv if re.match(r"--\w*config\.", a)]
        hint = str(error).strip("'\"").replace("\\n", ". ").replace("\\'", "'")
        _exit(2, f"unknown config key in {' '.join(keys)}: {' '.join(hint.split())}")
    except (flags.Error, TypeError, ValueError) as error:
        _exit(2, _last_line(error))


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    """A writer's thread that fails says so in a line; the main thread meets the same error when it
    waits."""
    reason = str(failure.exc_value).splitlines()[:1] or [failure.exc_type.__name__]
    logging.warning("in the background: %s", reason[0][:200])


def _last_line(error: Exception) -> str:
    """ml_collections quotes whole tracebacks; what happened is in their last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _show_flags_in_help() -> None:
    """`--help` lists the flags that this command defined through this module and its neighbours."""
    for module, defined in FLAGS.flags_by_module_dict().items():
        if module.startswith(("experiments.", "ml_collections.config_flags.")):
            for flag in defined:
                FLAGS.register_key_flag_for_module(sys.argv[0], flag)


def _print(result: dict[str, Any]) -> None:
    sys.stdout.flush()
    print(json.dumps(_finite(result)), flush=True)


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _exit(status: int, line: str) -> None:
    """Ends with the one line. What libraries' threads complain of afterwards, while they are torn
    down, would bury it."""
    sys.stdout.flush()
    print(f"{os.path.basename(sys.argv[0])}: {line}", file=sys.stderr, flush=True)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    sys.exit(status)
