"""The command line: ``python -m kvops demo | generate | chat | evaluate | warm-up | doctor``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import kvops
from kvops.cli import options
from kvops.cli.console import Parser, quiet_without_reader


def _parser() -> argparse.ArgumentParser:
    from kvops.cli import chat, evaluate, generate, warm_up

    parser = Parser(prog="kvops", description=kvops.__doc__)
    parser.add_argument("--version", action="version", version=f"kvops {kvops.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="read a long document with a real model, compressed and not, and compare")
    demo.add_argument("--quick", action="store_true", help="a shorter document and answer: within a minute on 2 cores")
    demo.add_argument("--json", type=Path, metavar="PATH", help="also write the table as JSON")
    demo.add_argument("--plot", type=Path, metavar="PATH", help="also write a PNG of per-head lengths and quality")
    options.add_model(demo)

    generate.add_arguments(commands.add_parser("generate", help="answer a prompt"))
    chat.add_arguments(commands.add_parser("chat", help="talk with a model; the cache is kept between turns"))
    evaluate.add_arguments(
        commands.add_parser("evaluate", help="measure policies on your own model, text and questions")
    )
    warm_up.add_arguments(
        commands.add_parser("warm-up", help="compile ahead what generate launches for a model and these options")
    )
    commands.add_parser("doctor", help="say what this machine can do and what is missing")
    return parser


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
            from kvops.cli import generate

            generate.run(arguments)
        elif arguments.command == "chat":
            from kvops.cli import chat

            chat.run(arguments)
        elif arguments.command == "evaluate":
            from kvops.cli import evaluate

            evaluate.run(arguments)
        elif arguments.command == "warm-up":
            from kvops.cli import warm_up

            warm_up.run(arguments)
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
