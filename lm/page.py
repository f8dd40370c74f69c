# SPDX-License-Identifier: Apache-2.0
"""A self-contained page: headings with text, tables, pictures and highlighted text under them."""

import base64
import dataclasses
import functools
import pathlib
import struct
from collections.abc import Sequence
from typing import Any

import jinja2

from lm import plots

_TEMPLATES = pathlib.Path(__file__).parent / "templates"


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph; a `hint` says what is missing, and `command` what adds it."""

    text: str
    command: str = ""
    kind: str = "text"


@dataclasses.dataclass(frozen=True)
class Code:
    """Preformatted text, behind its title when folded."""

    text: str
    title: str = ""
    folded: bool = False
    kind: str = "code"


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG on the page."""

    title: str
    png: bytes
    scale: float = 96 / plots.DPI  # pixels on the page per pixel of the image
    kind: str = "picture"

    @property
    def data(self) -> str:
        return base64.b64encode(self.png).decode()

    @property
    def width(self) -> int:
        return int(struct.unpack(">I", self.png[16:20])[0] * self.scale)


@dataclasses.dataclass(frozen=True)
class Highlights:
    """Text in pieces, each shaded from 0 (not at all) to 1; its note shows under the pointer."""

    title: str
    pieces: tuple[tuple[str, float, str], ...]  # text, shade, note
    kind: str = "highlights"


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading and what stands under it, in order."""

    title: str
    blocks: tuple[Any, ...]


def render(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The page as HTML."""
    page = _environment().get_template("report.html.jinja")
    return page.render(title=title, subtitle=subtitle, sections=sections)


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
