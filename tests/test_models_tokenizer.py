"""The tokenizer and the chat template, against transformers and the definitions written out here."""

import itertools
import json
import pydoc_data.topics
from pathlib import Path

import hypothesis.strategies as st
import pytest
import regex
from hypothesis import given, settings
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from kvops.models.gguf import GGUFFile
from kvops.models.loading import load
from kvops.models.tokenizer import SUPPORTED_PRE_TOKENIZERS, Tokenizer

TOPICS = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
TEXTS = [
    "",
    " ",
    "Hello, world!",
    "I'm you're WE'LL it's 'tis don't can't've o'clock 's's",
    "3.14159 1234567890 10,000 1a2b3c v2.0 x²+½ ٣٤ Ⅻ 五十",
    "  7   8\t9\n10 \n 11\u00a012",
    "a  b   c    d\t\te\n\n\nf \n g\r\nh  ",
    "def f(x: int) -> list[int]:\n    return [i ** 2 for i in range(x) if i % 2 == 0]  # squares\n",
    "naïve café Straße ÅNGSTRÖM e\u0301",
    "日本語のテキスト。中文字符，한국어 텍스트 ไทย हिन्दी العربية עברית",
    "😀 👩‍👩‍👧‍👦 🏳️‍🌈 ✅→∑∫√∞ \u200b\ufeff\u0000\u0007",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><repo_name><|im_end| > <|not_a_token|>",
    "https://example.org/path?q=1&r=%20#frag user@example.org \\n \\t $HOME ${x} `code` ~~~",
    "_" * 70 + "=" * 33 + " " * 90 + "." * 5,
]


def byte_alphabet() -> list[str]:
    """GPT-2's letter for each byte: printable ones stand for themselves, the others are numbered from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLIT_STEPS = {
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "llama-bpe": [rf"{WORDS}|\p{{N}}{{1,3}}|{SIGNS}"],
    "qwen2": [rf"{WORDS}|\p{{N}}|{SIGNS}"],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
}


def split(text: str, name: str) -> list[str]:
    """Every step cuts each piece at its matches and keeps what lies between them."""
    pieces = [text]
    for pattern in SPLIT_STEPS[name]:
        pieces = [part for piece in pieces for part in regex.split(f"({pattern})", piece) if part]
    return pieces


def merge_bytes(piece: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding as it is defined: the best ranked neighbours are joined until there are none."""
    alphabet = byte_alphabet()
    parts = [alphabet[byte] for byte in piece.encode()]
    while True:
        pairs = [(ranks[pair], i) for i, pair in enumerate(itertools.pairwise(parts)) if pair in ranks]
        if not pairs:
            return parts
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@pytest.mark.parametrize("name", SUPPORTED_PRE_TOKENIZERS)
def test_splits_are_those_of_the_definition(name):
    letters = byte_alphabet()
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": letters,
        "tokenizer.ggml.token_type": [1] * 256,
        "tokenizer.ggml.merges": [],
    }
    backend = Tokenizer.from_gguf(metadata).backend
    for text in [*TEXTS, TOPICS[:20000]]:
        expected = ["".join(letters[byte] for byte in piece.encode()) for piece in split(text, name)]
        assert [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)] == expected


@pytest.fixture(scope="session")
def smollm2():
    return load()


@pytest.fixture(scope="session")
def transformers_tokenizer(smollm2):
    """transformers' conversion of the same file, with one step put right.

    It takes GPT-2's split for every file that says "smollm". SmolLM2's own tokenizer.json and llama.cpp both cut out
    single digits first, so that "  7" is two spaces and a digit and not two times one space and a digit.
    """
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2.path.parent, gguf_file=smollm2.path.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


@pytest.mark.model
@pytest.mark.parametrize("text", [*TEXTS, TOPICS])
def test_token_ids_equal_transformers(smollm2, transformers_tokenizer, text):
    ids = smollm2.tokenizer.encode(text)
    assert ids == transformers_tokenizer.encode(text)
    assert smollm2.tokenizer.decode(ids) == text


@pytest.mark.model
def test_token_ids_equal_the_definition(smollm2):
    metadata = GGUFFile(smollm2.path).metadata
    vocabulary = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(metadata["tokenizer.ggml.merges"])}
    for text in [*(text for text in TEXTS if "<|im_start|>" not in text), TOPICS[5000:15000]]:
        expected = [vocabulary[part] for piece in split(text, "smollm") for part in merge_bytes(piece, ranks)]
        assert smollm2.tokenizer.encode(text) == expected


@pytest.mark.model
def test_special_tokens_in_text_are_parsed_unless_told_otherwise(smollm2):
    tokenizer = smollm2.tokenizer
    assert tokenizer.encode("<|im_start|>hi<|im_end|>") == [1, *tokenizer.encode("hi"), 2]
    plain = tokenizer.encode("<|im_start|>hi<|im_end|>", parse_special=False)
    assert min(plain) > 16
    assert tokenizer.decode(plain) == "<|im_start|>hi<|im_end|>"
    assert tokenizer.encode("<|im_end|>") == [2]  # the setting did not stick
    assert tokenizer.decode([1, *tokenizer.encode("hi"), 2], skip_special=True) == "hi"
    assert tokenizer.eos_token_ids == (2,)
    assert (tokenizer.bos_token_id, tokenizer.add_bos, tokenizer.vocab_size) == (1, False, 49152)
    assert tokenizer.encode("hi", add_bos=True)[0] == 1
    with pytest.raises(TypeError, match="text: expected a str, got list"):
        tokenizer.encode(["hi"])


@pytest.mark.model
def test_chat_template_equals_transformers(smollm2, transformers_tokenizer):
    conversations = [
        [{"role": "user", "content": "What is 2 + 2?\n"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<b>&'\"</b>"}],
        [{"role": role, "content": f"{role} said"} for role in ("user", "assistant", "user")],
    ]
    for messages in conversations:
        for prompt in (True, False):
            expected = transformers_tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt
            )
            assert smollm2.tokenizer.apply_chat_template(messages, add_generation_prompt=prompt) == expected


@pytest.mark.model
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_streamed_pieces_make_the_text(smollm2, data):
    tokenizer = smollm2.tokenizer
    text = data.draw(st.text(st.sampled_from("aé 日😀\u0301\ufffd7\n👩\u200d"), max_size=20))
    ids = tokenizer.encode(text) + data.draw(st.lists(st.integers(0, 400), max_size=12))  # low ids: single bytes
    for skip_special in (False, True):
        stream = tokenizer.stream(skip_special=skip_special)
        pieces = [stream.put(i) for i in ids]
        assert not any(piece.endswith("\ufffd") for piece in pieces)
        assert "".join(pieces) + stream.finish() == tokenizer.decode(ids, skip_special=skip_special)
    if not text.endswith("\ufffd"):
        ids = tokenizer.encode(text)
        assert "".join(map(stream.put, ids)) == text  # nothing is held back at the end of a whole text
        assert stream.finish() == ""


def test_gguf_vocabulary_with_whole_words_beginning_and_added_tokens():
    """Llama 3: words that no merge leads to, a beginning of the text even where the file does not say so."""
    letters = byte_alphabet()
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": [*letters, "word", "<begin>", "<think>", "<end>", "<turn>"],
        "tokenizer.ggml.token_type": [1] * 257 + [3, 4, 3, 3],
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": 257,
        "tokenizer.ggml.eos_token_id": 259,
        "tokenizer.ggml.eot_token_id": 260,
    }
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.encode("word<think>word<end>") == [257, 256, 258, 256, 259]
    assert tokenizer.encode("<begin>word") == [257, 256]  # not twice
    assert tokenizer.encode("word", add_bos=False) == [256]
    assert tokenizer.eos_token_ids == (259, 260)
    assert tokenizer.decode([257, 256, 258, 259], skip_special=True) == "word<think>"
    assert not Tokenizer.from_gguf({**metadata, "tokenizer.ggml.add_bos_token": False}).add_bos
    with pytest.raises(ValueError, match="add_bos: expected a tokenizer that has a token for the beginning"):
        Tokenizer.from_gguf({**metadata, "tokenizer.ggml.bos_token_id": None}).encode("a", add_bos=True)
    with pytest.raises(ValueError, match="messages: expected a model with a chat template"):
        tokenizer.apply_chat_template([])


@pytest.mark.model
def test_folder_tokenizer_equals_the_one_from_gguf(tmp_path, smollm2, transformers_tokenizer):
    transformers_tokenizer.save_pretrained(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    for text in TEXTS:
        assert tokenizer.encode(text) == smollm2.tokenizer.encode(text)
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages) == smollm2.tokenizer.apply_chat_template(messages)
    assert tokenizer.eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    assert Tokenizer.from_folder(tmp_path).eos_token_ids == (2, 0)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json: expected a tokenizer"):
        Tokenizer.from_folder(tmp_path)


def sentencepiece_folder(folder: Path) -> Path:
    """A tokenizer in Llama 2's manner: spaces as U+2581, unknown characters as bytes, a beginning by template."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcd", "▁a", "ab", "▁ab"]
    merges = [("▁", "a"), ("a", "b"), ("▁", "ab")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens[:3]])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.enable_truncation(4)
    backend.save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
        "chat_template": [{"name": "default", "template": "{{ bos_token }}{{ messages[0].content }}"}],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_folder_tokenizer_in_the_manner_of_sentencepiece(tmp_path):
    tokenizer = Tokenizer.from_folder(sentencepiece_folder(tmp_path))
    text = "ab cd é日😀 ab"
    ids = tokenizer.encode(text)
    assert ids[0] == 1
    assert ids.count(1) == 1
    assert len(ids) > 4  # a truncation that is meant for training is off
    assert tokenizer.decode(ids, skip_special=True) == text
    assert tokenizer.encode(tokenizer.apply_chat_template([{"content": "ab"}])).count(1) == 1
    assert tokenizer.eos_token_ids == (2,)
    for skip_special in (False, True):
        for sequence in (ids, [*ids, 2, *ids[1:]], [ids[1], 2, ids[1]]):
            stream = tokenizer.stream(skip_special=skip_special)
            pieces = [stream.put(i) for i in sequence]
            assert "".join(pieces) + stream.finish() == tokenizer.decode(sequence, skip_special=skip_special)
            assert not any("\ufffd" in piece for piece in pieces)


def test_chat_templates_render_as_hugging_face_renders_them():
    from transformers.utils.chat_template_utils import render_jinja_template

    source = """\
{% for m in messages %}
    {%- if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}
    {% if m.role == 'skip' %}{% continue %}{% endif %}
{{ bos_token }}{{ m.content | tojson }}{% generation %}!{% endgeneration %}
{% endfor %}
{{ strftime_now('%Y') | length }} {{ extra }}"""
    tokenizer = Tokenizer(None, chat_template=source, special_tokens={"bos_token": "<s>"})
    messages = [{"role": "user", "content": "<é&>\n"}, {"role": "skip", "content": "never"}]
    expected, _ = render_jinja_template(
        [messages], chat_template=source, bos_token="<s>", extra="tail", add_generation_prompt=True
    )
    assert tokenizer.apply_chat_template(messages, extra="tail") == expected[0]
    assert '<s>"<é&>\\n"!' in expected[0]
    with pytest.raises(ValueError, match="messages: the model's chat template says: no tools"):
        tokenizer.apply_chat_template([{"role": "tool", "content": ""}])
    for attack in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{% if %}"):
        with pytest.raises(ValueError, match="messages: the model's chat template says"):
            Tokenizer(None, chat_template=attack).apply_chat_template([])


def test_chat_templates_see_no_tools_and_no_documents_as_none():
    """transformers passes None for both; left undefined, "is not none" would be true."""
    from transformers.utils.chat_template_utils import render_jinja_template

    source = "{% if tools is not none %}tools{% endif %}{{ documents is none }}{{ tools }}"
    expected, _ = render_jinja_template([[]], chat_template=source)
    tokenizer = Tokenizer(None, chat_template=source)
    assert tokenizer.apply_chat_template([]) == expected[0] == "TrueNone"
    assert tokenizer.apply_chat_template([], tools=["t"]) == "toolsTrue['t']"


@pytest.mark.parametrize(
    "source",
    [
        "{{ 1 + 'a' }}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 / 0 }}",
        "{{ [1][tools] }}{{ range(-1, 'a') }}",
        "{{ none() }}",
    ],
)
def test_whatever_fails_in_a_chat_template_is_a_value_error(source):
    with pytest.raises(ValueError, match=r"messages: the model's chat template (says|fails with \w+Error): "):
        Tokenizer(None, chat_template=source).apply_chat_template([{"role": "user", "content": "hi"}])


WRONG = [None, True, -1, 2.5, "text", [], [1], ["a", None], {}, {"content": 1}, [{"name": "default"}]]


def test_whatever_the_files_beside_a_tokenizer_hold_only_value_error_is_raised(tmp_path):
    sentencepiece_folder(tmp_path)
    keys = ["bos_token", "eos_token", "unk_token", "chat_template", "eos_token_id", "anything"]
    for name in ("tokenizer_config.json", "generation_config.json", "config.json"):
        path = tmp_path / name
        before = path.read_text() if path.exists() else "{}"
        for content in [*WRONG, *({**json.loads(before), key: value} for key in keys for value in WRONG)]:
            path.write_text(json.dumps(content))
            try:
                tokenizer = Tokenizer.from_folder(tmp_path)
            except ValueError:
                continue
            assert all(type(end) is int for end in tokenizer.eos_token_ids)
            assert all(isinstance(token, str) for token in tokenizer.special_tokens.values())
            assert tokenizer.chat_template is None or isinstance(tokenizer.chat_template, str)
        path.write_text(before)


def test_wrong_values_beside_a_tokenizer_are_named(tmp_path):
    sentencepiece_folder(tmp_path)
    for name, content, message in [
        ("tokenizer_config.json", [], r"tokenizer_config.json: expected an object in this file, got \[\]"),
        ("tokenizer_config.json", {"bos_token": 3}, "bos_token: expected a string in .*tokenizer_config.json, got 3"),
        ("tokenizer_config.json", {"chat_template": [{"name": "default"}]}, "template: expected in chat_template"),
        ("generation_config.json", {"eos_token_id": "2"}, "eos_token_id: expected an integer in .*got '2'"),
        (
            "generation_config.json",
            {"eos_token_id": [2, None]},
            "eos_token_id: expected a list of integers .*got None at",
        ),
    ]:
        (tmp_path / name).write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            Tokenizer.from_folder(tmp_path)
        (tmp_path / name).unlink()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    (tmp_path / "config.json").write_text('{"eos_token_id": [2]}')
    assert Tokenizer.from_folder(tmp_path).eos_token_ids == (2,)
