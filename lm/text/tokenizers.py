# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: `tokenizers` JSON files, byte-level BPE trained here, and raw bytes as the default.

Special tokens are recognised wherever they stand in a text, because what is tokenised is a rendered
chat template; nothing is ever prepended or appended, because the template has written it already.
"""

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers
from absl import logging

from lm.errors import UserError
from lm.text import vocabulary
from lm.text.templates import builtin_source

TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")  # close a turn in the known chat formats
_NAMED = (
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
    "sep_token",
    "cls_token",
    "mask_token",
)
_OWN_NAMES = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
# training opens no text with a token, so whoever reads what was saved must not either
_UNOPENED = {"add_bos_token": False}


class Tokenizer(Protocol):
    """Text to token ids and back."""

    name: str  # as the user wrote it, for messages

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def fingerprint(self) -> str:
        """sha256 of the definition: equal for tokenizers that tokenise alike."""

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """Role -> token, such as {"eos_token": "</s>"}; what a chat template may refer to."""

    @property
    def chat_template(self) -> str | list[dict[str, str]] | None:
        """The tokenizer's own Jinja source, or several with names."""

    @property
    def bos(self) -> str | None:
        """The token that opens a document."""

    @property
    def eos(self) -> str | None:
        """The token that closes a document."""

    @property
    def pad(self) -> str | None:
        """The token that fills."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a generation: eos and the ends of turn of the known chat formats."""

    def encode(self, text: str) -> np.ndarray:
        """Ids [n] int32; special tokens in the text are recognised, nothing is added."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text."""

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids [n] int32 and their characters [n, 2] int32; bytes of a character share its range."""

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special: bool = False) -> str:
        """Text of the ids: broken UTF-8 as U+FFFD, nothing for ids beyond the vocabulary."""

    def token_id(self, token: str) -> int | None:
        """Id of a whole token by its text."""

    def token_text(self, token_id: int) -> str:
        """A printable name of one token."""

    def add_tokens(self, tokens: Sequence[str]) -> "Tokenizer":
        """A tokenizer with these as whole tokens: new ids in this order, known ones keep theirs."""

    def save(self, directory: str | Path) -> None:
        """Writes tokenizer.json and its companions, for `load_tokenizer` and Hugging Face."""


class _Common:
    """What every tokenizer derives from `special_tokens` and `token_id`."""

    @property
    def bos(self) -> str | None:
        return self.special_tokens.get("bos_token")

    @property
    def eos(self) -> str | None:
        return self.special_tokens.get("eos_token")

    @property
    def pad(self) -> str | None:
        return self.special_tokens.get("pad_token")

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        ids = [self.token_id(token) for token in (self.eos, *TURN_ENDS) if token is not None]
        return tuple(dict.fromkeys(i for i in ids if i is not None))

    @functools.cached_property
    def fingerprint(self) -> str:
        parsed = json.loads(self.definition)
        # Truncation and padding are settings of a caller, and never applied here.
        parsed.pop("truncation", None)
        parsed.pop("padding", None)
        text = json.dumps([parsed, dict(self.special_tokens)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def save(
        self, directory: str | Path, chat_template: str | list[dict[str, str]] | None = None
    ) -> None:
        own = self.chat_template if chat_template is None else chat_template
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self.settings,
            **self.special_tokens,
        }
        # An older list of added tokens would contradict tokenizer.json.
        settings.pop("added_tokens_decoder", None)
        if own is not None:
            settings["chat_template"] = own
        (directory / "tokenizer.json").write_text(self.definition, encoding="utf-8")
        _write_json(directory / "tokenizer_config.json", settings)
        _write_json(directory / "special_tokens_map.json", dict(self.special_tokens))
        if isinstance(own, str):
            (directory / "chat_template.jinja").write_text(own, encoding="utf-8")


class ByteTokenizer(_Common):
    """Ids 0..255 are the bytes of UTF-8, then come the special tokens: no file, no training."""

    name = "bytes"
    settings: Mapping[str, Any] = _UNOPENED
    special_tokens: Mapping[str, str] = _OWN_NAMES

    def __init__(self, extra_tokens: Sequence[str] = ()):
        self._tokens = (*vocabulary.SPECIAL_TOKENS, *extra_tokens)
        self._ids = {token: 256 + i for i, token in enumerate(self._tokens)}
        self._pattern = vocabulary.any_of(self._tokens)

    @property
    def vocab_size(self) -> int:
        return 256 + len(self._tokens)

    @property
    def chat_template(self) -> str:
        return builtin_source("chatml")

    @functools.cached_property
    def definition(self) -> str:
        """The same tokenizer as tokenizer.json: byte-level BPE without merges."""
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        vocab = {char: byte for byte, char in enumerate(vocabulary.byte_alphabet())}
        added = [vocabulary.added_token(token, self._ids[token]) for token in self._tokens]
        return json.dumps(
            {
                "version": "1.0",
                "truncation": None,
                "padding": None,
                "added_tokens": added,
                "normalizer": None,
                "pre_tokenizer": {**byte_level, "use_regex": True},
                "post_processor": None,
                "decoder": {**byte_level, "use_regex": True},
                "model": {"type": "BPE", "vocab": vocab, "merges": []},
            }
        )

    def encode(self, text: str) -> np.ndarray:
        parts = []
        for i, part in enumerate(self._pattern.split(text)):
            if i % 2:  # split() alternates text and captured special tokens
                parts.append(np.array([self._ids[part]], np.int32))
            elif part:
                parts.append(np.frombuffer(vocabulary.utf8(part), np.uint8).astype(np.int32))
        return np.concatenate(parts) if parts else np.zeros(0, np.int32)

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        offsets, start = [np.zeros((0, 2), np.int32)], 0
        for i, part in enumerate(self._pattern.split(text)):
            if i % 2:
                offsets.append(np.array([[start, start + len(part)]], np.int32))
            elif part:
                codes = np.frombuffer(part.encode("utf-32-le", "surrogatepass"), np.uint32)
                widths = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
                char = np.repeat(np.arange(start, start + len(part), dtype=np.int32), widths)
                offsets.append(np.stack([char, char + 1], axis=1))
            start += len(part)
        return self.encode(text), np.concatenate(offsets)

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special: bool = False) -> str:
        skipped = set(vocabulary.CONTROL_TOKENS) if skip_special else set()
        text, run = [], bytearray()
        for token_id in vocabulary.id_list(ids):
            if token_id < 256:
                run.append(token_id)
                continue
            if token_id >= self.vocab_size or self._tokens[token_id - 256] in skipped:
                continue
            text.append(run.decode("utf-8", "replace") + self._tokens[token_id - 256])
            run.clear()
        return "".join([*text, run.decode("utf-8", "replace")])

    def token_id(self, token: str) -> int | None:
        known = self._ids.get(token)
        return (
            vocabulary.utf8(token)[0]
            if known is None and len(vocabulary.utf8(token)) == 1
            else known
        )

    def token_text(self, token_id: int) -> str:
        if 0x20 <= token_id < 0x7F or token_id in (0x09, 0x0A, 0x0D):
            return chr(token_id)
        if 256 <= token_id < self.vocab_size:
            return self._tokens[token_id - 256]
        return f"<0x{token_id:02X}>" if 0 <= token_id < 256 else f"<{token_id}>"

    def add_tokens(self, tokens: Sequence[str]) -> "ByteTokenizer":
        new = [token for token in vocabulary.unique(tokens) if token not in self._ids]
        return ByteTokenizer((*self._tokens[len(vocabulary.SPECIAL_TOKENS) :], *new))


class JsonTokenizer(_Common):
    """A tokenizer.json of the `tokenizers` library, kept verbatim."""

    def __init__(
        self,
        definition: str,
        *,
        name: str,
        special_tokens: Mapping[str, str] | None = None,
        settings: Mapping[str, Any] | None = None,
        chat_template: str | list[dict[str, str]] | None = None,
    ):
        """`settings` is tokenizer_config.json, written back by `save`.

        Raises UserError when the definition does not parse or lacks a special token.
        """
        self.definition, self.name = definition, name
        self.special_tokens = dict(special_tokens or {})
        self.settings = dict(settings or {})
        self.chat_template = chat_template
        self._tokenizer = _library(definition, name)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Post-processors add the special tokens that the template writes, and trim offsets.
        self._tokenizer.post_processor = None
        self._added = self._tokenizer.get_added_tokens_decoder()
        self._byte_level = '"ByteLevel"' in json.dumps(json.loads(definition).get("decoder"))
        for role, token in self.special_tokens.items():
            if self.token_id(token) is None:
                raise UserError(f"tokenizer {name}: {role} {token!r} is not in its vocabulary")

    @functools.cached_property
    def vocab_size(self) -> int:
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._encode(text).ids, np.int32)

    def _encode(self, text: str) -> tokenizers.Encoding:
        vocabulary.utf8(text)
        return self._tokenizer.encode(text, add_special_tokens=False)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        for text in texts:
            vocabulary.utf8(text)
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        encoding = self._encode(text)
        offsets = np.array(encoding.offsets, np.int32).reshape(-1, 2)
        return np.array(encoding.ids, np.int32), offsets

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special: bool = False) -> str:
        return self._tokenizer.decode(vocabulary.id_list(ids), skip_special_tokens=skip_special)

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def token_text(self, token_id: int) -> str:
        if token_id in self._added:
            return self._added[token_id].content
        raw = self._tokenizer.id_to_token(token_id) if token_id >= 0 else None
        if raw is None:
            return f"<{token_id}>"
        if not self._byte_level:
            return raw.replace("▁", " ")
        values = bytes(vocabulary.byte_values()[char] for char in raw)
        return values.decode("utf-8", "backslashreplace")

    def add_tokens(self, tokens: Sequence[str]) -> "JsonTokenizer":
        new = [
            _plain_token(token)
            for token in vocabulary.unique(tokens)
            if self.token_id(token) is None
        ]
        library = tokenizers.Tokenizer.from_str(self.definition)
        library.add_tokens(new)
        return JsonTokenizer(
            library.to_str(),
            name=self.name,
            special_tokens=self.special_tokens,
            settings=self.settings,
            chat_template=self.chat_template,
        )


def load_tokenizer(spec: str) -> Tokenizer:
    """ "bytes", a tokenizer.json, or a directory that holds one (with its Hugging Face companions).

    Raises:
      UserError: nothing there, or nothing that can be read.
    """
    if spec == "bytes":
        return ByteTokenizer()
    path = Path(spec)
    if path.is_dir():
        file = path / "tokenizer.json"
        if not file.is_file():
            found = ", ".join(sorted(p.name for p in path.glob("tokenizer*"))) or "none"
            raise UserError(
                f"tokenizer {spec}: no tokenizer.json in the directory (found: {found})"
            )
        directory = path
    elif path.is_file():
        file, directory = path, path.parent
    else:
        raise UserError(f'tokenizer {spec}: no such file or directory, and not "bytes"')
    if file.name != "tokenizer.json":  # companions belong to the canonical name only
        return JsonTokenizer(_read_text(file), name=spec)
    settings = _read_json(directory / "tokenizer_config.json")
    special = _special_tokens(_read_json(directory / "special_tokens_map.json"))
    special |= _special_tokens(settings)
    template = settings.get("chat_template")
    if (directory / "chat_template.jinja").is_file():
        template = _read_text(directory / "chat_template.jinja")
    definition = _with_companion_tokens(
        _read_text(file), settings, _read_json(directory / "added_tokens.json"), spec
    )
    return JsonTokenizer(
        definition, name=spec, special_tokens=special, settings=settings, chat_template=template
    )


def train_bpe(
    texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = vocabulary.SPECIAL_TOKENS
) -> JsonTokenizer:
    """Byte-level BPE learnt from `texts`: any string round-trips, each digit is a token of its own.

    The special tokens take the first ids, so that padding is id 0. Equal texts give equal
    tokenizers. The vocabulary stays smaller than `vocab_size` when nothing is left to merge.
    """
    special_tokens = vocabulary.unique(special_tokens)
    least = 256 + len(special_tokens)
    if vocab_size < least:
        raise UserError(
            f"a BPE vocabulary of {vocab_size} is too small: 256 bytes and {len(special_tokens)} "
            f"special tokens need {least}"
        )
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    pre = tokenizers.pre_tokenizers
    library.pre_tokenizer = pre.Sequence(
        [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
    )
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(vocabulary.byte_alphabet()),
        show_progress=False,
    )
    # Encoding never sees the inside of a special token, so training must not either.
    pattern = vocabulary.any_of(special_tokens)
    pieces = (part for text in texts for part in pattern.split(text)[::2])
    library.train_from_iterator(pieces, trainer)
    definition = json.loads(library.to_str())
    definition["added_tokens"] = [
        vocabulary.added_token(t, i) for i, t in enumerate(special_tokens)
    ]
    chatml = {"<|im_start|>", "<|im_end|>"} <= set(special_tokens)
    tokenizer = JsonTokenizer(
        json.dumps(definition, ensure_ascii=False),
        name=f"bpe:{vocab_size}",
        special_tokens={k: t for k, t in _OWN_NAMES.items() if t in special_tokens},
        settings=_UNOPENED,
        chat_template=builtin_source("chatml") if chatml else None,
    )
    if tokenizer.vocab_size < vocab_size:
        logging.info("BPE: the texts gave %d of %d tokens", tokenizer.vocab_size, vocab_size)
    return tokenizer


def _plain_token(content: str) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(content, normalized=False, special=False)


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Role -> token; older files wrap a token in a dict of flags."""
    found = {}
    for role in _NAMED:
        token = settings.get(role)
        if isinstance(token, Mapping):
            token = token.get("content")
        if isinstance(token, str):
            found[role] = token
    return found


def _library(definition: str, name: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(definition)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"tokenizer {name}: not a tokenizer.json: {error}") from None


def _with_companion_tokens(
    definition: str, settings: Mapping[str, Any], added: Mapping[str, int], name: str
) -> str:
    """Adds the tokens that only tokenizer_config.json or added_tokens.json know, at their ids."""
    try:
        entries = {token_id: {"content": token} for token, token_id in added.items()}
        entries |= {int(i): flags for i, flags in settings.get("added_tokens_decoder", {}).items()}
        if any(not isinstance(flags["content"], str) for flags in entries.values()):
            raise TypeError("content is no text")
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"tokenizer {name}: added tokens: {type(error).__name__}: {error}"
        ) from None
    if not entries:
        return definition
    library = _library(definition, name)
    missing = [i for i in sorted(entries) if library.token_to_id(entries[i]["content"]) is None]
    for token_id in missing:
        library.add_tokens([tokenizers.AddedToken(**{"normalized": False, **entries[token_id]})])
    for token_id, flags in entries.items():
        actual = library.token_to_id(flags["content"])
        if actual != token_id:
            raise UserError(
                f"tokenizer {name}: its files disagree about {flags['content']!r}: "
                f"id {token_id} in tokenizer_config.json, {actual} in tokenizer.json"
            )
    return library.to_str() if missing else definition


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"tokenizer {path}: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a companion file, {} when there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"tokenizer {path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"tokenizer {path}: not a JSON object")
    return value


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
