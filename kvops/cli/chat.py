"""``python -m kvops chat``: a conversation whose cache is kept, and compressed, from turn to turn."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator

from kvops.cli import models, options
from kvops.cli.environment import chosen_device
from kvops.cli.generate import settings_of, summary
from kvops.generation.conversation import Conversation
from kvops.models.tokenizer import Tokenizer

_HELP = """/stats   statistics of the last answer and of the cache
/clear   begin a new conversation
/help    this list
/exit    end; so does Ctrl-D. Ctrl-C stops an answer"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", metavar="TEXT", help="a system message that begins the conversation")
    parser.add_argument(
        "--max-tokens", type=int, default=4096, metavar="N", help="the most tokens of the conversation; default: 4096"
    )
    options.add_sampling(parser)
    options.add_compression(parser)
    options.add_drafts(parser)
    options.add_model(parser)


def run(arguments: argparse.Namespace) -> None:
    options.expect_effect(arguments)
    compression = options.compression_of(arguments)
    device = chosen_device(arguments.device)
    model, tokenizer, name = models.load_model(arguments.model, device)
    settings = settings_of(arguments, tokenizer, compression, device)
    longest = min(arguments.max_tokens, model.config.max_positions)
    chat = Chat(Conversation(model, settings, max_tokens=longest), tokenizer, arguments.system)
    print(f"{name}, conversations of up to {longest} tokens. /help lists the commands.", file=sys.stderr)
    for line in _lines():
        if line == "/exit":
            return
        _answer(chat, line)


def _lines() -> Iterator[str]:
    """The lines of the input, without empty ones."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - lets input() edit lines and remember them
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line:
            yield line


def _answer(chat: Chat, line: str) -> None:
    """Run a command, or print the answer to a message as it is generated."""
    if line == "/help":
        print(_HELP)
    elif line == "/clear":
        chat.clear()
    elif line == "/stats":
        print(chat.report())
    elif line.startswith("/"):
        print(f"{line}: expected one of the commands\n{_HELP}", file=sys.stderr)
    else:
        try:
            for text in chat.say(line):
                print(text, end="", flush=True)
        except KeyboardInterrupt:
            pass  # the answer ends here
        except ValueError as error:
            print(f"{error}; next step: /clear", file=sys.stderr)
        print(flush=True)
        for sentence in chat.news():
            print(sentence, file=sys.stderr)


class Chat:
    """Messages, rendered by the model's chat template, over a :class:`Conversation` of tokens."""

    def __init__(self, conversation: Conversation, tokenizer: Tokenizer, system: str | None = None) -> None:
        self.conversation, self.tokenizer = conversation, tokenizer
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._told: list[str] = []
        self.clear()

    def clear(self) -> None:
        """Begin a new conversation."""
        self.conversation.clear()
        self.messages = list(self._system)
        self._unmet: list[str] = []

    def say(self, message: str) -> Iterator[str]:
        """Send a message and yield the answer as it is generated. Generated text stays if the caller stops early.

        Raises ValueError if the conversation has no room for it; the conversation is then not changed.
        """
        messages = [*self.messages, {"role": "user", "content": message}]
        steps = self.conversation.reply(self._new_tokens(self.tokenizer.apply_chat_template(messages)))
        step: list[int] | None = next(steps)  # raises if there is no room
        answer: list[int] = []
        words = self.tokenizer.stream()
        try:
            while step is not None:
                new = [token for token in step if token not in self.tokenizer.eos_token_ids]
                answer += new
                yield "".join(map(words.put, new))
                step = next(steps, None)
            yield words.finish()
        finally:
            self.messages = [*messages, {"role": "assistant", "content": self.tokenizer.decode(answer)}]
            steps.close()

    def _new_tokens(self, text: str) -> list[int]:
        """The tokens of a rendered conversation that the cache does not hold yet.

        A template may rewrite earlier turns, and an interrupted step empties the cache. In both cases all tokens are
        read again into an empty cache.
        """
        tokenizer, tokens = self.tokenizer, self.conversation.tokens
        if not tokens:
            return tokenizer.encode(text)
        held = tokenizer.decode(tokens)
        if tokens[0] == tokenizer.bos_token_id and not text.startswith(held):
            held = tokenizer.decode(tokens[1:])  # from encode(), not from the template
        if len(text) > len(held) and text.startswith(held):
            return tokenizer.encode(text[len(held) :], add_bos=False)
        print("the chat template changed earlier turns: the conversation is read again", file=sys.stderr)
        self.conversation.clear()
        return tokenizer.encode(text)

    def report(self) -> str:
        """Statistics of the last answer and of the cache."""
        return f"{summary(self.conversation.stats)}\n{self.conversation.cache.stats()}"

    def news(self) -> list[str]:
        """The options that the last turn did not meet, without kinds that the turn before already reported."""
        unmet = self.conversation.stats.unmet
        kinds = [sentence.partition(":")[0] for sentence in self._unmet]
        self._unmet = list(unmet)
        return [sentence for sentence in unmet if sentence.partition(":")[0] not in kinds]
