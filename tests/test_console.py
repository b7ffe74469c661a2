"""Command lines: in pipes, with misspelt options and names, and with requests that cannot be met."""

import io
import subprocess
import sys
from argparse import ArgumentTypeError
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_generate import tiny_model

import bench.__main__
import bench.gpu.__main__
import bench.overhead
import bench.throughput
import kvops.__main__
import kvops.autotune.__main__
from kvops.cli import console, models
from kvops.cli.console import positive, quiet_without_reader
from kvops.cli.environment import chosen_device

COMMANDS = [
    kvops.__main__,
    kvops.autotune.__main__,
    bench.__main__,
    bench.gpu.__main__,
    bench.overhead,
    bench.throughput,
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda module: module.__name__)
def test_every_command_line_is_one(command):
    assert command.main.__wrapped__.__module__ == command.__name__


@pytest.mark.parametrize("lines", [1, 100_000], ids=["kept until the end", "more than a pipe holds"])
@pytest.mark.parametrize("ending", ["return 0", "raise SystemExit(0)"])
def test_a_reader_that_leaves_is_no_error(lines, ending):
    # Loaded by its path: without torch, in a tenth of a second.
    code = f"""
import sys
sys.path.insert(0, {str(Path(console.__file__).parent)!r})
from console import quiet_without_reader
@quiet_without_reader
def main():
    sys.stdin.read()
    for line in range({lines}):
        print(line)
    {ending}
sys.exit(main())
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        process.stdout.close()
        process.stdin.close()
        complaint = process.stderr.read()
    assert complaint == b""
    assert process.returncode == 141


def test_another_broken_pipe_is_an_error():
    @quiet_without_reader
    def main() -> int:
        raise BrokenPipeError("a worker left")

    with pytest.raises(BrokenPipeError, match="a worker left"):
        main()


def test_the_exit_code_is_that_of_the_command():
    assert quiet_without_reader(lambda code: code)(3) == 3


def test_a_count_is_at_least_one():
    assert positive("12") == 12
    for text in ("0", "-3", "two", ""):
        with pytest.raises(ArgumentTypeError, match="expected a number of at least 1, got"):
            positive(text)


@pytest.mark.parametrize("name", ["nonsense", "meta", "cuda:99"])
def test_a_device_that_is_not_here_is_named(name, capsys):
    with pytest.raises(ValueError, match=f"--device: expected a device that is here, got {name}"):
        chosen_device(name)
    for command in (["generate", "--prompt", "Hi"], ["demo"]):
        assert kvops.__main__.main([*command, "--device", name]) == 2
        assert "--device: expected a device that is here" in capsys.readouterr().err
    assert bench.__main__.main(["run", "--device", name]) == 2


def test_an_option_that_nothing_would_come_of_is_refused(capsys):
    """``--policy standout`` alone compressed nothing, and said nothing."""
    for option, message in (
        (["--policy", "standout"], "--policy: expected along with --compression or --cache-mib"),
        (["--compress-every", "8"], "--compress-every: expected along with --compression or --cache-mib"),
        (["--chunk", "8"], "--chunk: expected along with --compression or --cache-mib"),
        (["--compression", "4", "--policy", "best"], "--policy: expected one of ada-kv"),
        (["--tree", "2"], "--tree: expected along with --draft"),
        (["--top-p", "0.9"], "--top-p: expected along with --temperature above 0"),
        (["--top-k", "5", "--temperature", "0"], "--top-k: expected along with --temperature above 0"),
    ):
        assert kvops.__main__.main(["generate", "--prompt", "Hi", *option]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--promt", "Hi"], "--promt: expected an option of this command; did you mean --prompt?"),
        (
            ["generate", "--compresion=4"],
            "--compresion: expected an option of this command; did you mean --compression",
        ),
        (["generate", "--xyzzy"], "--xyzzy: expected an option of this command\n"),
        (["demo", "--jsn", "x"], "did you mean --json?"),
        (["doctor", "--model", "x"], "--model: expected an option of this command\n"),
    ],
)
def test_a_misspelt_option_is_answered_with_the_one_it_resembles(arguments, message, capsys):
    """It was answered with "the following arguments are required: --prompt"."""
    with pytest.raises(SystemExit, match="2"):
        kvops.__main__.main(arguments)
    assert message in capsys.readouterr().err


class Letters:
    """A tokenizer whose token ids are the places of letters."""

    eos_token_ids = ()

    def encode(self, text):
        return [ord(letter) % 97 for letter in text]

    def apply_chat_template(self, messages):
        return messages[-1]["content"]

    def stream(self):
        return SimpleNamespace(put=lambda token: chr(32 + token), finish=lambda: "")


@pytest.fixture
def tiny(monkeypatch):
    """The commands load a tiny model."""
    monkeypatch.setattr(models, "load_model", lambda path, device: (tiny_model(), Letters(), "tiny"))


def test_a_compression_that_does_nothing_is_said(tiny, capsys):
    """37 tokens, 36 of them protected, and no further compression: ``--compression 4`` kept everything without a
    word."""
    assert kvops.__main__.main(["generate", "x" * 37, "--compression", "4", "--max-new-tokens", "8"]) == 0
    *_, line, unmet = capsys.readouterr().err.splitlines()
    assert "12 blocks, 1.0x smaller than a whole one" in line
    assert unmet == (
        "compression: prompt 0: asked for ratio=4, 3 of the 12 blocks of 37 tokens; kept 12, which the protected "
        "tokens alone take (4 first, 32 last)"
    )
    assert kvops.__main__.main(["generate", "x" * 300, "--compression", "4", "--max-new-tokens", "8"]) == 0
    *_, line = capsys.readouterr().err.splitlines()
    assert "3.5x smaller than a whole one" in line


def test_drafts_that_are_never_made_are_said(tiny, capsys):
    assert kvops.__main__.main(["generate", "abcdefgh", "--drafts", "--max-new-tokens", "2"]) == 0
    assert "draft: asked for drafts, none was made: max_new_tokens=2" in capsys.readouterr().err


def test_a_prompt_is_an_argument_or_an_option(tiny, capsys, monkeypatch):
    answers = []
    for arguments in (["abc"], ["--prompt", "abc"], ["-"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("abc"))
        assert kvops.__main__.main(["generate", "--max-new-tokens", "4", *arguments]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] == answers[2] != ""
    for arguments in ([], ["abc", "--prompt", "abc"]):
        assert kvops.__main__.main(["generate", *arguments]) == 2
        assert "PROMPT: expected one text to answer, or - to read it" in capsys.readouterr().err


def test_a_value_that_begins_with_a_dash_is_not_taken_for_an_option():
    parser = console.Parser()
    parser.add_argument("--number", type=float)
    parser.add_argument("rest", nargs="*")
    assert parser.parse_args(["--number", "-1"]).number == -1
    assert parser.parse_args(["--", "--not-an-option"]).rest == ["--not-an-option"]
    assert parser.parse_args(["-", "--number=2"]).rest == ["-"]


def test_a_misspelt_name_is_answered_with_those_it_resembles(capsys):
    assert kvops.__main__.main(["generate", "--prompt", "Hi", "--compression", "4", "--policy", "snapvk"]) == 2
    assert "got 'snapvk'; did you mean snapkv?" in capsys.readouterr().err
    assert console.suggestion("xyzzy", ["demo", "doctor"]) == ""


def test_a_table_is_aligned():
    assert console.table([("a", "bb", "c"), ("aaa", "b", None)]) == "a    bb  c\naaa  b"
    assert console.table([("a", 1)], ["name", "count"], align="lr") == "name  count\n----  -----\na         1"
    assert console.table([], ["none"]) == "none\n----"
