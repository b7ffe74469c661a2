"""Text to token ids and back, and a model's chat template."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvops.extras import require
from kvops.models.chat import render_chat

# The splits that precede byte-pair encoding, by GGUF's names for them. The vocabularies come from different makers:
# each is only right with the split that its merges were learned with.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS_AND_SPACES = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_SIGNS_AND_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_SIGNS_AND_SPACES}"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SPLITS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    # SmolLM's and SmolLM2's own tokenizer.json: each digit by itself, then GPT-2's split.
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    # What llama.cpp does with a file that does not say.
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
SUPPORTED_PRE_TOKENIZERS = tuple(_SPLITS)

_CONTROL, _USER_DEFINED = 3, 4  # in tokenizer.ggml.token_type


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary with its rules.

    Attributes:
        backend: the ``tokenizers.Tokenizer`` underneath, without post-processing: what it returns is the text alone.
        eos_token_ids: the tokens that end an answer; may be empty.
        bos_token_id: the token that begins a text, or None.
        add_bos: whether the model wants its texts to begin with ``bos_token_id``.
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
            text: any text, also an empty one.
            parse_special: special tokens spelled out in the text, such as ``<|im_end|>``, become those tokens; False
                takes them for ordinary text, as is right for input that is not trusted.
            add_bos: begin with ``bos_token_id``. None: if the model wants it and the text does not have it already,
                as texts from a chat template often do.

        Raises:
            TypeError: ``text`` is not a str.
            ValueError: ``add_bos=True`` where the model has no such token.
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
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD. ``skip_special`` leaves special tokens out."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def stream(self, *, skip_special: bool = False) -> TextStream:
        """A decoder of one text that comes token by token."""
        return TextStream(self, skip_special)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The conversation as the model was trained to read it.

        Args:
            messages: ``{"role": ..., "content": ...}`` in order.
            add_generation_prompt: end with the beginning of an answer.
            variables: further names that the template knows, such as ``tools``.

        Raises:
            ValueError: the model has no chat template, or its template refuses these messages.
        """
        if self.chat_template is None:
            raise ValueError(
                "messages: expected a model with a chat template, but this one has none; encode plain text"
            )
        names = {**self.special_tokens, "add_generation_prompt": add_generation_prompt, **variables}
        return render_chat(self.chat_template, messages, names)

    @functools.cached_property
    def _backend_of_plain_text(self) -> Any:
        # A second one, since the setting is the backend's and not the call's: threads may share a tokenizer.
        backend = copy.deepcopy(self.backend)
        backend.encode_special_tokens = True
        return backend

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Build the tokenizer from a GGUF file's metadata (see :class:`kvops.models.gguf.GGUFFile`).

        Raises:
            ValueError: no vocabulary, or a kind of tokenizer that is not supported; the message says what is.
        """
        kind = metadata.get("tokenizer.ggml.model")
        if kind != "gpt2":
            raise ValueError(f"tokenizer.ggml.model: supported is gpt2 (byte-level pair encoding), got {kind}")
        split = metadata.get("tokenizer.ggml.pre", "default")
        if split not in _SPLITS:
            raise ValueError(f"tokenizer.ggml.pre: supported are {', '.join(SUPPORTED_PRE_TOKENIZERS)}; got {split}")
        tokens = _entry(metadata, "tokens")
        bos = metadata.get("tokenizer.ggml.bos_token_id")
        ends = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
        names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        ids = {f"{name}_token": metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
        return cls(
            backend=_byte_level_backend(tokens, _entry(metadata, "merges"), _entry(metadata, "token_type"), split),
            eos_token_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
            bos_token_id=bos,
            # Llama 3's files may leave it out; llama.cpp then adds the token for this split alone.
            add_bos=bos is not None and metadata.get("tokenizer.ggml.add_bos_token", split == "llama-bpe"),
            chat_template=metadata.get("tokenizer.chat_template"),
            special_tokens={name: tokens[i] for name, i in ids.items() if i is not None},
        )

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read a Hugging Face folder: ``tokenizer.json`` and, where there, the configurations beside it.

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
        # Encoding must give the text alone, but the post-processor is what knows whether the model wants a beginning.
        with_bos = backend.encode("a", add_special_tokens=True).ids
        backend.no_padding()
        backend.no_truncation()
        settings = read_json(folder / "tokenizer_config.json", missing={})
        special = {name: _text_of(settings[name]) for name in _SPECIAL_NAMES if settings.get(name) is not None}
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
    """Decodes token by token without ever showing half of a character.

    What :meth:`put` returns, one after another, and :meth:`finish` at the end, make exactly the text of all tokens.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        # The tokens shown last and those held back. The former stay because how a token is spelled can depend on its
        # forerunner: SentencePiece's leading space is dropped at the beginning of a text only.
        self._ids: list[int] = []
        self._num_shown = 0
        self._shown = ""

    def put(self, token_id: int) -> str:
        """The text that ``token_id`` completes; empty while a character is unfinished."""
        self._ids.append(int(token_id))
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
        """What is held back at the end of the text; the stream can then decode another one."""
        text = self._tokenizer.decode(self._ids, skip_special=self._skip_special)
        rest = text[len(self._shown) :]
        self._ids, self._num_shown, self._shown = [], 0, ""
        return rest


_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def _entry(metadata: Mapping[str, Any], name: str) -> list[Any]:
    try:
        return metadata[f"tokenizer.ggml.{name}"]
    except KeyError:
        raise ValueError(f"tokenizer.ggml.{name}: expected in the file's metadata, but there is none") from None


def _byte_level_backend(tokens: list[str], merges: list[str], kinds: list[int], split: str) -> Any:
    tokenizers = require("tokenizers")
    try:
        model = tokenizers.models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ", 1)) for merge in merges],
            ignore_merges=split == "llama-bpe",  # its vocabulary has whole words that no merge leads to
        )
    except Exception as error:  # the package raises nothing narrower
        raise ValueError(f"tokenizer.ggml.merges: expected pairs of tokens that make tokens: {error}") from error
    backend = tokenizers.Tokenizer(model)
    if split == "qwen2":
        backend.normalizer = tokenizers.normalizers.NFC()
    steps = tokenizers.pre_tokenizers
    backend.pre_tokenizer = steps.Sequence(
        [steps.Split(tokenizers.Regex(pattern), behavior="isolated") for pattern in _SPLITS[split]]
        + [steps.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [
            tokenizers.AddedToken(token, special=special, normalized=False)
            for token, its_kind in zip(tokens, kinds, strict=True)
            if its_kind == kind
        ]
        (backend.add_special_tokens if special else backend.add_tokens)(added)
    return backend


def read_json(path: Path, missing: Any = None) -> Any:
    """The content of a JSON file; ``missing`` where there is none and it is not None."""
    if missing is not None and not path.is_file():
        return missing
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: expected this file in a Hugging Face folder, but there is none") from None
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON: {error}") from error


def _text_of(token: Any) -> str:
    return token["content"] if isinstance(token, Mapping) else token


def _end_ids(folder: Path, backend: Any, special: Mapping[str, str]) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        ids = read_json(folder / name, missing={}).get("eos_token_id")
        if ids is not None:
            return (ids,) if isinstance(ids, int) else tuple(ids)
    end = backend.token_to_id(special["eos_token"]) if "eos_token" in special else None
    return () if end is None else (end,)


def _folder_chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template
