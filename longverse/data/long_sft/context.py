"""What every task family works with: the pool, the counts, the random choices of one item, placing evidence."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from longverse.data.long_sft.draft import Draft, Part, Reject
from longverse.data.long_sft.found import Found
from longverse.data.long_sft.offline_code import find_code
from longverse.data.long_sft.offline_en import find_english
from longverse.data.long_sft.offline_zh import book, find_chinese
from longverse.data.long_sft.pool import Opened, Pool, PoolDocument, UnitCounter
from longverse.data.long_sft.prompts import prompt
from longverse.data.text import squash, squash_zh
from longverse.data.vocabulary import ChatCounter

if TYPE_CHECKING:
    from longverse.data.long_sft.asking import Asker

SLACK = 60  # tokens left open before the exact fit
TAIL = 2_400  # characters that the exact fit may draw on; a token has at most a few


@dataclass(frozen=True)
class Spec:
    """What item `index` is to be; everything in it follows from the configuration's seed."""

    index: int
    attempt: int
    seed: int
    task: str
    language: str
    target: int
    depth: float  # where the evidence is wanted, 0 to 1
    recite: bool
    split: str
    questions: int  # in a conversation of several turns
    quote: bool = False  # stated facts: the reply is the stating sentences themselves
    facts: tuple[str, ...] = ("life",)  # which sets of invented facts
    rivals: float = 0.0  # stated facts: share of the questions with a near miss in the text
    real: float = 0.0  # stated facts: share of the questions about sentences that the text has of its own
    ask: float = 0.0  # stated facts: share of the items in the words in which `longverse ask` asks
    sorts: dict[str, float] | None = None  # stated facts: shares of the sorts of question

    @property
    def rng(self) -> random.Random:
        """A fresh generator: the item is a function of its spec and the pool."""
        return random.Random(f"{self.seed} {self.index} {self.attempt}")


@dataclass(eq=False)
class Context:
    """Shared by all items that one process builds."""

    pool: Pool
    chat: ChatCounter
    counter: UnitCounter
    asker: Asker | None = None  # the endpoint, where there is one
    _by_language: dict[str, list[PoolDocument]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for document in self.pool.documents:
            self._by_language.setdefault(document.language, []).append(document)
        self.found = lru_cache(maxsize=64)(self._found)

    def documents(self, language: str) -> list[PoolDocument]:
        """The pool's documents in a language ("code" too)."""
        return self._by_language.get(language, [])

    def _found(self, index: int, language: str) -> tuple[Found, ...]:
        text, about = self.pool.text(index), self.pool.documents[index]
        if about.language == "code":
            return tuple(find_code(text, about.title, language))
        return tuple((find_chinese if about.language == "zh" else find_english)(text, about.title))

    def overhead(self, draft: Draft) -> int:
        """Tokens of the conversation without the texts of its parts (labels counted)."""
        lead = "".join(
            (draft.separator if i else "") + (p.label + "\n" if p.label else "") + p.after
            for i, p in enumerate(draft.parts)
        )
        messages = [{"role": "system", "content": draft.system}] if draft.system else []
        messages.append({"role": "user", "content": draft.turns[0].user.replace("{documents}", lead)})
        messages.append({"role": "assistant", "content": draft.turns[0].reply})
        for turn in draft.turns[1:]:
            messages += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": turn.reply}]
        return self.chat.count(messages, counter=self.counter.count)

    def long_document(self, rng: random.Random, language: str, tokens: int) -> Opened:
        """A random document with at least `tokens` tokens; longer ones are as likely as others. Reject when none
        has."""
        able = [d for d in self.documents(language) if self.pool.estimate(d.index) >= tokens * 1.1]
        if not able:
            raise Reject("document too short")
        return self.pool.open(rng.choice(able).index)

    def segment(self, rng: random.Random, opened: Opened, tokens: int) -> tuple[int, int]:
        """Characters of a stretch of about `tokens` tokens that begins at a paragraph; the document's beginning in one
        case of four. Reject when the document ends before."""
        text = opened.text
        latest = int(len(text) - (tokens + 2 * SLACK) / self.pool.tokens_per_character(opened.about.language) * 1.05)
        start = 0 if rng.random() < 0.25 else rng.randint(0, max(latest, 0))
        if start:
            after = text.find("\n", start, start + 4_000)
            start = after + 1 if after > 0 else 0
            while start < len(text) and text[start].isspace():
                start += 1
        end = opened.end_for(start, tokens)
        if end == len(text):
            raise Reject("document too short")
        return start, end

    def part(self, opened: Opened, start: int, tokens: int, label: str = "") -> Part:
        """The part that begins at `start` and stops SLACK tokens short of `tokens`, with a tail for the exact fit. A
        beginning that is left out is marked."""
        label = beginning(opened, start, label)
        end = opened.end_for(start, tokens - SLACK - (self.counter.count(label) if label else 0))
        return Part.of(opened, start, end, TAIL, label)

    def label(self, rng_label: str, number: int, title: str) -> str:
        """A document's heading in a collection. rng_label: the variant drawn for the item."""
        named = rng_label.replace("《{title}》", book(title)).replace("{title}", title)
        return named.replace("{number}", str(number))


def cut_marks(language: str, code: bool = False) -> tuple[str, str]:
    """The lines that stand for what is left out before and after a part that is shown."""
    if code:
        return "# […]", "# […]"
    return ("（上略）", "（下略）") if language == "zh" else ("[…]", "[…]")


def beginning(opened: Opened, start: int, label: str = "") -> str:
    """The lines above a part: its label, and a mark where it does not begin with its document."""
    mark = cut_marks(opened.about.language, opened.about.language == "code")[0] if start else ""
    return "\n".join(filter(None, (label, mark)))


def at_depth(found: Sequence[Found], start: int, end: int, depth: float, shown: str, rng: random.Random) -> list[Found]:
    """Finds within start:end whose words occur once in `shown`, nearest to the wanted depth first. A little chance
    among the nearest keeps the kinds mixed where one kind is frequent."""
    wanted = start + depth * (end - start)
    inside = [f for f in found if f.start >= start and f.end <= end and not f.whole]
    inside.sort(key=lambda f: abs((f.start + f.end) / 2 - wanted))
    near = inside[:24]
    by_kind: dict[str, list[Found]] = {}
    for one in near:
        by_kind.setdefault(one.kind, []).append(one)
    kinds = list(by_kind)
    rng.shuffle(kinds)
    # The nearest of each kind, kinds in random order, then the rest: no rule crowds out the others.
    order = [by_kind[kind][0] for kind in kinds] + near
    return [f for f in order if not f.once or shown.count(f.once) == 1]


def reply_to(found_reply: str, evidence: Sequence[str], recite: bool, language: str, rng: random.Random) -> str:
    """The answer, after the evidence where it is to be recited first."""
    if not recite or not evidence:
        return found_reply
    zh = language == "zh"
    quoted = []
    for text in map(squash_zh if zh else squash, evidence):  # marks that the passage itself does not use
        pairs = ("“”", "「」", "『』") if zh else ('""', "“”", "«»")
        pair = next((pair for pair in pairs if not set(pair) & set(text)), pairs[-1])
        quoted.append(f"{pair[0]}{text}{pair[1]}")
    name = "recite" if len(quoted) == 1 else "recite_several"
    return prompt(name, language, rng, evidence=("；" if zh else " ").join(quoted), answer=found_reply)


Builder = Callable[[Context, Spec], Draft]
