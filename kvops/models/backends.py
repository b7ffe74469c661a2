"""GGUF vocabularies as tokenizers of the ``tokenizers`` package."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from kvops.extras import require
from kvops.models.entries import Entries

# The splits before byte-pair encoding, by their names in GGUF. A vocabulary needs the split that its merges were
# learned with.
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
    # llama.cpp's default.
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
SUPPORTED_PRE_TOKENIZERS = tuple(_SPLITS)


# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

SPACE = "\u2581"  # how SentencePiece writes a space


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a GGUF file: token ``i`` is spelled ``tokens[i]`` and is of the type ``kinds[i]``."""

    tokens: list[str]
    kinds: list[int]

    @classmethod
    def from_gguf(cls, entries: Entries) -> Vocabulary:
        """Raises ValueError for a missing or misshapen vocabulary."""
        tokens, kinds = entries.strings("tokens"), entries.integers("token_type")
        if not tokens:
            raise ValueError(f"{entries.prefix}tokens: expected in {entries.source}, but there are none")
        if kinds is None:
            raise ValueError(f"{entries.prefix}token_type: expected in {entries.source}, but it is not there")
        if len(kinds) != len(tokens):
            raise ValueError(
                f"{entries.prefix}token_type: expected one for each of the {len(tokens)} tokens in {entries.source}, "
                f"got {len(kinds)}"
            )
        repeated = [token for token, count in Counter(tokens).items() if count > 1]
        if repeated:
            raise ValueError(
                f"{entries.prefix}tokens: expected different tokens in {entries.source}, got {repeated[0]!r} twice"
            )
        return cls(tokens, kinds)

    def special_id(self, entries: Entries, name: str) -> int | None:
        """A token that the metadata names, such as ``eos``; None if it names none."""
        index = entries.find(f"{name}_token_id", int)
        if index is not None and not 0 <= index < len(self.tokens):
            raise ValueError(
                f"{entries.prefix}{name}_token_id: expected one of the {len(self.tokens)} tokens in {entries.source}, "
                f"got {index}"
            )
        return index

    def ids(self) -> dict[str, int]:
        """Token to id."""
        return {token: index for index, token in enumerate(self.tokens)}

    def of_kind(self, *kinds: int) -> list[str]:
        """The tokens of these types, in order."""
        return [token for token, kind in zip(self.tokens, self.kinds, strict=True) if kind in kinds]


def byte_level_backend(vocabulary: Vocabulary, merges: list[str] | None, split: str) -> Any:
    """Byte-level pair encoding, as in GPT-2, Llama 3 and Qwen2.

    Raises:
        ValueError: a split that is not supported, no merges, or merges that do not make tokens.
    """
    tokenizers = require("tokenizers")
    if split not in _SPLITS:
        raise ValueError(f"tokenizer.ggml.pre: supported are {', '.join(SUPPORTED_PRE_TOKENIZERS)}; got {split}")
    if merges is None:
        raise ValueError("tokenizer.ggml.merges: expected in the GGUF file's metadata, but they are not there")
    try:
        model = tokenizers.models.BPE(
            vocab=vocabulary.ids(),
            merges=[tuple(merge.split(" ", 1)) for merge in merges],
            ignore_merges=split == "llama-bpe",  # its vocabulary has whole words that merges do not reach
        )
    except Exception as error:  # the package raises no narrower type
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
    _add_tokens(backend, vocabulary)
    return backend


def sentencepiece_backend(vocabulary: Vocabulary, entries: Entries) -> Any:
    """SentencePiece's pair encoding with bytes for unknown characters, as in Llama 2 and Mistral.

    The file has a score for each token in place of merges: SentencePiece joins the pair whose union has the best score.
    A space is added before the text and after each special token, as in llama.cpp and in the files of Meta and Mistral.

    Raises:
        ValueError: scores that are missing or do not rank the tokens, or a step of SentencePiece that is not supported.
    """
    tokenizers = require("tokenizers")
    entries.only("remove_extra_whitespaces", False)
    if entries.find("precompiled_charsmap", list):
        raise ValueError(f"{entries.prefix}precompiled_charsmap: a normalisation is not supported, got one")
    unknown = vocabulary.of_kind(_UNKNOWN)
    model = tokenizers.models.BPE(
        vocab=vocabulary.ids(),
        merges=_merges_of_scores(vocabulary, entries),
        byte_fallback=True,
        unk_token=unknown[0] if unknown else None,
        fuse_unk=True,
    )
    backend = tokenizers.Tokenizer(model)
    prefixed = entries.get("add_space_prefix", bool, True)
    spaces = tokenizers.normalizers.Replace(" ", SPACE)
    if prefixed:
        spaces = tokenizers.normalizers.Sequence([tokenizers.normalizers.Prepend(SPACE), spaces])
    backend.normalizer = spaces
    decoders = tokenizers.decoders
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefixed:
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)
    _add_tokens(backend, vocabulary)
    return backend


def _merges_of_scores(vocabulary: Vocabulary, entries: Entries) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, those with the best scores first.

    Without control tokens, bytes and user-defined tokens, which SentencePiece never makes from characters.
    """
    scores = entries.find("scores", list)
    if scores is None:
        raise ValueError(f"{entries.prefix}scores: expected in {entries.source}, but they are not there")
    if len(scores) != len(vocabulary.tokens):
        raise ValueError(
            f"{entries.prefix}scores: expected one for each of the {len(vocabulary.tokens)} tokens, "
            f"got {len(scores)} in {entries.source}"
        )
    pieces = set(vocabulary.of_kind(_NORMAL, _UNUSED))
    ranked: list[tuple[float, str, str]] = []
    for token, kind, score in zip(vocabulary.tokens, vocabulary.kinds, scores, strict=True):
        if token not in pieces:
            continue
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        halves = [(left, right) for left, right in halves if left in pieces and right in pieces]
        if halves and kind == _UNUSED:
            raise ValueError(
                f"{entries.prefix}token_type: unused tokens that others make are not supported, got {token!r}"
            )
        ranked.extend((score, left, right) for left, right in halves)
    if len({score for score, _, _ in ranked}) == 1 < len({left + right for _, left, right in ranked}):
        raise ValueError(f"{entries.prefix}scores: expected scores that rank the tokens, got {ranked[0][0]} for all")
    # The pairs of one token are in the order of transformers: the longer left half first.
    ranked.sort(key=lambda merge: (-merge[0], -len(merge[1])))
    return [(left, right) for _, left, right in ranked]


def _add_tokens(backend: Any, vocabulary: Vocabulary) -> None:
    """Make control tokens special, and match user-defined tokens in the text before all others."""
    tokenizers = require("tokenizers")
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [tokenizers.AddedToken(t, special=special, normalized=False) for t in vocabulary.of_kind(kind)]
        (backend.add_special_tokens if special else backend.add_tokens)(added)
