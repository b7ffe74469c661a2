"""Text to token ids and back, and a model's chat template."""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvops.extras import require
from kvops.models.backends import SUPPORTED_PRE_TOKENIZERS as SUPPORTED_PRE_TOKENIZERS
from kvops.models.backends import Vocabulary, byte_level_backend, sentencepiece_backend
from kvops.models.chat import render_chat
from kvops.models.entries import Entries, as_kind


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary with its rules.

    Attributes:
        backend: the ``tokenizers.Tokenizer``, without post-processing, so that it adds no tokens to the text.
        eos_token_ids: the tokens that end an answer; may be empty.
        bos_token_id: the token that begins a text, or None.
        add_bos: whether texts begin with ``bos_token_id``.
        chat_template: Jinja source, or None.
        special_tokens: the tokens that a chat template may name, such as ``{"eos_token": "<|im_end|>"}``.
    """

    backend: Any
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    add_bos: bool = False
    chat_template: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    @property
    def vocab_size(self) -> int:
        """Tokens that this tokenizer knows; a model's embedding may have more rows."""
        return self.backend.get_vocab_size()

    def encode(self, text: str, *, parse_special: bool = True, add_bos: bool | None = None) -> list[int]:
        """The token ids of ``text``.

        Args:
            text: any text; it may be empty.
            parse_special: special tokens spelled out in the text, such as ``<|im_end|>``, become those tokens; False
                reads them as ordinary text. Use it for input that is not trusted.
            add_bos: begin with ``bos_token_id``. None: if the model has ``add_bos`` and the text does not begin with
                it, as texts from a chat template often do.

        Raises:
            TypeError: ``text`` is not a str.
            ValueError: ``add_bos=True`` for a model without such a token.
        """
        if not isinstance(text, str):
            raise TypeError(f"text: expected a str, got {type(text).__name__}")
        backend = self.backend if parse_special else self._backend_of_plain_text
        ids: list[int] = backend.encode(text, add_special_tokens=False).ids
        if add_bos is None:
            add_bos = self.add_bos and ids[:1] != [self.bos_token_id]
        if not add_bos:
            return ids
        if self.bos_token_id is None:
            raise ValueError("add_bos: expected a tokenizer that has a token for the beginning, got one without")
        return [self.bos_token_id, *ids]

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD. ``skip_special`` omits special tokens."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def stream(self, *, skip_special: bool = False) -> TextStream:
        """A decoder for one text that arrives token by token."""
        return TextStream(self, skip_special)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The conversation in the format of the model's chat template.

        Args:
            messages: ``{"role": ..., "content": ...}`` in order.
            add_generation_prompt: end with the beginning of an answer.
            variables: further variables of the template. ``tools`` and ``documents`` are None if not given.

        Raises:
            ValueError: the model has no chat template, or its template refuses these messages or fails on them.
        """
        if self.chat_template is None:
            raise ValueError(
                "messages: expected a model with a chat template, but this one has none; encode plain text"
            )
        names = {**self.special_tokens, "add_generation_prompt": add_generation_prompt, **variables}
        return render_chat(self.chat_template, messages, names)

    @functools.cached_property
    def _backend_of_plain_text(self) -> Any:
        # A copy: the setting belongs to the backend, not to the call, and threads may share a tokenizer.
        backend = copy.deepcopy(self.backend)
        backend.encode_special_tokens = True
        return backend

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Build the tokenizer from a GGUF file's metadata (see :class:`kvops.models.gguf.GGUFFile`).

        Raises:
            ValueError: no vocabulary, or a kind of tokenizer that is not supported.
        """
        entries = Entries(metadata, "the GGUF file's metadata", "tokenizer.ggml.")
        kind = entries.need("model", str)
        vocabulary = Vocabulary.from_gguf(entries)
        if kind == "gpt2":
            split = entries.get("pre", str, "default")
            backend = byte_level_backend(vocabulary, entries.strings("merges"), split)
            # Files of Llama 3 may have no such entry. llama.cpp then adds the token for this split alone.
            add_bos = split == "llama-bpe"
        elif kind == "llama":
            backend, add_bos = sentencepiece_backend(vocabulary, entries), True
        else:
            raise ValueError(
                "tokenizer.ggml.model: supported are gpt2 (byte-level pair encoding) and llama (SentencePiece's pair "
                f"encoding), got {kind}"
            )
        bos = vocabulary.special_id(entries, "bos")
        ends = [vocabulary.special_id(entries, name) for name in ("eos", "eot", "eom")]
        names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        ids = {f"{name}_token": vocabulary.special_id(entries, key) for name, key in names.items()}
        return cls(
            backend=backend,
            eos_token_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
            bos_token_id=bos,
            add_bos=bos is not None and entries.get("add_bos_token", bool, add_bos),
            chat_template=Entries(metadata, "the GGUF file's metadata", "tokenizer.").find("chat_template", str),
            special_tokens={name: vocabulary.tokens[i] for name, i in ids.items() if i is not None},
        )

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read a Hugging Face folder: ``tokenizer.json``, and the configurations beside it if they exist.

        Raises:
            FileNotFoundError: no ``tokenizer.json``.
            ValueError: a file that cannot be read.
        """
        tokenizers = require("tokenizers")
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: expected the tokenizer, but there is no such file")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises nothing narrower
            raise ValueError(f"{path}: expected a tokenizer of the tokenizers package: {error}") from error
        # Encoding must not add tokens, but only the post-processor knows whether texts begin with a special token.
        with_bos = backend.encode("a", add_special_tokens=True).ids
        backend.no_padding()
        backend.no_truncation()
        settings = read_json(folder / "tokenizer_config.json", optional=True)
        special = _special_tokens(settings, folder / "tokenizer_config.json")
        bos = backend.token_to_id(special["bos_token"]) if "bos_token" in special else None
        return cls(
            backend=backend,
            eos_token_ids=_end_ids(folder, backend, special),
            bos_token_id=bos,
            add_bos=bos is not None and with_bos[:1] == [bos],
            chat_template=_folder_chat_template(folder, settings),
            special_tokens=special,
        )


class TextStream:
    """Decodes token by token and never shows part of a character.

    The pieces from :meth:`put` and the last one from :meth:`finish` together are exactly the text of all tokens. A run
    of byte tokens (``<0xE2>``, in SentencePiece's vocabularies) is shown when it ends, because only then it is known
    whether its bytes are UTF-8.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        added = tokenizer.backend.get_added_tokens_decoder() if skip_special else {}
        self._skipped = {index for index, token in added.items() if token.special}
        # The last tokens that were shown, and the tokens held back. The former are needed because the text of a token
        # can depend on the one before it: SentencePiece drops a leading space at the beginning of a text only.
        self._ids: list[int] = []
        self._num_shown = 0
        self._shown = ""

    def put(self, token_id: int) -> str:
        """The text that ``token_id`` completes; empty while a character is unfinished."""
        token_id = int(token_id)
        self._ids.append(token_id)
        # A skipped token does not end a run of bytes.
        if token_id in self._skipped or _BYTE_TOKEN.fullmatch(self._tokenizer.backend.id_to_token(token_id) or ""):
            return ""
        text = self._tokenizer.decode(self._ids, skip_special=self._skip_special)
        # U+FFFD at the end: bytes of an unfinished character, or such a character itself, shown with the next token.
        if text.endswith("\ufffd") or len(text) <= len(self._shown):
            return ""
        fresh = text[len(self._shown) :]
        del self._ids[: self._num_shown]
        self._num_shown = len(self._ids)
        self._shown = self._tokenizer.decode(self._ids, skip_special=self._skip_special)
        return fresh

    def finish(self) -> str:
        """The text that is held back at the end. The stream can then decode another text."""
        text = self._tokenizer.decode(self._ids, skip_special=self._skip_special)
        remaining = text[len(self._shown) :]
        self._ids, self._num_shown, self._shown = [], 0, ""
        return remaining


_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """The object in a JSON file; an empty one if the file is optional and does not exist.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it does not hold a JSON object.
    """
    if optional and not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: expected this file in a Hugging Face folder, but there is none") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON: {error}") from error
    return as_kind(str(path), content, dict, "this file")


def _special_tokens(settings: Mapping[str, Any], path: Path) -> dict[str, str]:
    """The spelling of each special token that ``tokenizer_config.json`` names."""
    special = {}
    for name in _SPECIAL_NAMES:
        token = settings.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if token is not None:
            special[name] = as_kind(name, token, str, str(path))
    return special


def _end_ids(folder: Path, backend: Any, special: Mapping[str, str]) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        entries = Entries(read_json(folder / name, optional=True), str(folder / name))
        if isinstance(entries.values.get("eos_token_id"), list):
            return tuple(entries.integers("eos_token_id") or ())
        end = entries.find("eos_token_id", int)
        if end is not None:
            return (end,)
    end = backend.token_to_id(special["eos_token"]) if "eos_token" in special else None
    return () if end is None else (end,)


def _folder_chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several templates, by name
        for entry in template:
            named = Entries(as_kind("chat_template", entry, dict, "its list"), "chat_template")
            if named.need("name", str) == "default":
                return named.need("template", str)
        return None
    return Entries(settings, str(folder / "tokenizer_config.json")).find("chat_template", str)
