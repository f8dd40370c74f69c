# SPDX-License-Identifier: Apache-2.0
"""The flags of commands that ask a chat endpoint."""

import math

from absl import flags

from lm.async_decoding.endpoint import EndpointConfig
from lm.errors import UserError

_NUMBERS = {
    "timeout": (60.0, "seconds of one attempt, its reply included"),
    "price_in": (0.0, "of a million tokens that the endpoint reads"),
    "price_out": (0.0, "of a million tokens that it writes"),
    "max_cost": (math.inf, "refuse to ask when the estimates of all that is asked come to more"),
}
_COUNTS = {"attempts": (6, "of a request"), "workers": (4, "requests under way at once")}


def define() -> None:
    """Defines --url, --model, --key_env, prices and limits."""
    flags.DEFINE_string("url", None, "of an OpenAI-compatible endpoint, without /chat/completions")
    flags.DEFINE_string("model", None, "that the endpoint is asked for")
    flags.DEFINE_string("key_env", "", "environment variable that holds the key")
    for name, (default, text) in _NUMBERS.items():
        flags.DEFINE_float(name, default, text)
    for name, (default, text) in _COUNTS.items():
        flags.DEFINE_integer(name, default, text)


def config() -> EndpointConfig:
    """What the flags say. Raises UserError."""
    found = flags.FLAGS
    if not found.url or not found.model:
        raise UserError("an endpoint needs --url and --model")
    values = {name: getattr(found, name) for name in (*_NUMBERS, *_COUNTS)}
    return EndpointConfig(found.url, found.model, found.key_env, **values)


def refuse(needed: str) -> None:
    """Raises UserError when a flag of an endpoint is given, and no endpoint is asked."""
    names = ("url", "model", "key_env", *_NUMBERS, *_COUNTS)
    given = [f"--{name}" for name in names if flags.FLAGS[name].present]
    if given:
        raise UserError(f"{', '.join(given)}: only with {needed}")
