"""Examples made on the way, new ones for ever: for teaching a small model to look back, before it can learn from text.

    copy   a run of random tokens, again and again: all but the first is learned. What induction heads grow on; the
           runs are of all lengths, short ones as often as long ones, since looking back a little comes first; their
           tokens are drawn as unevenly as words are, since few tokens are soon known well.
    facts  a stretch of the user's texts with invented facts in it, and their questions: looking back for a purpose.

Half of the facts are of the builder's kinds (data/long_sft/stated.py), whose values a model could come to guess; the
other half are put together from words of the text and numbers, which it can only look up.

Example n is a function of (seed, n) alone.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longverse.data.long_sft.prompts import fill, prompt
from longverse.data.long_sft.stated import FactMaker, plain_facts
from longverse.errors import UserError
from longverse.models.chat import ChatFormat
from longverse.models.tokenizer import Tokenizer
from longverse.train.examples import Example, encode_conversation
from longverse.train.new import read_texts

KINDS = ("copy", "facts")
VERSION = 2  # counts up whenever example n becomes another: a run that was begun does not go on with those
SENTENCE = re.compile(r"(?<=[。！？；])|(?<=[.!?;] )|(?<=\n)")
SHORTEST = 4  # tokens of a run that is copied
EVEN = 20  # the n-th token is drawn in proportion to 1 / (n + EVEN)
HELD = 4_000_000  # characters of each text file kept for fillers
Told = tuple[str, str, str]  # a sentence, the question about it, the answer
# {e} has or is told to have {v} as its {a}: each a name, a value or a thing drawn from the text's own words.
OPEN = {
    "en": (
        ("The {a} of {e} is {v}.", "What is the {a} of {e}?"),
        ("The {a} that belongs to {e} is called {v}.", "What is the {a} of {e} called?"),
        ("{e} keeps {v} in the {a}.", "What does {e} keep in the {a}?"),
        ("For {e} the {a} was always {v}.", "What was the {a} for {e}?"),
        ("{e} chose {v} as the {a}.", "What did {e} choose as the {a}?"),
    ),
    "zh": (
        ("{e}的{a}是{v}。", "{e}的{a}是什么？"),
        ("{e}把{a}叫做{v}。", "{e}把{a}叫做什么？"),
        ("{e}在{a}里找到了{v}。", "{e}在{a}里找到了什么？"),
        ("{e}的{a}换成了{v}。", "{e}的{a}换成了什么？"),
        ("{e}用{a}记下了{v}。", "{e}用{a}记下了什么？"),
    ),
}
WORDS = {"en": re.compile(r"\b[a-z]{4,9}\b"), "zh": re.compile(r"[\u4e00-\u9fff]{2,3}")}


@dataclass(frozen=True)
class Story:
    """A text with facts in it, how the first question is put below it, and the questions with their answers."""

    text: str
    frame: str
    asked: tuple[tuple[str, str], ...]

    def prompt(self, question: str) -> str:
        return fill(self.frame, documents=self.text, question=question)


class Made:
    """A source without end. texts: files that facts are put into; facts: how many at most, six of them one in 48 tokens
    at most, more of them one in 128."""

    def __init__(
        self,
        kind: str,
        tokenizer: Tokenizer,
        chat: ChatFormat,
        min_tokens: int,
        max_tokens: int,
        seed: int,
        texts: tuple[str, ...] = (),
        facts: int = 6,
    ) -> None:
        self.label, self.kind, self.seed, self.facts = kind, kind, seed, facts
        self.lengths = np.zeros(0, dtype=np.int64)
        self.tokenizer, self.chat = tokenizer, chat
        self.low, self.high = min_tokens, max_tokens
        self._texts: list[tuple[str, str, list[str]]] = []  # language, text, words of it
        if kind == "facts":
            if not texts:
                raise UserError("A made source of facts needs 'texts', the files that the facts are put into.")
            if max_tokens < 96:
                raise UserError(f"Facts do not fit into {max_tokens} tokens: max_tokens must be at least 96.")
            for path in texts:
                text = _beginning(Path(path))
                chinese = sum("\u4e00" <= letter <= "\u9fff" for letter in text[:2000]) > 600
                language = "zh" if chinese else "en"
                words = sorted(set(WORDS[language].findall(text[:400_000])))
                if not words:
                    raise UserError(f"{path} holds no words to put facts together from: give a text in prose.")
                self._texts.append((language, text, words))
        told = "".join(text for _, text, _ in self._texts)
        self.identity = hashlib.sha256(f"{VERSION} {kind} {seed} {facts} {told}".encode()).hexdigest()[:16]
        self._ordinary = [n for n in range(tokenizer.vocab_size) if n not in tokenizer.special_ids]
        self._weights = list(itertools.accumulate(1 / (n + EVEN) for n in range(len(self._ordinary))))

    def get(self, index: int) -> Example:
        """Example `index`, of a length drawn evenly from the stage's least to its greatest."""
        rng, target = self._begin(index)
        if self.kind == "copy":
            return self._copy(rng, target, index)
        ids, spans = self._encoded(self._story(rng, target))
        return Example(np.array(ids, dtype=np.int64), tuple(spans), f"facts {index}")

    def story(self, index: int) -> Story:
        """What example `index` of facts is made of: for asking its questions one by one."""
        return self._story(*self._begin(index))

    def length(self, index: int) -> int:
        """About how many tokens example `index` has, without making it."""
        return self._begin(index)[1]

    def _begin(self, index: int) -> tuple[random.Random, int]:
        rng = random.Random(f"{self.seed} {self.kind} {index}")
        return rng, rng.randint(max(self.low, min(64, self.high)), self.high)

    def _copy(self, rng: random.Random, target: int, index: int) -> Example:
        longest = (target - 1) // 2
        size = round(math.exp(rng.uniform(math.log(min(SHORTEST, longest)), math.log(longest))))
        run = rng.choices(self._ordinary, cum_weights=self._weights, k=size)
        first = self.tokenizer.bos_id if self.tokenizer.bos_id is not None else min(self.tokenizer.eos_ids)
        ids = np.array([first, *(run * (target // size + 1))][:target], dtype=np.int64)
        # That the run begins again cannot be known the first time.
        return Example(ids, ((size + 2, target, 1.0),), f"copy {index}")

    def _story(self, rng: random.Random, target: int) -> Story:
        language, text, words = rng.choice(self._texts)
        start = rng.randrange(max(1, len(text) - 6 * target))
        maker = FactMaker(language, "train", rng, text[start : start + 6 * target])
        facts: list[Told] = []
        most = min(self.facts, max(target // 128, min(6, target // 48)))
        for _ in range(rng.randint(1, max(1, most))):
            known = plain_facts(maker, 1) if rng.random() < 0.5 else []
            facts += [(fact.sentences[0], fact.question, fact.answers[0]) for fact in known] or [
                _open_fact(rng, language, words)
            ]
        frame = prompt("stated_facts", language, rng) if rng.random() < 0.6 else "{documents}\n\n{question}"
        size = target * (1 if language == "zh" else 3)
        told = _tell(rng, text[start : start + size], facts, frame, language)
        for _ in range(3):  # towards the target, then within the limit
            length = len(self._encoded(told)[0])
            if 0.9 * target <= length <= target:
                break
            size = max(0, int(size * 0.97 * target / length))
            told = _tell(rng, text[start : start + size], facts, frame, language)
        while len(self._encoded(told)[0]) > self.high:
            if size > 60:
                size = size * 3 // 4
            elif len(facts) > 1 or size:
                size, facts = 0, facts[: max(1, len(facts) - 1)]
            else:
                frame, facts = "{documents}\n\n{question}", [_open_fact(rng, language, words)]
            told = _tell(rng, text[start : start + size], facts, frame, language)
        return told

    def _encoded(self, told: Story) -> Any:
        messages: list[dict[str, Any]] = []
        for n, (question, answer) in enumerate(told.asked):
            messages.append({"role": "user", "content": question if n else told.prompt(question)})
            messages.append({"role": "assistant", "content": answer})
        return encode_conversation(messages, self.chat)


def _open_fact(rng: random.Random, language: str, words: list[str]) -> Told:
    sentence, question = rng.choice(OPEN[language])
    if language == "zh":
        bearer, value = rng.choice(words), rng.choice(words)
    else:
        bearer, value = " ".join(rng.choice(words).capitalize() for _ in range(rng.randint(1, 2))), rng.choice(words)
    if rng.random() < 0.4:
        value = str(rng.randint(10, 9999))
    filled = {"e": bearer, "a": rng.choice(words), "v": value}
    return fill(sentence, **filled), fill(question, **filled), value


def _beginning(path: Path) -> str:
    parts, left = [], HELD
    for text in read_texts(path):
        parts.append(text[:left])
        left -= len(parts[-1])
        if left <= 0:
            break
    return "\n".join(parts)


def _tell(rng: random.Random, text: str, facts: list[Told], frame: str, language: str) -> Story:
    sentences = [part for part in re.split(SENTENCE, text)[1:] if part]
    for sentence, _, _ in facts:
        sentences.insert(rng.randint(0, len(sentences)), sentence + ("" if language == "zh" else " "))
    order = rng.sample(facts, len(facts))
    return Story("".join(sentences), frame, tuple((question, answer) for _, question, answer in order))
