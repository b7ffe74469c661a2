"""Conversations: the cache goes on from turn to turn, as one text read at once would, compressed or not."""

import dataclasses
import sys

import pytest
import torch
from test_console import Letters
from test_generate import prompts_of, tiny_model

import kvops.__main__
from kvops.cli import chat as command
from kvops.cli import models
from kvops.cli.chat import Chat
from kvops.generation.conversation import Conversation
from kvops.generation.generate import generate
from kvops.generation.options import GenerationOptions
from kvops.policies import POLICIES, Compression

TURNS = prompts_of(20, 7, 13)


def talk(conversation, turns=TURNS):
    return [[token for step in conversation.reply(turn) for token in step] for turn in turns]


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("draft", [None, "prompt_lookup", "model"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_every_answer_is_that_to_the_whole_text(window, draft, temperature):
    """The cache of earlier turns stands in for reading them again; drafts and stop tokens leave nothing behind."""
    model = tiny_model(sliding_window=window)
    stops = generate(model, TURNS[:1], max_new_tokens=9).tokens[0][4:6]
    options = {
        "max_new_tokens": 9,
        "temperature": temperature,
        "stop_tokens": stops,
        "draft": tiny_model() if draft == "model" else draft,
        "min_ngram": 1,
    }
    conversation = Conversation(model, GenerationOptions(**options), max_tokens=128)
    answers, text = talk(conversation), []
    for turn, answer in zip(TURNS, answers, strict=True):
        text += turn
        assert generate(model, [text], **options).tokens == [answer]
        text += answer
    assert conversation.tokens == text
    assert conversation.stats.prompt_tokens <= len(TURNS[-1]) + 1  # the last turn read only what was new
    assert int(conversation.cache.next_positions[0]) <= len(text)


@pytest.mark.parametrize("policy", ["standout", "h2o", "snapkv", "kvzip", "streaming"])
@pytest.mark.parametrize("chunk", [0, 8])
def test_the_cache_is_compressed_from_turn_to_turn(policy, chunk):
    model = tiny_model()
    compression = Compression(ratio=4, policy=POLICIES[policy](), protect_last=8, every=8, chunk=chunk)
    options = GenerationOptions(max_new_tokens=20, compression=compression, draft="prompt_lookup", min_ngram=1)
    conversation = Conversation(model, options, max_tokens=400)
    talk(conversation, prompts_of(100, 40, 60, 30))
    held = conversation.cache.stats()
    assert len(conversation.tokens) == 100 + 40 + 60 + 30 + 4 * 20
    budget = compression.budget(conversation.cache, len(conversation.tokens))
    assert held.blocks_in_use <= budget + conversation.cache.blocks_for(8) + 4
    assert conversation.stats.compression > 2
    positions = conversation.cache.gather(0, 0, 0)[2].tolist()
    assert positions == sorted(set(positions))


def test_a_caller_that_stops_keeps_what_it_saw():
    model = tiny_model()
    conversation = Conversation(model, GenerationOptions(max_new_tokens=12), max_tokens=128)
    steps = conversation.reply(TURNS[0])
    seen = next(steps) + next(steps) + next(steps)
    steps.close()
    assert conversation.tokens == TURNS[0] + seen
    answer = [token for step in conversation.reply(TURNS[1]) for token in step]
    assert generate(model, [TURNS[0] + seen + TURNS[1]], max_new_tokens=12).tokens == [answer]


def test_an_error_in_a_step_empties_the_cache(monkeypatch):
    model = tiny_model()
    conversation = Conversation(model, GenerationOptions(max_new_tokens=12), max_tokens=128)
    steps = conversation.reply(TURNS[0])
    next(steps)
    monkeypatch.setattr(model, "logits", lambda hidden: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(steps)
    assert conversation.tokens == []
    assert conversation.cache.stats().blocks_in_use == 0


def test_a_conversation_has_an_end():
    model = tiny_model()
    with pytest.raises(ValueError, match="max_tokens: expected at most the model's 512 positions, got 513"):
        Conversation(model, GenerationOptions(), max_tokens=513)
    conversation = Conversation(model, GenerationOptions(max_new_tokens=50), max_tokens=40)
    assert len(talk(conversation, TURNS[:1])[0]) == 20
    with pytest.raises(ValueError, match="tokens: expected fewer than 0 more tokens in this conversation of 40, got 7"):
        next(conversation.reply(TURNS[1]))
    assert len(conversation.tokens) == 40
    with pytest.raises(ValueError, match="tokens: expected at least one, got none"):
        next(conversation.reply([]))
    conversation.clear()
    assert talk(conversation, TURNS[1:2])


class Speaker(Letters):
    """Letters as tokens, and a template in which every message ends with a mark."""

    bos_token_id = None

    def encode(self, text, add_bos=None):
        return [ord(letter) - 32 for letter in text]

    def decode(self, tokens):
        return "".join(chr(32 + token) for token in tokens)

    def apply_chat_template(self, messages):
        rendered = "".join(f"{message['role'][0]}:{message['content']};" for message in messages)
        return rendered + "a:"


def say(chat, message):
    return "".join(chat.say(message))


def test_a_chat_reads_only_what_is_new():
    chat = Chat(Conversation(tiny_model(), GenerationOptions(max_new_tokens=6), max_tokens=256), Speaker())
    first = say(chat, "Hello")
    assert len(first) == 6
    assert chat.conversation.stats.prompt_tokens == len("u:Hello;a:")
    second = say(chat, "Again")
    assert chat.conversation.stats.prompt_tokens == len(";u:Again;a:") + 1  # and the last token of the answer
    text = f"u:Hello;a:{first};u:Again;a:{second}"
    assert Speaker().decode(chat.conversation.tokens) == text
    assert [message["content"] for message in chat.messages] == ["Hello", first, "Again", second]
    assert "tokens generated" in chat.report()
    assert "MiB of keys and values in use" in chat.report()
    chat.clear()
    assert say(chat, "Hello") == first


def test_a_template_that_rewrites_earlier_turns_is_read_again(capsys):
    class Rewriter(Speaker):
        def apply_chat_template(self, messages):
            return f"{len(messages)}" + super().apply_chat_template(messages)

    chat = Chat(Conversation(tiny_model(), GenerationOptions(max_new_tokens=6), max_tokens=256), Rewriter())
    say(chat, "Hello")
    say(chat, "Again")
    assert "the chat template changed earlier turns" in capsys.readouterr().err
    assert Speaker().decode(chat.conversation.tokens).startswith("3u:Hello;a:")


def test_a_message_without_room_leaves_the_conversation_as_it_was():
    chat = Chat(Conversation(tiny_model(), GenerationOptions(max_new_tokens=6), max_tokens=40), Speaker())
    say(chat, "Hello")
    messages, tokens = list(chat.messages), list(chat.conversation.tokens)
    with pytest.raises(ValueError, match="tokens: expected fewer than"):
        say(chat, "x" * 50)
    assert (chat.messages, chat.conversation.tokens) == (messages, tokens)
    assert say(chat, "ok")


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(
        models, "load_model", lambda path, device: models.LoadedDecoder(tiny_model(), Speaker(), "tiny")
    )


def test_the_command_answers_line_by_line(tiny, capsys, monkeypatch):
    lines = iter(["Hello", "", "/stats", "/nonsense", "Again", "/help", "/clear", "Hello", "/exit", "never read"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    assert kvops.__main__.main(["chat", "--max-new-tokens", "5", "--compression", "4", "--system", "Be brief"]) == 0
    out, err = capsys.readouterr()
    answers = [line for line in out.splitlines() if len(line) == 5]
    assert answers[0] == answers[-1]  # the same conversation begins again
    assert "MiB of keys and values in use" in out
    assert "/clear   begin a new conversation" in out
    assert "/nonsense: expected one of the commands" in err
    assert err.count("compression: prompt 0: asked for ratio=4") == 2  # once for each conversation
    assert next(lines) == "never read"


def test_the_command_ends_with_its_input_and_says_what_does_not_fit(tiny, capsys, monkeypatch):
    def entered(prompt=""):
        if entered.left:
            return entered.left.pop(0)
        raise EOFError

    entered.left = ["x" * 60]
    monkeypatch.setattr("builtins.input", entered)
    assert kvops.__main__.main(["chat", "--max-tokens", "50"]) == 0
    assert "next step: /clear" in capsys.readouterr().err


def test_an_interrupt_ends_the_answer_and_not_the_conversation(tiny, capsys, monkeypatch):
    chat = Chat(Conversation(tiny_model(), GenerationOptions(max_new_tokens=9), max_tokens=256), Speaker())

    def interrupted(*words, **options):
        if options.get("end") == "" and len(chat.conversation.tokens) == 0:
            raise KeyboardInterrupt
        return

    monkeypatch.setattr(command, "print", interrupted, raising=False)
    command._answer(chat, "Hello")
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]
    assert len(chat.messages[1]["content"]) == 1
    monkeypatch.undo()
    assert len(say(chat, "Again")) == 9


def test_options_of_a_conversation_are_those_of_generate():
    options = GenerationOptions(max_new_tokens=4, compression=[None, None])
    with pytest.raises(ValueError, match="compression: expected one for all prompts or 1"):
        Conversation(tiny_model(), options, max_tokens=64)
    assert dataclasses.replace(options, compression=None).max_new_tokens == 4


transformers = pytest.importorskip("transformers")


def tiny_folder(tmp_path, architecture):
    """A folder with a random model and a tokenizer of bytes, as transformers saves them."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {
        letter: number for number, letter in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    }
    vocabulary["<eos>"] = len(vocabulary)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}assistant: "
    )
    tokenizer.save_pretrained(tmp_path)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": len(vocabulary), "max_position_embeddings": 512}
    config = getattr(transformers, f"{architecture}Config")(**shape, eos_token_id=vocabulary["<eos>"])
    torch.manual_seed(2)
    getattr(transformers, f"{architecture}ForCausalLM")(config).save_pretrained(tmp_path)


@pytest.mark.parametrize("architecture", ["Llama", "Qwen3", "Gemma2"])
def test_folders_of_any_causal_model_are_talked_with(architecture, tmp_path, capsys, monkeypatch):
    """The Llama family in kvops' own decoder, others through transformers, with the same commands."""
    tiny_folder(tmp_path, architecture)
    capsys.readouterr()
    device = torch.device("cpu")
    loaded = models.load_model(tmp_path, device)
    by_transformers = architecture != "Llama"
    assert ("transformers' own modules" in capsys.readouterr().err) == by_transformers
    tokens = loaded.tokenizer.encode("Hello<eos>")
    assert loaded.tokenizer.decode(tokens) == "Hello<eos>"
    assert loaded.tokenizer.eos_token_ids == (tokens[-1],)
    assert loaded.tokenizer.apply_chat_template([{"role": "user", "content": "x"}]) == "user: x<eos>assistant: "
    theirs = models.load_model(tmp_path, device, by_transformers=True)
    expected = generate(theirs.model, [tokens], max_new_tokens=8).tokens
    assert generate(loaded.model, [tokens], max_new_tokens=8).tokens == expected
    lines = iter(["Hello", "Again", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    assert kvops.__main__.main(["chat", "--model", str(tmp_path), "--max-new-tokens", "8"]) == 0
    assert kvops.__main__.main(["generate", "Hello", "--model", str(tmp_path), "--max-new-tokens", "8"]) == 0
    assert "the chat template changed" not in capsys.readouterr().err


def test_a_press_is_not_asked_of_a_gguf_file(tmp_path):
    with pytest.raises(ValueError, match="--model: expected a Hugging Face folder or a name"):
        models.load_model(None, torch.device("cpu"), by_transformers=True)


def test_readline_is_no_requirement(monkeypatch):
    monkeypatch.setitem(sys.modules, "readline", None)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda prompt="": "/exit")
    assert next(command._lines()) == "/exit"
