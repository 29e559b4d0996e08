"""The tokenizer a data set is made for: found by model name, counted fast, recognised later by a fingerprint."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longverse.data.tokenise import LinearEncoder
from longverse.errors import UserError, expand

if TYPE_CHECKING:
    from longverse.models.chat import ChatFormat
    from longverse.models.tokenizer import Tokenizer

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Vocabulary:
    """A model's tokenizer and chat format, without its weights."""

    name: str
    tokenizer: Tokenizer
    chat: ChatFormat
    fingerprint: str  # equal for equal vocabularies, whatever file they came from


def load_vocabulary(model: str, base: Path | None = None) -> Vocabulary:
    """The tokenizer of a model known by name (`smol`), a checkpoint folder, a folder with only tokenizer.json, or a
    .gguf file. A relative path may start at `base`. Raises UserError."""
    from longverse.models.chat import ChatFormat
    from longverse.models.tokenizer import Tokenizer, read_json

    if base is not None and not Path(model).is_absolute() and (base / model).exists():
        model = str(base / model)
    folder = expand(model)
    config: dict[str, Any] = {}
    if folder.is_file() and folder.name == "tokenizer.json":
        folder = folder.parent
    if (folder / "tokenizer.json").exists():
        name, tokenizer = folder.resolve().name, Tokenizer.from_folder(folder)
        if (folder / "config.json").exists():
            config = read_json(folder / "config.json")
    else:
        from longverse.models.checkpoint import locate, read_config

        name, path = locate(model)
        if path.is_file():
            from longverse.models.gguf import read_gguf

            file = read_gguf(path)
            tokenizer, config = file.tokenizer, file.config
        else:
            tokenizer, config = Tokenizer.from_folder(path), read_config(path)
    return Vocabulary(name, tokenizer, ChatFormat.for_model(tokenizer, config, name), fingerprint(tokenizer))


def fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 (first 16 hex digits) of the vocabulary, added tokens included, in the order of ids."""
    entries = sorted((i, token) for token, i in tokenizer.backend.get_vocab(with_added_tokens=True).items())
    digest = hashlib.sha256()
    for i, token in entries:
        digest.update(f"{i}\0{token}\1".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


class ChatCounter:
    """Tokens of whole conversations under a chat format, exactly `len(chat.encode(messages))`, in linear time."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.chat = vocabulary.chat
        self.encoder = LinearEncoder(vocabulary.tokenizer.backend)
        tokenizer = vocabulary.tokenizer
        added = tokenizer.backend.get_added_tokens_decoder().values()
        template = self.chat.kind == "template"
        # The rendered text is counted between its control strings. A token that eats the space beside it, or that is
        # looked for in the normalised text, makes no clean cut, and a document that spells a control string needs
        # care: then the format's own `encode` counts.
        self._clean = not any(token.lstrip or token.rstrip or token.single_word for token in added)
        if tokenizer.backend.normalizer is not None:
            self._clean = self._clean and not any(t.normalized and (template or not t.special) for t in added)
        strings = {*tokenizer.control_strings, *(token.content for token in added)}
        self._special: re.Pattern[str] | None = None
        self._begin = 0 if template else int(tokenizer.add_bos and tokenizer.bos_id is not None)
        if self.chat.kind == "xverse":
            answer = self.chat.render([{"role": "assistant", "content": ""}], add_generation_prompt=False)
            if end := answer.removeprefix("Assistant: "):
                self._special = re.compile(re.escape(end))
                strings.add(end)  # it need not be an added token
            else:
                self._clean = False  # an end without a string
        self._foreign = re.compile("|".join(map(re.escape, sorted(strings, key=len, reverse=True))))
        if template and strings:
            self._special = self._foreign

    def count(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = False,
        counter: Callable[[str], int] | None = None,
    ) -> int:
        """Tokens of the conversation as the model sees it. counter: another way to count plain text, such as one with
        a memory. Raises UserError when the template refuses the conversation."""
        foreign = self._foreign.pattern and any(self._foreign.search(message["content"]) for message in messages)
        if not self._clean or foreign:
            return len(self.chat.encode(messages, add_generation_prompt=add_generation_prompt))
        text = self.chat.render(messages, add_generation_prompt=add_generation_prompt)
        pieces = self._special.split(text) if self._special is not None else [text]
        plain = counter or self.encoder.count
        return self._begin + len(pieces) - 1 + sum(plain(piece) for piece in pieces if piece)


def require_eos(vocabulary: Vocabulary) -> int:
    """The id that ends a document: the lowest end token. UserError where the tokenizer names none."""
    if not vocabulary.tokenizer.eos_ids:
        raise UserError(f"the tokenizer of {vocabulary.name!r} names no end token; set end_of_document: false.")
    return min(vocabulary.tokenizer.eos_ids)
