"""Examples made on the way, new ones for ever: for teaching a small model to look back, before it can learn from text.

    copy   a run of random tokens, and the same run again: the second is learned. What induction heads grow on.
    facts  a stretch of the user's texts with invented facts in it, and their questions: looking back for a purpose.

Example n is a function of (seed, n) alone.
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import numpy as np

from longverse.data.long_sft.stated import Fact, FactMaker
from longverse.errors import UserError
from longverse.models.chat import ChatFormat
from longverse.models.tokenizer import Tokenizer
from longverse.train.examples import Example, encode_conversation
from longverse.train.new import read_texts

KINDS = ("copy", "facts")
SENTENCE = re.compile(r"(?<=[。！？；])|(?<=[.!?;] )|(?<=\n)")
HELD = 4_000_000  # characters of each text file kept for fillers


class Made:
    """A source without end. texts: files that facts are put into."""

    def __init__(
        self,
        kind: str,
        tokenizer: Tokenizer,
        chat: ChatFormat,
        min_tokens: int,
        max_tokens: int,
        seed: int,
        texts: tuple[str, ...] = (),
    ) -> None:
        self.label, self.kind, self.seed = kind, kind, seed
        self.lengths = np.zeros(0, dtype=np.int64)
        self.tokenizer, self.chat = tokenizer, chat
        self.low, self.high = min_tokens, max_tokens
        self._texts: list[str] = []
        if kind == "facts":
            if not texts:
                raise UserError("A made source of facts needs 'texts', the files that the facts are put into.")
            if max_tokens < 96:
                raise UserError(f"Facts do not fit into {max_tokens} tokens: max_tokens must be at least 96.")
            for path in texts:
                self._texts.append(_beginning(Path(path)))
        self._ordinary = [n for n in range(tokenizer.vocab_size) if n not in tokenizer.special_ids]

    def get(self, index: int) -> Example:
        """Example `index`, of a length drawn evenly from the stage's least to its greatest."""
        rng, target = self._begin(index)
        return self._copy(rng, target, index) if self.kind == "copy" else self._facts(rng, target, index)

    def length(self, index: int) -> int:
        """About how many tokens example `index` has, without making it."""
        return self._begin(index)[1]

    def _begin(self, index: int) -> tuple[random.Random, int]:
        rng = random.Random(f"{self.seed} {self.kind} {index}")
        return rng, rng.randint(max(self.low, min(64, self.high)), self.high)

    def _copy(self, rng: random.Random, target: int, index: int) -> Example:
        run = [rng.choice(self._ordinary) for _ in range((target - 1) // 2)]
        first = self.tokenizer.bos_id if self.tokenizer.bos_id is not None else min(self.tokenizer.eos_ids)
        ids = np.array([first, *run, *run], dtype=np.int64)
        # The first token of the second run cannot be known.
        return Example(ids, ((len(run) + 2, len(ids), 1.0),), f"copy {index}")

    def _facts(self, rng: random.Random, target: int, index: int) -> Example:
        text = rng.choice(self._texts)
        chinese = sum("\u4e00" <= letter <= "\u9fff" for letter in text[:2000]) > 600
        language = "zh" if chinese else "en"
        start = rng.randrange(max(1, len(text) - 6 * target))
        maker = FactMaker(language, "train", rng, text[start : start + 6 * target])
        facts = [maker.plain() for _ in range(rng.randint(1, max(1, min(6, target // 96))))]
        size = target * (1 if chinese else 3)
        ids, spans = self._tell(rng, text[start : start + size], facts, chinese)
        for _ in range(3):  # towards the target, then within the limit
            if 0.9 * target <= len(ids) <= target:
                break
            size = max(0, int(size * 0.97 * target / len(ids)))
            ids, spans = self._tell(rng, text[start : start + size], facts, chinese)
        while len(ids) > self.high:
            size, facts = (size * 3 // 4, facts) if size > 60 else (0, facts[: max(1, len(facts) - 1)])
            ids, spans = self._tell(rng, text[start : start + size], facts, chinese)
            assert size or len(facts) > 1 or len(ids) <= self.high, "one fact alone exceeds max_tokens"
        return Example(np.array(ids, dtype=np.int64), tuple(spans), f"facts {index}")

    def _tell(self, rng: random.Random, text: str, facts: list[Fact], chinese: bool) -> Any:
        return encode_conversation(_conversation(rng, text, facts, chinese), self.chat)


def _beginning(path: Path) -> str:
    parts, left = [], HELD
    for text in read_texts(path):
        parts.append(text[:left])
        left -= len(parts[-1])
        if left <= 0:
            break
    return "\n".join(parts)


def _conversation(rng: random.Random, text: str, facts: list[Fact], chinese: bool) -> list[dict[str, Any]]:
    sentences = [part for part in re.split(SENTENCE, text)[1:] if part]
    for fact in facts:
        sentences.insert(rng.randint(0, len(sentences)), fact.sentences[0] + ("" if chinese else " "))
    asked = rng.sample(facts, len(facts))
    messages = []
    for n, fact in enumerate(asked):
        content = fact.question if n else "".join(sentences) + "\n\n" + fact.question
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": fact.answers[0]})
    return messages
