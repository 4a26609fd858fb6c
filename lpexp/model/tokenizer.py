"""Tokenizers: a fixed character table for models that start from scratch, or the one in a Hugging Face directory.

Left out: several stop tokens (the first is `eos_token`), tool calls and multi-turn chat, sentencepiece models without
a tokenizer.json. Chat templates follow the Hugging Face convention (jinja2, sandboxed, `messages`,
`add_generation_prompt`).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lpexp.errors import ConfigError, Mistake

if TYPE_CHECKING:
    import jinja2

    from lpexp.model import Model

Messages = Sequence[Mapping[str, str]]  # [{"role": "user", "content": "2+2?"}, ...]

SYMBOLS = "abcdefghijklmnopqrstuvwxyz0123456789>+-=., \n*/()[]{}\\^_:;?!'\"<"
PAD, STOP = 0, 1
UNWRITTEN = "\ufffd"  # what padding and unused ids decode to: one character, so positions stay aligned


class Tokenizer(Protocol):
    """Text <-> token ids."""

    stop_id: int
    vocab_size: int  # ids are below it

    def encode(self, text: str) -> list[int]:
        """The ids of a text, nothing added."""
        ...

    def encode_prompt(self, prompt: str | Messages, chat: bool = False) -> list[int]:
        """The ids that a model is given: through the chat template, or with the model's own leading tokens."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text before the first stop token."""
        ...


class CharTokenizer:
    """One character a token: 0 pad, 1 stop, then `SYMBOLS`. Needs no file; the same table everywhere."""

    stop_id = STOP
    vocab_size = 64

    def encode(self, text: str) -> list[int]:
        """Ids of a text; ValueError names the first character that the table lacks."""
        for char in text:
            if char not in _ID:
                raise ValueError(f"{char!r} is not in the character table; it has {SYMBOLS!r}")
        return [_ID[char] for char in text]

    def encode_prompt(self, prompt: str | Messages, chat: bool = False) -> list[int]:
        """Ids of a plain text prompt; the character table knows no chat."""
        if chat or not isinstance(prompt, str):
            message = "the character tokenizer has no chat template; use false, or set model.path"
            raise ConfigError([Mistake("task.chat_template", message)])
        return self.encode(prompt)

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(_CHAR.get(index, UNWRITTEN) for index in _before_stop(ids, self.stop_id))

    def save(self, directory: Path) -> None:
        """The same table as tokenizer.json and tokenizer_config.json, which `HfTokenizer` and transformers read."""
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers

        stop = "<STOP>"  # the table has no capitals, so no text holds it
        inner = tokenizers.Tokenizer(models.WordLevel({UNWRITTEN: PAD, stop: STOP, **_ID}))
        inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]  # every character alone
        inner.decoder = decoders.Fuse()  # type: ignore[assignment]  # and joined by nothing
        inner.add_special_tokens([stop])
        inner.save(str(directory / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": stop, "pad_token": UNWRITTEN}
        (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


class HfTokenizer:
    """tokenizer.json through the `tokenizers` library, stop token and chat template of tokenizer_config.json."""

    def __init__(self, directory: str | Path):
        import tokenizers

        self._directory = directory = Path(directory)
        file = directory / "tokenizer.json"
        if not file.is_file():
            raise ConfigError([Mistake("model.path", f"{file} does not exist; save the tokenizer beside the weights")])
        try:
            self._inner = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise ConfigError([Mistake("model.path", f"{file} is no tokenizer that can be read: {error}")]) from None
        self._inner.no_truncation()
        self._inner.no_padding()
        settings = directory / "tokenizer_config.json"
        self._config = _read_json(settings)
        self._special = {
            key: _content(self._config[key]) for key in ("bos_token", "eos_token") if self._config.get(key)
        }
        eos = self._special.get("eos_token")
        stop = None if eos is None else self._inner.token_to_id(eos)
        if stop is None:
            said = "names no eos_token" if eos is None else f"has eos_token {eos!r}, which {file.name} does not know"
            raise ConfigError([Mistake("model.path", f"{settings} {said}; generation would never stop")])
        self.stop_id: int = stop
        self.vocab_size: int = max(self._inner.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        return self._inner.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, prompt: str | Messages, chat: bool = False) -> list[int]:
        """Ids of a prompt; ConfigError when chat is asked for and the directory has no template."""
        if chat:
            return self.encode(self.chat(prompt))
        assert isinstance(prompt, str), "messages need the chat template"
        return self._inner.encode(prompt, add_special_tokens=True).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._inner.decode(_before_stop(ids, self.stop_id), skip_special_tokens=True)

    def chat(self, prompt: str | Messages) -> str:
        """The text that the chat template makes of a user's prompt or of messages, ready for the answer."""
        import jinja2

        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._special)
        except jinja2.TemplateError as error:
            message = f"the template of {self._directory} failed: {error}"
            raise ConfigError([Mistake("task.chat_template", message)]) from None

    @functools.cached_property
    def _template(self) -> jinja2.Template:
        """The chat template of chat_template.jinja or tokenizer_config.json (of several, the one named default)."""
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        file, source = self._directory / "chat_template.jinja", self._config.get("chat_template")
        if file.is_file():
            source = file.read_text()
        if isinstance(source, list):
            source = next((entry["template"] for entry in source if entry["name"] == "default"), None)
        if source is None:
            message = f"{self._directory} has no chat template; use false"
            raise ConfigError([Mistake("task.chat_template", message)])

        def raise_exception(message: str) -> None:
            raise jinja2.TemplateError(message)

        loops = ["jinja2.ext.loopcontrols"]
        world = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=loops)
        world.globals["raise_exception"] = raise_exception
        world.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        try:
            return world.from_string(source)
        except jinja2.TemplateError as error:
            message = f"the template of {self._directory} is no jinja2 template: {error}"
            raise ConfigError([Mistake("task.chat_template", message)]) from None

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return HfTokenizer, (self._directory,)  # a compiled template cannot travel to a worker


def load_tokenizer(model: Model) -> CharTokenizer | HfTokenizer:
    """The tokenizer of a model: the one in `model.path`, or the character table when it starts from scratch."""
    tokenizer = CharTokenizer() if model.path is None else HfTokenizer(model.path)
    if tokenizer.vocab_size > model.vocab_size:
        what = "the character tokenizer" if model.path is None else f"the tokenizer in {model.path}"
        message = f"{model.vocab_size} is less than the {tokenizer.vocab_size} ids of {what}"
        raise ConfigError([Mistake("model.vocab_size", message)])
    return tokenizer


_ID = {char: index for index, char in enumerate(SYMBOLS, start=STOP + 1)}
_CHAR = {index: char for char, index in _ID.items()}


def _before_stop(ids: Iterable[int], stop: int) -> list[int]:
    listed = [int(index) for index in ids]
    return listed[: listed.index(stop)] if stop in listed else listed


def _content(token: Any) -> str:
    """A special token as tokenizer_config.json writes it: a string, or an object with its content."""
    return token["content"] if isinstance(token, Mapping) else str(token)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        raise ConfigError([Mistake("model.path", f"{file} does not exist; it names the stop token")]) from None
    except json.JSONDecodeError as error:
        raise ConfigError([Mistake("model.path", f"{file} is not JSON: {error}")]) from None
