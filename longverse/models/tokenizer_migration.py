"""Tokenizer files written for `tokenizers` before 0.19, made readable today.

Two things stop them. The official repositories ship the cure as `tokenizer.json.update` and
`tokenizer_config.json.update`, whose content is to replace the two files. And Metaspace used to have two
settings, `add_prefix_space` and (from 0.14) `prepend_scheme`, of which the first ruled: no prefix meant no
prefix, whatever the second said. Newer versions keep only the second and refuse a file where the two disagree
("add_prefix_space does not match declared prepend_scheme", or "data did not match any variant of untagged enum
PyPreTokenizerTypeWrapper"). Rewriting is exact: the new file gives the ids the old library gave.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from longverse.errors import UserError
from longverse.models.shards import replacing
from longverse.models.tokenizer import read_json, write_text

FILES = ("tokenizer.json", "tokenizer_config.json")
# What else transformers reads beside the two; copied along when the result goes to another folder.
COMPANIONS = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


def read_backend(folder: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any], list[str]]:
    """The tokenizer of a checkpoint folder whatever version wrote it, its tokenizer_config.json, and what was
    done for it.

    Nothing on disk is changed. UserError where tokenizer.json is absent, broken, or of a kind that cannot be rewritten.
    """
    backend, _, chosen, notes = _read(folder)
    return backend, read_json(chosen["tokenizer_config.json"]), notes


def migrate_tokenizer(folder: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> list[str]:
    """Write tokenizer.json and tokenizer_config.json as today's libraries read them; returns what was changed,
    in words.

    Without `out` the files are replaced in place, the old ones kept beside them as `.old`, and a folder that
    needs nothing is left as it is ([]). With `out` the result is always written there. Each file appears whole
    or not at all.
    """
    source = Path(folder)
    if not source.is_dir():
        raise UserError(f"There is no folder {source}; give a checkpoint folder with a tokenizer.json.")
    _, text, chosen, notes = _read(source)
    settings_file = chosen["tokenizer_config.json"]
    settings = read_json(settings_file)
    texts = {"tokenizer.json": text}
    if settings.get("tokenizer_class"):
        texts["tokenizer_config.json"] = settings_file.read_text(encoding="utf-8")
    else:  # without it transformers looks for a class by the model's type
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        notes.append("tokenizer_config.json: tokenizer_class PreTrainedTokenizerFast added")
        texts["tokenizer_config.json"] = json.dumps(settings, ensure_ascii=False, indent=2) + "\n"
    target = source if out is None else Path(out)
    if target.resolve() == source.resolve():
        if not notes:
            return []
        for name in texts:
            if (source / name).is_file() and not (source / f"{name}.old").exists():
                with replacing(source / f"{name}.old") as aside:
                    shutil.copyfile(source / name, aside)  # bytes: it may be no UTF-8
    else:
        if there := next((name for name in (*texts, *COMPANIONS) if (target / name).exists()), None):
            raise UserError(f"{target / there} exists already: give a folder without tokenizer files.")
        try:
            target.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{target} cannot be made ({error.strerror}): choose another folder.") from None
        for name in COMPANIONS:
            if (source / name).is_file():
                with replacing(target / name) as aside:
                    shutil.copyfile(source / name, aside)
    for name, content in texts.items():
        write_text(target / name, content)
    return notes


def rewrite(state: dict[str, Any]) -> list[str]:
    """Change the content of an old tokenizer.json in place; returns what was changed."""
    changes = []
    for where in ("pre_tokenizer", "decoder"):
        for step in _steps(state.get(where)):
            if step.get("type") == "Metaspace" and "add_prefix_space" in step:
                prefix = step.pop("add_prefix_space")
                step["prepend_scheme"] = step.get("prepend_scheme", "always") if prefix else "never"
                changes.append(
                    f"tokenizer.json: {where} Metaspace add_prefix_space {str(prefix).lower()} became"
                    f" prepend_scheme {step['prepend_scheme']}"
                )
    return changes


def _read(folder: Path) -> tuple[tokenizers.Tokenizer, str, dict[str, Path], list[str]]:
    """The tokenizer, tokenizer.json as it should be, where the two files' content was found, and what was changed."""
    notes = []
    chosen = {}
    for name in FILES:
        update, file = folder / f"{name}.update", folder / name
        chosen[name] = file
        # Once its content is in place an update has nothing more to say.
        if update.is_file() and not (file.is_file() and file.read_bytes() == update.read_bytes()):
            chosen[name] = update
            notes.append(f"{name}: the content of {name}.update is used")
    file = chosen["tokenizer.json"]
    if not file.is_file():
        raise UserError(f"{folder} holds no tokenizer.json; give a checkpoint folder that has one.")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{file} cannot be read as a tokenizer: it is not UTF-8 text; fetch it again.") from None
    try:
        return tokenizers.Tokenizer.from_str(text), text, chosen, notes
    except Exception as error:  # the library raises nothing narrower for a file it cannot read
        reason = " ".join(str(error).split())[:200]
    try:
        state = json.loads(text)
    except ValueError:
        raise UserError(
            f"{file} cannot be read as a tokenizer: it is no valid JSON ({reason}); fetch it again."
        ) from None
    changes = rewrite(state) if isinstance(state, dict) else []
    text = json.dumps(state, ensure_ascii=False)
    try:
        return tokenizers.Tokenizer.from_str(text), text, chosen, [*notes, *changes]
    except Exception:  # as above
        raise UserError(
            f"{file} cannot be read as a tokenizer ({reason}), and it is no file of an older version that can be"
            " rewritten; fetch it again."
        ) from None


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """A step and, if it is a sequence, the steps in it."""
    if isinstance(part, dict):
        yield part
        for key in ("pretokenizers", "decoders"):
            for inner in part.get(key) or ():
                yield from _steps(inner)


def add_stated(
    backend: tokenizers.Tokenizer, settings: dict[str, Any], older: dict[str, Any], named: set[str]
) -> list[str]:
    """Add the tokens that tokenizer_config.json (or the older added_tokens.json) states and tokenizer.json does not, as
    transformers does, in the order of their ids. Returns notes on ids that come out otherwise than stated."""
    stated: dict[int, AddedToken] = {}
    decoder = settings.get("added_tokens_decoder")
    more = settings.get("additional_special_tokens")
    special = named | {text for text in more if isinstance(text, str)} if isinstance(more, list) else named
    for text, token_id in older.items() if decoder is None else ():
        if isinstance(token_id, int):
            stated[token_id] = AddedToken(text, special=text in special, normalized=text not in special)
    for number, token in decoder.items() if isinstance(decoder, dict) else ():
        if str(number).isdigit() and isinstance(token, dict) and isinstance(token.get("content"), str):
            flags = {key: bool(token[key]) for key in ("lstrip", "rstrip", "single_word", "normalized") if key in token}
            stated[int(number)] = AddedToken(token["content"], special=bool(token.get("special")), **flags)
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    notes = []
    for token_id, token in sorted(stated.items()):
        if token.content in known:
            continue
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        if (got := backend.token_to_id(token.content)) != token_id:
            notes.append(
                f"The tokenizer's files give {token.content!r} the id {token_id:,} and its vocabulary {got:,}, which is"
                " used, as transformers does."
            )
    return notes
