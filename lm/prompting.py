# SPDX-License-Identifier: Apache-2.0
"""A checkpoint with all that it takes to put a prompt to it: tokenizer, template, stop tokens."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lm import generate, setup
from lm.config import ModelConfig, SamplingConfig
from lm.errors import DataError, UserError
from lm.hf import weights
from lm.text import chat, tokenizers
from lm.transformer import Params


@dataclasses.dataclass(frozen=True, eq=False)
class Speaker:
    """A model that can be talked to; `template` None when the tokenizer comes without one."""

    model: ModelConfig
    params: Params  # as decoding wants them (`lm.generate.prepare`)
    tokenizer: tokenizers.Tokenizer
    template: chat.ChatTemplate | None
    stop_ids: tuple[int, ...]
    valid_vocab: int | None
    bos: str = ""  # opens a text that no template renders

    def rendered(self, text: str, *, chat: bool | None = None, system: str | None = None) -> str:
        """The whole text of one prompt.

        Args:
          chat: whether it is a user's message to the template; None: if there is a template.
          system: the system message before it.

        Raises:
          UserError: an empty prompt, no template though one is needed, or it refuses.
        """
        if not text:
            raise UserError("the prompt is empty")
        if chat is None:
            chat = self.template is not None
        if not chat:
            if system is not None:
                raise UserError("a system message needs a chat template")
            return self.bos + text
        if self.template is None:
            raise UserError(
                f"tokenizer {self.tokenizer.name} has no chat template; name one with --template, "
                "or continue plain text with --nochat"
            )
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": text})
        return self.template.render(messages, add_generation_prompt=True)

    def prompt(
        self, text: str, *, chat: bool | None = None, system: str | None = None
    ) -> np.ndarray:
        """The ids of one prompt; arguments and errors as for `rendered`."""
        return self.tokenizer.encode(self.rendered(text, chat=chat, system=system))

    def stream(
        self,
        prompts: Sequence[np.ndarray],
        sampling: SamplingConfig,
        key: jax.Array,
        **options: Any,
    ) -> Iterator[list[generate.Generation]]:
        """`lm.generate.stream` of this model, with its options."""
        return generate.stream(
            self.model,
            self.params,
            prompts,
            sampling,
            self.stop_ids,
            key,
            valid_vocab=self.valid_vocab,
            **options,
        )


def load_workdir(
    path: pathlib.Path, *, template: str | None = None, dtype: str | None = None
) -> Speaker:
    """The newest checkpoint of a run. Raises UserError."""
    return of_run(*setup.load_workdir(path), template=template, dtype=dtype)


def of_run(
    resolved: setup.Setup, params: Params, *, template: str | None = None, dtype: str | None = None
) -> Speaker:
    """The model of a run, from its setup and parameters. Raises UserError."""
    model = resolved.model if dtype is None else dataclasses.replace(resolved.model, dtype=dtype)
    tokenizer = resolved.tokenizer
    return Speaker(
        model=model,
        params=generate.prepare(model, params),
        tokenizer=tokenizer,
        template=chat.load_template(template, tokenizer) if template else resolved.template,
        stop_ids=tokenizer.stop_ids,
        valid_vocab=resolved.valid_vocab,
    )


def load_hf(
    path: pathlib.Path, *, template: str | None = None, dtype: str | None = None
) -> Speaker:
    """A Hugging Face directory. Raises UserError."""
    if not path.is_dir():
        raise UserError(f"{path}: no such directory")
    model = weights.read_config(path)
    tokenizer = tokenizers.load_tokenizer(str(path))
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model {model.vocab_size}"
        )
    named = chat.load_template(template, tokenizer) if template or tokenizer.chat_template else None
    if dtype is not None:
        model = dataclasses.replace(model, dtype=dtype)
    settings = getattr(tokenizer, "settings", {})
    opens = tokenizer.bos is not None and settings.get("add_bos_token", True)
    _, params = weights.load(path, dtype=model.dtype)
    return Speaker(
        model=model,
        params=generate.prepare(model, params),
        tokenizer=tokenizer,
        template=named,
        stop_ids=_stop_ids(path, tokenizer),
        valid_vocab=tokenizer.vocab_size if tokenizer.vocab_size < model.vocab_size else None,
        bos=tokenizer.bos if opens else "",
    )


def _stop_ids(path: pathlib.Path, tokenizer: tokenizers.Tokenizer) -> tuple[int, ...]:
    """The tokenizer's, and those that the checkpoint's own settings of generation name."""
    found = list(tokenizer.stop_ids)
    for fields in (weights.read_fields(path), _fields(path / "generation_config.json")):
        named = fields.get("eos_token_id")
        named = named if isinstance(named, list) else [named]
        found += [token for token in named if type(token) is int]
    return tuple(dict.fromkeys(found))


def _fields(path: pathlib.Path) -> Mapping[str, Any]:
    """A JSON object; {} when there is no such file."""
    if not path.is_file():
        return {}
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path}: not a JSON object")
    return fields


def read_lines(path: pathlib.Path) -> list[str]:
    """The lines of a text file. Raises UserError when it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    return text.split("\n")  # not splitlines: JSON may hold other characters that end lines


def read_prompts(path: pathlib.Path) -> list[str]:
    """A prompt per line that is not blank: as it is, or under "prompt" of a JSON object.

    Raises UserError when the file cannot be read or has none, DataError for a JSON object without.
    """
    lines = read_lines(path)
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line) if line.lstrip().startswith("{") else line
        except ValueError:
            record = line  # text that happens to begin with a brace
        if isinstance(record, dict):
            record = record.get("prompt")
            if not isinstance(record, str):
                raise DataError(str(path), number, "a JSON object without a text under 'prompt'")
        prompts.append(record)
    if not prompts:
        raise UserError(f"{path}: no prompts: the file is empty")
    return prompts
