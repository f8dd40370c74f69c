# SPDX-License-Identifier: Apache-2.0
"""The chat templates that come with the project, one Jinja file each."""

import functools
from pathlib import Path

BUILTIN = ("chatml", "chatml_plain", "gemma", "llama3", "qwen3")


@functools.cache
def builtin_source(name: str) -> str:
    """The Jinja source of a built-in template; KeyError for an unknown name."""
    if name not in BUILTIN:
        raise KeyError(name)
    return Path(__file__).with_name(f"{name}.jinja").read_text(encoding="utf-8")
