# SPDX-License-Identifier: Apache-2.0
"""Which implementation serves a call: a named one or a refusal, otherwise the first that can.

An op gives its implementations as a dict from name to function. Each function takes the op's
arguments, checks what it needs and raises `Unsupported` with the reason before it computes
anything. Nothing is ever dropped: an implementation that does not know an argument has to refuse
it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from absl import logging

IMPLEMENTATIONS = ("reference", "xla", "pallas_tpu", "mosaic_gpu", "triton")

# Fastest first. "reference" is not in any order: it keeps dense arrays, so it has to be asked for.
ORDER: Mapping[str, tuple[str, ...]] = {
    "tpu": ("pallas_tpu", "xla"),
    "gpu": ("mosaic_gpu", "triton", "xla"),
    "cpu": ("xla",),
}

# Part of jit's cache key, so a function traced for one platform is traced again for another.
_target_platform = jax.make_user_context(None)
_logged: set[tuple[str, str, str]] = set()
_served: dict[str, set[str]] = {}


class Unsupported(Exception):
    """The requested implementation cannot serve this call; the message says why."""


def target_platform(platform: str) -> Any:
    """Context manager: choose implementations (and block sizes) as on `platform`, whatever this
    machine is.

    For ahead-of-time compilation, where the machine that compiles is not the one that runs. It is
    part of jit's cache key. Raises ValueError unless `platform` is "cpu", "gpu" or "tpu".
    """
    if platform not in ORDER:
        raise ValueError(f"unknown platform {platform!r}; expected one of {sorted(ORDER)}")
    return _target_platform(platform)


def current_platform() -> str:
    """The platform that code is being traced for: "cpu", "gpu" or "tpu"."""
    platform = _target_platform.value or jax.default_backend()
    return {"cuda": "gpu", "rocm": "gpu"}.get(platform, platform)


def dispatch(
    op: str,
    implementation: str | None,
    candidates: Mapping[str, Callable[..., Any]],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Calls the implementation of `op` that `implementation` names, or the first in `ORDER` that
    serves the call.

    Raises ValueError for a name that is not in `IMPLEMENTATIONS`, and `Unsupported` when the named
    implementation does not exist or refuses, or when none serves (the message then gives every
    reason).
    """
    if implementation is not None:
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"unknown implementation {implementation!r} of {op}; "
                f"expected None or one of {', '.join(IMPLEMENTATIONS)}"
            )
        if implementation not in candidates:
            raise Unsupported(f"no {implementation} implementation of {op}")
        result = candidates[implementation](*args, **kwargs)
        _served.setdefault(op, set()).add(implementation)
        return result

    platform = current_platform()
    reasons = []
    for name in ORDER.get(platform, ("xla",)):
        if name not in candidates:
            continue
        try:
            result = candidates[name](*args, **kwargs)
        except Unsupported as refusal:
            reasons.append(f"{name}: {str(refusal).removeprefix(f'{name}: ')}")
            continue
        _log_once(op, platform, name, reasons)
        _served.setdefault(op, set()).add(name)
        return result
    raise Unsupported(f"no implementation of {op} on {platform}: " + ("; ".join(reasons) or "none"))


def served() -> dict[str, list[str]]:
    """The implementations that every op has been traced with in this process so far."""
    return {op: sorted(names) for op, names in sorted(_served.items())}


def _log_once(op: str, platform: str, name: str, reasons: list[str]) -> None:
    if (op, platform, name) in _logged:
        return
    _logged.add((op, platform, name))
    refused = f" ({'; '.join(reasons)})" if reasons else ""
    logging.info("%s on %s: %s%s", op, platform, name, refused)
