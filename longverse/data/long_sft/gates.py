"""The gates every finished item passes, and the n-grams of files it must not overlap."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longverse.data.long_sft.draft import Reject
from longverse.data.long_sft.item import Item, problem_of
from longverse.data.shards import save_array
from longverse.data.text import fold, hash64, language_of_short, shingle_hashes, squash
from longverse.errors import UserError

_WIDTH = {"zh": 24, "en": 60}  # letters: about 24 characters of Chinese, 13 words of English
_BLOCK = 500_000
_FOLD = 2_000_000  # n-grams held before they are sorted into the others


@dataclass(frozen=True)
class Contamination:
    """Hashed n-grams of the files an item must not overlap, by script: one in eight, chosen by its hash.

    An overlap by a passage has dozens of them. One by 13 words alone is seen in one case of eight.
    """

    grams: dict[str, np.ndarray]

    @classmethod
    def of_files(cls, paths: list[Path]) -> Contamination:
        """From texts, or the strings of JSON(L). UserError for a file that cannot be read or holds no text."""
        grams = {name: np.zeros(0, dtype=np.uint64) for name in _WIDTH}
        for path in paths:
            fresh: dict[str, list[np.ndarray]] = {name: [] for name in _WIDTH}
            held = dict.fromkeys(_WIDTH, 0)
            any_text = False
            for text in _texts(path):
                for name, width in _WIDTH.items():
                    for start in range(0, len(text), _BLOCK):
                        found = shingle_hashes(text[start : start + _BLOCK], width)
                        any_text = any_text or found.size > 0
                        fresh[name].append(_sample(found))
                        held[name] += fresh[name][-1].size
                    if held[name] > _FOLD:
                        grams[name] = np.unique(np.concatenate([grams[name], *fresh[name]]))
                        fresh[name], held[name] = [], 0
            if not any_text:
                raise UserError(f"{path} holds no text long enough to decontaminate against; drop it from the list.")
            grams = {name: np.unique(np.concatenate([grams[name], *fresh[name]])) for name in _WIDTH}
        return cls(grams)

    def mapped(self, folder: Path) -> Contamination:
        """The same n-grams, written into `folder` and mapped from there: all processes share one copy."""
        for name, grams in self.grams.items():
            save_array(folder / f"contamination.{name}.npy", grams)
        return self.load(folder)

    @classmethod
    def load(cls, folder: Path) -> Contamination:
        """What `mapped` wrote."""
        return cls({name: np.load(folder / f"contamination.{name}.npy", mmap_mode="r") for name in _WIDTH})

    def hits(self, text: str, language: str) -> int:
        """About how many n-grams of the text occur in the files: eight times the sampled ones that do."""
        grams = self.grams["zh" if language == "zh" else "en"]
        if not grams.size:
            return 0
        width, found = _WIDTH["zh" if language == "zh" else "en"], 0
        for start in range(0, len(text), _BLOCK):
            own = np.unique(_sample(shingle_hashes(text[start : start + _BLOCK], width)))
            place = np.minimum(np.searchsorted(grams, own), grams.size - 1)
            found += int((grams[place] == own).sum())
        return found * 8


def _sample(hashes: np.ndarray) -> np.ndarray:
    return hashes[hashes & np.uint64(7) == 0]


def _texts(path: Path) -> Iterator[str]:
    name = path.name.lower()
    opened = gzip.open if name.endswith(".gz") else open
    try:
        if name.removesuffix(".gz").endswith((".jsonl", ".ndjson")):
            with opened(path, "rt", encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    try:
                        yield from _strings(json.loads(line))
                    except (ValueError, RecursionError):
                        raise UserError(
                            f"{path}, line {number} is no JSON; correct the decontamination file."
                        ) from None
            return
        if not name.removesuffix(".gz").endswith(".json"):
            with opened(path, "rt", encoding="utf-8") as file:
                while text := file.read(_BLOCK):
                    yield text
            return
        with opened(path, "rt", encoding="utf-8") as file:
            text = file.read()
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            raise UserError(f"{path} is no JSON; correct the decontamination file.") from None
        yield from _strings(values)  # escapes and field names are no text
    except FileNotFoundError:
        raise UserError(f"the decontamination file {path} does not exist; correct its path.") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"the decontamination file {path} cannot be read ({error}).") from None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def check(item: Item, questions: list[str], contamination: Contamination | None) -> None:
    """Raise Reject with the first gate that an item fails. questions: the bare question of each turn."""
    if (problem := problem_of(item)) is not None:
        raise Reject("invalid item: " + problem[:80])
    for evidence in item.evidence:
        accepted = item.answers[evidence.question]
        if evidence.complete and accepted:
            text = fold(evidence.text)
            if not any(fold(answer) in text for answer in accepted):
                raise Reject("answer not in evidence")
    for question, accepted in zip(questions, item.answers, strict=True):
        if any(fold(answer) in fold(question) for answer in accepted) and len(accepted) == 1:
            raise Reject("answerable without the document")
        if item.task != "code_completion" and question and language_of_short(question) != item.language:
            raise Reject("language does not match")
        if contamination is not None and contamination.hits(" ".join((question, *accepted)), item.language):
            raise Reject("overlaps a decontamination file")


def supported(answer: str, evidence: list[str], language: str) -> bool:
    """Whether an answer that no passage holds word for word still rests on the passages together: every number and
    name of it, and two thirds of its words (of Chinese: of its pairs of characters), stand in them."""
    passages = squash(" ".join(evidence)).casefold()
    words = squash(answer).casefold()
    if words in passages:
        return True
    if any(number not in passages for number in re.findall(r"\d+", answer)):
        return False
    if language == "zh":
        pairs = [run[i : i + 2] for run in re.findall(r"[\u3400-\u9fff]+", words) for i in range(len(run) - 1)]
        return bool(pairs) and sum(pair in passages for pair in pairs) * 3 >= 2 * len(pairs)
    known = Counter(re.findall(r"\w+", passages))
    if any(name.casefold() not in known for name in re.findall(r"(?<=[a-z,;] )[A-Z]\w+", answer)):
        return False
    content = [word for word in re.findall(r"\w+", words) if len(word) > 3]
    return bool(content) and sum(word in known for word in content) * 3 >= 2 * len(content)


def keys_of(item: Item, questions: list[str]) -> list[str]:
    """What must be new in every item: its questions (with the answer, where the question is one of few forms), or, for
    summaries, few-shot and code, the text asked about."""
    if item.task in ("summary", "few_shot", "code_completion"):
        where = item.messages[0]["content"][-800:] if item.task != "summary" else item.messages[1]["content"]
        return [f"{hash64(item.kind + squash(where)):016x}"]
    if item.task == "stated_facts":  # invented facts may come again, the same set of them may not
        return [f"{hash64(' '.join(questions)):016x}"]
    return [
        f"{hash64(squash(question) + '|' + '|'.join(a)):016x}"
        for question, a in zip(questions, item.answers, strict=True)
    ]
