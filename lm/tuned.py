# SPDX-License-Identifier: Apache-2.0
"""Settings that were found for one model, tokenizer and template, kept with digests of the three:
whoever uses them for others is told."""

import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import transformer
from lm.errors import UserError
from lm.progress import say
from lm.text.chat import ChatTemplate
from lm.text.tokenizers import Tokenizer
from lm.workdir import Workdir, environment

FILE = "tuned.json"
_DIGESTED = 4096  # numbers of each parameter


def hashes(
    params: transformer.Params, tokenizer: Tokenizer, template: ChatTemplate | None
) -> dict[str, str]:
    """Digests of what settings depend on; of parameters in any dtype."""
    return {
        "model": digest(params),
        "tokenizer": tokenizer.fingerprint,
        "template": "" if template is None else template.fingerprint,
    }


def digest(params: transformer.Params) -> str:
    """Of a part of every parameter, of the last layer among layers, in bfloat16: the same for
    a checkpoint and its export in another dtype, another for one that trained on."""
    found, layers = hashlib.sha256(), params["layers"]
    apart = isinstance(layers, tuple)
    last = layers[-1] if apart else jax.tree.map(lambda x: x[-1], layers)
    for path, part in jax.tree_util.tree_leaves_with_path({**params, "layers": last}):
        keys = [entry.key for entry in path]
        part = np.asarray(part[: _DIGESTED // max(int(np.prod(part.shape[1:])), 1) + 1])
        found.update("/".join(keys).encode())
        found.update(part.reshape(-1)[:_DIGESTED].astype(jnp.bfloat16).tobytes())
    return found.hexdigest()


def differences(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Which of model, tokenizer and template are not those of then."""
    return [name for name in now if then.get(name) != now[name]]


def report(then: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Says so where settings are taken up by something else than they were tuned for."""
    different = differences(then, now)
    if different:
        say(f"tuned for another {' and '.join(different)}: tune again for settings that fit")


def write(workdir: Workdir, chosen: Mapping[str, Any], rows: list[dict[str, Any]]) -> None:
    """tuned.json of a workdir: the choice, what it was chosen from, and where. Raises RunError."""
    env = environment()
    about = {name: env[name] for name in ("commit", "device", "num_devices", "date")}
    result = {"chosen": chosen, "rows": rows, "environment": about}
    workdir.write(FILE, json.dumps(result, indent=2) + "\n")


def read(path: pathlib.Path, command: str, fields: Iterable[str]) -> dict[str, Any]:
    """The choice in a file, or in tuned.json of a workdir.

    command: what writes it, for the message.
    fields: that a choice has.

    Raises UserError.
    """
    file = path / FILE if path.is_dir() else path
    try:
        chosen = json.loads(file.read_text(encoding="utf-8"))["chosen"]
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; {command} writes it") from None
    except (ValueError, KeyError, TypeError):
        chosen = None
    if not isinstance(chosen, dict) or not set(fields) <= chosen.keys():
        raise UserError(f"{file}: not what {command} writes")
    return chosen
