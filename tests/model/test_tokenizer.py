"""The two tokenizers: round trips, the stop token, the chat template, and what each says of a broken directory."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lpexp.errors import ConfigError
from lpexp.model.tokenizer import PAD, STOP, SYMBOLS, UNWRITTEN, CharTokenizer, HfTokenizer, load_tokenizer

CHAR = CharTokenizer()
TEMPLATE = """{%- for message in messages %}
{%- if message.role == 'tool' %}
    {{- raise_exception('tools are left out') }}
{%- endif %}
{%- if loop.index > 5 %}{% break %}{% endif %}
{{- '<|im_start|>' + message['role'] + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def model(path: Path | None, vocab_size: int = 1000) -> Any:
    return SimpleNamespace(path=None if path is None else str(path), vocab_size=vocab_size)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE directory as `save_pretrained` writes it; it puts <|bos|> before a plain prompt."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    special = ["<|bos|>", "<|im_start|>", "<|im_end|>"]
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(["what is two and two", "the answer is four"] * 5, trainer)
    inner.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])  # type: ignore[assignment]
    directory = tmp_path_factory.mktemp("saved")
    inner.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": {
            "__type": "AddedToken",
            "content": "<|im_end|>",
            "lstrip": False,
            "rstrip": False,
            "single_word": False,
            "normalized": False,
        },
        "chat_template": TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    for file in saved.iterdir():
        (tmp_path / file.name).write_text(file.read_text())
    return tmp_path


# -- characters --
@given(st.text(SYMBOLS))
def test_the_character_tokenizer_gives_back_every_text_it_takes(text: str) -> None:
    ids = CHAR.encode(text)
    assert CHAR.decode(ids) == text
    assert len(ids) == len(text)
    assert all(STOP < index < CHAR.vocab_size for index in ids)


def test_the_character_table_never_changes() -> None:
    # Checkpoints, caches and committed curves depend on these ids.
    assert SYMBOLS == "abcdefghijklmnopqrstuvwxyz0123456789>+-=., \n*/()[]{}\\^_:;?!'\"<"
    assert (CHAR.encode("a"), CHAR.encode("z"), CHAR.encode("0"), CHAR.encode(">")) == ([2], [27], [28], [38])
    assert len(set(SYMBOLS)) == len(SYMBOLS) == CHAR.vocab_size - 2


def test_decoding_ends_before_the_first_stop_token() -> None:
    assert CHAR.decode([2, 3, STOP, 4, STOP]) == "ab"
    assert CHAR.decode([STOP]) == CHAR.decode([]) == ""


def test_padding_decodes_to_one_character_that_no_answer_has() -> None:
    assert CHAR.decode([2, PAD, 3]) == f"a{UNWRITTEN}b"
    assert UNWRITTEN not in SYMBOLS


def test_a_character_outside_the_table_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'A' is not in the character table"):
        CHAR.encode("abA")


def test_the_character_tokenizer_refuses_chat() -> None:
    with pytest.raises(ConfigError, match=r"task\.chat_template: the character tokenizer has no chat template"):
        CHAR.encode_prompt("abc", chat=True)


# -- which one --
def test_a_model_without_a_path_gets_the_character_tokenizer_and_one_with_a_path_its_own(saved: Path) -> None:
    assert isinstance(load_tokenizer(model(None)), CharTokenizer)
    assert isinstance(load_tokenizer(model(saved)), HfTokenizer)


def test_a_vocabulary_too_small_for_the_tokenizer_is_refused(saved: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size: 63 is less than the 64 ids of the character tokenizer"):
        load_tokenizer(model(None, 63))
    with pytest.raises(ConfigError, match=r"model\.vocab_size: 64 is less than the \d+ ids of the tokenizer in "):
        load_tokenizer(model(saved, 64))
    assert load_tokenizer(model(None, 64)).vocab_size == 64


# -- a Hugging Face directory --
@given(text=st.text(max_size=30))
def test_a_byte_level_tokenizer_gives_back_any_text(saved: Path, text: str) -> None:
    tokenizer = load_tokenizer(model(saved))
    assert tokenizer.decode([*tokenizer.encode(text), tokenizer.stop_id, 5]) == text


def test_stop_token_chat_template_and_leading_token_agree_with_transformers(saved: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(saved)
    ours = HfTokenizer(saved)
    assert ours.stop_id == theirs.eos_token_id
    assert ours.vocab_size == len(theirs)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what is two and two"}]
    assert ours.chat(messages) == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ours.encode_prompt(messages, chat=True) == expected
    assert ours.encode_prompt("two and two") == theirs("two and two")["input_ids"]
    assert ours.encode_prompt("two")[0] == theirs.bos_token_id


def test_a_text_prompt_in_chat_is_one_user_message(saved: Path) -> None:
    assert HfTokenizer(saved).chat("two") == "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n"


def test_chat_template_jinja_wins_over_the_one_in_the_settings(copy: Path) -> None:
    (copy / "chat_template.jinja").write_text("Q: {{ messages[0].content }} A:")
    assert HfTokenizer(copy).chat("two") == "Q: two A:"


def test_a_tokenizer_travels_to_a_worker_after_it_has_rendered_a_template(saved: Path) -> None:
    tokenizer = HfTokenizer(saved)
    before = tokenizer.encode_prompt("two", chat=True)
    assert pickle.loads(pickle.dumps(tokenizer)).encode_prompt("two", chat=True) == before


def test_a_template_cannot_reach_into_python(copy: Path) -> None:
    (copy / "chat_template.jinja").write_text("{{ messages.__class__.__base__.__subclasses__() }}")
    with pytest.raises(ConfigError, match=r"task\.chat_template: the template of .* failed"):
        HfTokenizer(copy).chat("two")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("tokenizer.json", None, r"model\.path: .*tokenizer\.json does not exist"),
        ("tokenizer.json", "{]", r"model\.path: .*tokenizer\.json is no tokenizer that can be read"),
        ("tokenizer_config.json", None, r"model\.path: .*tokenizer_config\.json does not exist"),
        ("tokenizer_config.json", "{]", r"model\.path: .*tokenizer_config\.json is not JSON"),
        ("tokenizer_config.json", "{}", r"model\.path: .*tokenizer_config\.json names no eos_token"),
        (
            "tokenizer_config.json",
            '{"eos_token": "<|x|>"}',
            r"has eos_token '<\|x\|>', which tokenizer\.json does not know",
        ),
        (
            "tokenizer_config.json",
            '{"eos_token": "<|im_end|>"}',
            r"task\.chat_template: .* has no chat template; use false",
        ),
        ("chat_template.jinja", "{% for %}", r"task\.chat_template: the template of .* is no jinja2 template"),
    ],
)
def test_a_broken_directory_is_refused_with_the_file_named(
    copy: Path, file: str, text: str | None, message: str
) -> None:
    (copy / file).unlink() if text is None else (copy / file).write_text(text)
    with pytest.raises(ConfigError, match=message):
        HfTokenizer(copy).encode_prompt("two", chat=True)
