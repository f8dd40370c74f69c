# SPDX-License-Identifier: Apache-2.0
"""Chat templates: Jinja programs that write a conversation as the text that a model sees.

They come with checkpoints, so they are untrusted: they run in Jinja's immutable sandbox, with the
names that Hugging Face's own renderer offers.
"""

import dataclasses
import datetime
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from absl import logging

from lm.errors import UserError
from lm.text.templates import BUILTIN, builtin_source
from lm.text.tokenizers import Tokenizer

# Tokens that a built-in format rests on: without them nothing stops at the end of a turn.
_NEEDED = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "chatml_plain": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "qwen3": ("<|im_start|>", "<|im_end|>"),
}


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """One template with the special tokens that it may write."""

    name: str  # for messages
    source: str
    special_tokens: tuple[tuple[str, str], ...] = ()  # (role, token), such as ("bos_token", "<s>")
    tool_source: str | None = (
        None  # replaces `source` when tools are given, if the checkpoint has two
    )
    date: datetime.date | None = None  # what the template takes for today; None: today

    def stored(self) -> str | list[dict[str, str]]:
        """As a tokenizer's files hold it."""
        if self.tool_source is None:
            return self.source
        named = {"default": self.source, "tool_use": self.tool_source}
        return [{"name": name, "template": source} for name, source in named.items()]

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of everything that decides a rendering, the conversation apart."""
        date = self.date.isoformat() if self.date else None
        parts = [self.source, self.tool_source, sorted(self.special_tokens), date]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The text of OpenAI-style messages, ready for `Tokenizer.encode`.

        Tool-call arguments given as a JSON string are parsed first, since templates write objects.

        Raises:
          UserError: the template refuses the messages, fails on them, or leaves the sandbox.
        """
        source = self.tool_source if tools and self.tool_source else self.source
        template = _compile(source, self.name)
        now = datetime.datetime.now()
        if self.date is not None:
            now = datetime.datetime.combine(self.date, datetime.time())
        try:
            return template.render(
                messages=[_with_parsed_arguments(message) for message in messages],
                tools=list(tools) if tools else None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                strftime_now=now.strftime,
                **dict(self.special_tokens),
            )
        except jinja2.TemplateError as error:
            raise UserError(f"chat template {self.name}: {error}") from None
        except Exception as error:  # whatever a stranger's template does
            reason = f"{type(error).__name__}: {error}"
            raise UserError(
                f"chat template {self.name} failed on this conversation: {reason}"
            ) from None


def load_template(
    spec: str | None, tokenizer: Tokenizer, *, date: datetime.date | None = None
) -> ChatTemplate:
    """A template by name, by file, or (None or "") the tokenizer's own.

    Args:
      spec: one of `BUILTIN`, the path of a Jinja file, or None.
      tokenizer: gives the special tokens, and its own template.
      date: fixes what the template takes for today, so that a long run does not change at midnight.

    Raises:
      UserError: no such template, the tokenizer has none, or the Jinja does not parse.
    """
    tool_source = None
    if not spec:
        name = f"of tokenizer {tokenizer.name}"
        source, tool_source = _own_sources(tokenizer)
    elif spec in BUILTIN:
        name, source = spec, builtin_source(spec)
        missing = [token for token in _NEEDED[spec] if tokenizer.token_id(token) is None]
        if missing:
            logging.warning(
                "template %s writes %s, which tokenizer %s splits into pieces: add them as tokens, "
                "or generation will not stop at the end of a turn",
                *(spec, ", ".join(missing), tokenizer.name),
            )
    else:
        name, source = spec, _read_source(spec)
    for text in filter(None, (source, tool_source)):
        _compile(text, name)
    special = tuple(sorted(tokenizer.special_tokens.items()))
    return ChatTemplate(name, source, special, tool_source, date)


def _read_source(spec: str) -> str:
    try:
        return Path(spec).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        builtin = ", ".join(BUILTIN)
        raise UserError(
            f"chat template {spec}: not a built-in ({builtin}) and not a readable file: {error}"
        ) from None


def _own_sources(tokenizer: Tokenizer) -> tuple[str, str | None]:
    """The tokenizer's default template, and the one it keeps for tools."""
    own = tokenizer.chat_template
    if isinstance(own, str):
        return own, None
    try:
        named = {entry["name"]: entry["template"] for entry in own or ()}
    except (TypeError, KeyError):
        raise UserError(
            f"tokenizer {tokenizer.name}: chat_template is neither a text nor a list of names with "
            "templates"
        ) from None
    if "default" not in named:
        having = f" named default (only {', '.join(named)})" if named else ""
        raise UserError(
            f"tokenizer {tokenizer.name} has no chat template{having}; "
            f"pass --config.data.template=NAME or FILE (built in: {', '.join(BUILTIN)})"
        )
    return named["default"], named.get("tool_use")


def _with_parsed_arguments(message: Mapping[str, Any]) -> dict[str, Any]:
    message = dict(message)
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        call = dict(call)
        function = dict(call["function"]) if "function" in call else call
        if isinstance(function.get("arguments"), str):
            try:
                parsed = json.loads(function["arguments"])
            except json.JSONDecodeError:
                parsed = None
            if isinstance(parsed, dict):  # anything else stays as the model wrote it
                function["arguments"] = parsed
        if "function" in call:
            call["function"] = function
        calls.append(call)
    return {**message, "tool_calls": calls}


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text in some templates; it changes nothing."""

    tags = frozenset({"generation"})

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(lineno)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, where Jinja's own filter would escape for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Raises at the first unsafe access, where Jinja would print nothing until it is used."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        raise jinja2.sandbox.SecurityError(f"access to {attribute!r} is unsafe")


@functools.cache
def _environment() -> _Sandbox:
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.filters["tojson"] = _tojson
    return environment


@functools.lru_cache(maxsize=64)
def _compile(source: str, name: str) -> jinja2.Template:
    try:
        return _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"chat template {name}, line {error.lineno}: {error.message}") from None
