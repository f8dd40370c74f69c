# SPDX-License-Identifier: Apache-2.0
"""The settings that `tune` chose, as others take them up."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from lm import tuned
from lm.token_select.config import SelectConfig

COMMAND = "experiments.token_select.tune"
FIELDS = ("n_init", "n_local", "chunk", "k", "pool", "reuse")  # of a SelectConfig


def read(path: pathlib.Path) -> dict[str, Any]:
    """The choice in a file, or in tuned.json of a workdir. Raises UserError."""
    return tuned.read(path, COMMAND, (*FIELDS, "hashes"))


def apply(chosen: Mapping[str, Any], select: SelectConfig, now: Mapping[str, str]) -> SelectConfig:
    """The settings as they were chosen; says so where they were tuned for something else.

    now: `lm.tuned.hashes` of what they are used with. Raises UserError where they do not go with
    the rest of `select`.
    """
    tuned.report(chosen["hashes"], now)
    return dataclasses.replace(select, **{name: chosen[name] for name in FIELDS})
