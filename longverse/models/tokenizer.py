"""Text to token ids and back: a thin, strict wrapper around the `tokenizers` library.

Three things are ours, because long documents need them:

- `encode` never lets a document write a control token: with `special=False` the string `<|im_end|>` is ordinary text.
- `TextStream` turns ids into text one by one in linear time and never emits half a character; Chinese and emoji
  often arrive as several byte tokens.
- Special ids come from the files of the checkpoint and are never guessed.

Byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM) and SentencePiece-like BPE with byte fallback (Llama 2, Mistral,
XVERSE) are decoded here; any other decoder goes through the library's own `DecodeStream`.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import processors
from tokenizers.decoders import DecodeStream

from longverse.errors import UserError

# The named special tokens a tokenizer_config.json may state; templates see them under these names.
NAMED_SPECIALS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

PIECE = 1 << 17  # characters that `count` encodes at once


def gpt2_bytes() -> dict[str, int]:
    """The 256 printable characters with which byte-level BPE spells bytes (GPT-2's table): character to byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    table.update({chr(256 + position): byte for position, byte in enumerate(others)})
    return table


_GPT2_BYTES = gpt2_bytes()


@dataclass(frozen=True)
class _Spelling:
    """How token strings spell text, read off the decoder of tokenizer.json."""

    byte_level: bool = False
    replacements: tuple[tuple[str, str], ...] = ()  # string to string, in every token
    byte_fallback: bool = False  # `<0xE4>` is a byte
    strip_left: int = 0  # spaces dropped at the start of the whole text
    first_drops: str = ""  # this character vanishes from the first token (Metaspace with a dummy prefix)

    @classmethod
    def from_decoder(cls, decoder: dict[str, Any] | None) -> _Spelling | None:
        """None when the decoder is one we do not spell ourselves."""
        if decoder is None:
            return None
        steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        if [step["type"] for step in steps] == ["ByteLevel"]:
            return cls(byte_level=True)
        replacements: list[tuple[str, str]] = []
        byte_fallback = fused = False
        strip_left, first_drops = 0, ""
        for step in steps:
            if step["type"] == "Replace" and "String" in step["pattern"] and not fused:
                replacements.append((step["pattern"]["String"], step["content"]))
            elif step["type"] == "Metaspace" and not fused:
                replacements.append((step["replacement"], " "))
                if step.get("prepend_scheme", "always") != "never":
                    first_drops = step["replacement"]
            elif step["type"] == "ByteFallback" and not fused:
                byte_fallback = True
            elif step["type"] == "Fuse":
                fused = True
            elif step["type"] == "Strip" and fused and step["content"] == " " and not step["stop"]:
                strip_left += step["start"]
            else:
                return None
        return cls(False, tuple(replacements), byte_fallback, strip_left, first_drops)

    def piece(self, token: str) -> bytes:
        """The bytes one token adds to the text."""
        if self.byte_level:
            if all(character in _GPT2_BYTES for character in token):
                return bytes(_GPT2_BYTES[character] for character in token)
            return token.encode()
        if self.byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                pass  # a token that only looks like a byte is text
        for old, new in self.replacements:
            token = token.replace(old, new)
        return token.encode()

    def first_piece(self, token: str) -> bytes:
        return self.piece(token.replace(self.first_drops, "") if self.first_drops else token)


class Tokenizer:
    """A tokenizer with the special ids and the chat template of its checkpoint.

    Thread-safe: the switch that makes special strings ordinary text is state of the backend and is set under a lock.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_id: int | None = None,
        eos_ids: Iterable[int] = (),
        pad_id: int | None = None,
        chat_template: str | None = None,
        add_bos: bool = False,
        special_tokens: dict[str, str] | None = None,
        notes: Iterable[str] = (),
    ) -> None:
        """`special_tokens`: the named ones (`bos_token`, `eos_token` ...), as templates see them; ids fill what
        is not named. `notes`: what was changed while reading, for the screen.
        """
        self.backend = backend
        self.notes = list(notes)
        self.bos_id = bos_id
        self.eos_ids = frozenset(eos_ids)
        self.pad_id = pad_id
        self.chat_template = chat_template
        self.add_bos = add_bos
        if add_bos and bos_id is None:
            raise UserError(
                "This tokenizer is to start every text with a begin token but names none; "
                "state bos_token in tokenizer_config.json or set add_bos_token to false."
            )
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.special_strings = tuple(
            sorted((token.content for token in added.values() if token.special), key=len, reverse=True)
        )
        # Added tokens that are not flagged special but that the chat template writes (`<tool_call>`, `<|User|>`)
        # steer the model just as well, so a document must not write them either.
        template = chat_template or ""
        self.control_strings = self.special_strings + tuple(
            token.content for token in added.values() if not token.special and token.content in template
        )
        self._unflagged = self.control_strings[len(self.special_strings) :]
        named = dict(special_tokens or {})
        for name, token_id in (
            ("bos_token", bos_id),
            ("eos_token", min(self.eos_ids, default=None)),
            ("pad_token", pad_id),
        ):
            if token_id is not None and name not in named and (text := backend.id_to_token(token_id)) is not None:
                named[name] = text
        self.special_tokens = named
        self._spelling = _Spelling.from_decoder(json.loads(backend.decoder.__getstate__()) if backend.decoder else None)
        self._pieces: dict[int, bytes] = {}
        self._lock = threading.Lock()

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    # ---- files

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Read tokenizer.json, tokenizer_config.json, chat_template.jinja and the special ids of the two model configs.

        What tokenizer_config.json states about begin and pad wins over the model configs; the end ids of all
        files are united.
        """
        # Imported here: the migration builds on this file's helpers.
        from longverse.models.tokenizer_migration import add_stated, read_backend

        folder = Path(path)
        backend, settings, notes = read_backend(folder)
        backend.no_truncation()
        backend.no_padding()
        model, generation = read_json(folder / "config.json"), read_json(folder / "generation_config.json")

        named: dict[str, str] = {}
        stated: set[str] = set()
        for source in (settings, read_json(folder / "special_tokens_map.json")):
            for name in NAMED_SPECIALS:
                if name in source and name not in stated:
                    stated.add(name)
                    value = source[name]
                    text = value.get("content") if isinstance(value, dict) else value
                    if isinstance(text, str):
                        named[name] = text
        notes += add_stated(backend, settings, read_json(folder / "added_tokens.json"), set(named.values()))
        missing = [text for text in named.values() if backend.token_to_id(text) is None]
        if missing:  # transformers adds these at the end of the vocabulary
            backend.add_special_tokens(list(dict.fromkeys(missing)))

        def named_id(name: str, key: str) -> int | None:
            if name in stated:
                return backend.token_to_id(named[name]) if name in named else None
            ids = _as_ids(generation.get(key, model.get(key)))
            return ids[0] if ids else None

        eos_ids = {*_as_ids(generation.get("eos_token_id")), *_as_ids(model.get("eos_token_id"))}
        if (named_end := named_id("eos_token", "eos_token_id")) is not None:
            eos_ids.add(named_end)
        bos_id = named_id("bos_token", "bos_token_id")
        return cls(
            backend,
            bos_id=bos_id,
            eos_ids=eos_ids,
            pad_id=named_id("pad_token", "pad_token_id"),
            chat_template=_chat_template(folder, settings),
            add_bos=_habit_of_bos(backend, settings, bos_id),
            special_tokens=named,
            notes=notes,
        )

    def lacking(self, embeddings: int) -> list[int]:
        """Ids that a model of so many embeddings cannot read and cannot do without: of the vocabulary itself, a begin
        token that is written, and the end tokens where it has none of them."""
        ids = set(self.backend.get_vocab(with_added_tokens=False).values()) - {*self.backend.get_added_tokens_decoder()}
        if self.add_bos and self.bos_id is not None:
            ids.add(self.bos_id)
        if self.eos_ids and min(self.eos_ids) >= embeddings:
            ids |= self.eos_ids
        return sorted(n for n in ids if n >= embeddings)

    def within(self, embeddings: int) -> Tokenizer:
        """The same without the added tokens that a model of so many embeddings has none for (Llama 2's first files have
        such a pad token); itself where there are none. Their strings are then ordinary text."""
        surplus = [n for n in self.backend.get_added_tokens_decoder() if n >= embeddings]
        if not surplus and all(n < embeddings for n in self.eos_ids):
            return self
        state = json.loads(self.backend.to_str(pretty=False))
        state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < embeddings]
        backend = tokenizers.Tokenizer.from_str(json.dumps(state))
        texts = {self.backend.id_to_token(n) for n in surplus}
        left_out = [*sorted(map(str, texts)), *(f"end token {n:,}" for n in sorted(self.eos_ids) if n >= embeddings)]
        note = f"Without an embedding in the model, and left out of the tokenizer: {', '.join(left_out)}."
        return Tokenizer(
            backend,
            bos_id=None if self.bos_id is not None and self.bos_id >= embeddings else self.bos_id,
            eos_ids=[n for n in self.eos_ids if n < embeddings],
            pad_id=None if self.pad_id in surplus else self.pad_id,
            chat_template=self.chat_template,
            add_bos=self.add_bos,
            special_tokens={name: text for name, text in self.special_tokens.items() if text not in texts},
            notes=[*self.notes, note],
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a folder that transformers' AutoTokenizer loads back with the same ids; each file appears whole
        or not at all.

        End ids go into generation_config.json too (merged with what is there), since tokenizer_config.json can
        name only one.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        text = self.backend.to_str(pretty=False)
        if self.add_bos != _post_processor_adds(self.backend, self.bos_id):
            copy = tokenizers.Tokenizer.from_str(text)
            copy.post_processor = bos_processor(self.backend, self.bos_id if self.add_bos else None)
            text = copy.to_str(pretty=False)
        settings: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self.special_tokens,
        }
        for name, token_id in (("bos_token", self.bos_id), ("pad_token", self.pad_id)):
            if token_id is None:
                settings[name] = None
        if self.chat_template is not None:
            settings["chat_template"] = self.chat_template
        generation = read_json(folder / "generation_config.json")
        ids = sorted(self.eos_ids)
        for key, value in (
            ("bos_token_id", self.bos_id),
            ("eos_token_id", ids[0] if len(ids) == 1 else ids or None),
            ("pad_token_id", self.pad_id),
        ):
            generation.pop(key, None)
            if value is not None:
                generation[key] = value
        write_text(folder / "tokenizer.json", text)
        write_text(folder / "tokenizer_config.json", json.dumps(settings, ensure_ascii=False, indent=2) + "\n")
        write_text(folder / "generation_config.json", json.dumps(generation, indent=2) + "\n")

    # ---- text to ids

    def encode(self, text: str, *, special: bool = False, add_bos: bool | None = None) -> list[int]:
        """Ids of `text`. `special=False`: control strings in it are ordinary text. `add_bos=None`: this
        tokenizer's own habit.
        """
        return self.encode_batch([text], special=special, add_bos=add_bos)[0]

    def count(self, text: str) -> int:
        """About how many ids a long text has: counted in pieces, so that others need not wait for all of it."""
        return sum(len(self.encode(text[at : at + PIECE], add_bos=False)) for at in range(0, len(text), PIECE))

    def encode_batch(
        self, texts: Sequence[str], *, special: bool = False, add_bos: bool | None = None
    ) -> list[list[int]]:
        """`encode` for many texts at once, in parallel."""
        for text in texts:
            _check_unicode(text)
        start = self._start(add_bos)
        cut = [[text] if special else self._defused(text) for text in texts]
        with self._literal(not special):
            pieces = [piece for parts in cut for piece in parts]
            encoded = iter(self.backend.encode_batch_fast(pieces, add_special_tokens=False))
        result = []
        for parts in cut:
            ids = list(start)
            for _ in parts:
                ids.extend(next(encoded).ids)
            result.append(ids)
        return result

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of `text` as ordinary text, without a begin token, and for each the characters [start, end) it came from.

        Byte tokens of one character all carry that character's place.
        """
        _check_unicode(text)
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        base = 0
        with self._literal(True):
            for piece in self._defused(text):
                encoding = self.backend.encode(piece, add_special_tokens=False)
                ids.extend(encoding.ids)
                offsets.extend((base + start, base + end) for start, end in encoding.offsets)
                base += len(piece)
        return ids, offsets

    def _start(self, add_bos: bool | None) -> list[int]:
        if add_bos and self.bos_id is None:
            raise UserError("This tokenizer has no begin token to add; leave add_bos out.")
        wanted = self.add_bos if add_bos is None else add_bos
        return [self.bos_id] if wanted and self.bos_id is not None else []

    @contextmanager
    def _literal(self, literal: bool) -> Iterator[None]:
        with self._lock:
            self.backend.encode_special_tokens = literal
            try:
                yield
            finally:
                self.backend.encode_special_tokens = False

    def _defused(self, text: str) -> list[str]:
        """Cut after the first character of each unflagged control token: the library would match it even in
        ordinary text.
        """
        if not self._unflagged:
            return [text]
        cuts = [match.start() + 1 for match in re.finditer("|".join(map(re.escape, self._unflagged)), text)]
        return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True) if start < end] or [
            ""
        ]

    # ---- ids to text

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of `ids`. Bytes that are no UTF-8 become U+FFFD, one for each broken sequence, and nothing
        around them is lost.

        (The library gives the same text except that one broken byte token makes it replace the whole run of
        byte tokens.)
        """
        if self._spelling is None:
            return self.backend.decode(list(ids), skip_special_tokens=skip_special)
        first = True
        parts: list[bytes] = []
        for token_id in ids:
            piece = self._piece(token_id, first, skip_special)
            if piece is not None:
                parts.append(piece)
                first = False
        data = b"".join(parts)
        dropped = 0
        while dropped < self._spelling.strip_left and data[dropped : dropped + 1] == b" ":
            dropped += 1
        return data[dropped:].decode("utf-8", "replace")

    def stream(self, *, skip_special: bool = True) -> TextStream:
        """A fresh stream for one answer."""
        return TextStream(self, skip_special=skip_special)

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes one token adds in the middle of a text; None for special tokens and for ids past the vocabulary.
        UserError for a tokenizer whose decoder is not spelled here."""
        if self._spelling is None:
            raise UserError("This tokenizer's decoder does not tell the bytes of single tokens.")
        return self._piece(token_id, False, True)

    def _piece(self, token_id: int, first: bool, skip_special: bool) -> bytes | None:
        """Bytes of one token; None for a special token to be skipped and for ids past the vocabulary (padding of
        the embedding).
        """
        assert self._spelling is not None
        if skip_special and token_id in self.special_ids:
            return None
        if not first and (piece := self._pieces.get(token_id)) is not None:
            return piece
        token = self.backend.id_to_token(token_id)
        if token is None:
            return None
        if first:
            return self._spelling.first_piece(token)
        return self._pieces.setdefault(token_id, self._spelling.piece(token))


class TextStream:
    """Ids in, whole characters out. The pieces of all `push` calls and of `flush` make exactly
    `Tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = True
        spelling = tokenizer._spelling
        self._to_strip = spelling.strip_left if spelling else 0
        self._ids: list[int] = []  # only for foreign decoders
        self._emitted = ""
        self._library = None if spelling else DecodeStream(skip_special_tokens=skip_special)

    def push(self, token_id: int) -> str:
        """The characters that this token completes: often none, never a broken one."""
        if self._library is not None:
            self._ids.append(token_id)
            text = self._library.step(self._tokenizer.backend, token_id) or ""
            self._emitted += text
            return text
        piece = self._tokenizer._piece(token_id, self._first, self._skip_special)
        if piece is None:
            return ""
        self._first = False
        while self._to_strip:
            if not piece:
                return ""
            if not piece.startswith(b" "):
                self._to_strip = 0
                break
            piece, self._to_strip = piece[1:], self._to_strip - 1
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """What the end leaves: U+FFFD for a character that never became whole, otherwise nothing."""
        if self._library is not None:
            whole = self._tokenizer.decode(self._ids, skip_special=self._skip_special)
            return whole[len(self._emitted) :]
        return self._utf8.decode(b"", final=True)


def token_offsets(pieces: Iterable[bytes], begun: int = 0) -> tuple[list[int], int]:
    """For each token's bytes, in order, how many characters of the text stand before the one in which it begins; and
    how many have begun in all. `begun` of them came before. A character of several tokens counts once, where it begins;
    of bytes that spell no character, those that could not begin one count as none.
    """
    offsets = []
    for piece in pieces:
        goes_on = b"\x80" <= piece[:1] < b"\xc0"
        offsets.append(max(0, begun - 1) if goes_on else begun)
        begun += sum(byte & 0xC0 != 0x80 for byte in piece)
    return offsets, begun


def _check_unicode(text: str) -> None:
    """UserError for half a surrogate pair: Python spells a byte that is no UTF-8 so, JSON may hold one."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        number = ord(text[error.start])
        what = f"byte {number - 0xDC00:#04x}" if 0xDC80 <= number <= 0xDCFF else f"half a character, U+{number:04X},"
        before = text[max(0, error.start - 20) : error.start]
        raise UserError(
            f"The text is not valid UTF-8: {what} stands at character {error.start:,}"
            f"{f', after {before!a}' if before else ''}; give it as UTF-8."
        ) from None


def bos_processor(backend: tokenizers.Tokenizer, bos_id: int | None) -> processors.PostProcessor:
    """The post-processor that starts a text with `bos_id`, or one that adds nothing."""
    if bos_id is None:
        return processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    bos = backend.id_to_token(bos_id)
    assert bos is not None
    # Lists, not one string: a begin token may hold blanks or a colon, which the string form would split at.
    start = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}
    layout = {
        "type": "TemplateProcessing",
        "single": [start, first],
        "pair": [start, first, second],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }
    shell = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "BPE", "vocab": {}, "merges": []},
        "post_processor": layout,
    }
    return tokenizers.Tokenizer.from_str(json.dumps(shell)).post_processor


def _post_processor_adds(backend: tokenizers.Tokenizer, bos_id: int | None) -> bool:
    return bos_id is not None and backend.encode("a", add_special_tokens=True).ids[:1] == [bos_id]


def _habit_of_bos(backend: tokenizers.Tokenizer, settings: dict[str, Any], bos_id: int | None) -> bool:
    """Does this tokenizer start a text with the begin token? What tokenizer_config.json says wins over the post-
    processor.
    """
    stated = settings.get("add_bos_token")
    if stated is not None:
        return bool(stated) and bos_id is not None
    return _post_processor_adds(backend, bos_id)


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    """chat_template.jinja wins over tokenizer_config.json; of a list of named templates the one called `default`
    counts.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _as_ids(value: Any) -> list[int]:
    if value is None:
        return []
    items = value if isinstance(value, list) else [value]
    for item in items:
        if isinstance(item, bool) or not isinstance(item, int):
            raise UserError(
                f"A special id is {item!r} in the model's config files and must be a whole number: mend it."
            )
    return list(items)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; {} where the file is absent; UserError where it is broken."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({_one_line(error)}); fetch the file again.") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold a JSON object, not a {type(data).__name__}; fetch the file again.")
    return data


def write_text(path: Path, text: str) -> None:
    """Write beside the target, then rename: a reader sees the old file or the new one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
