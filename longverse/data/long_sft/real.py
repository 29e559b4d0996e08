"""Questions about sentences that a text has of its own, answered by those sentences: what stands about a phrase, which
sentence two words are in, who said something, what a term means.

Invented facts are all of a few makes. Here the sentence that is wanted is any sentence, and nothing sets it off from
its neighbours but what the question says.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from longverse.data.long_sft.found import Found
from longverse.data.text import paragraphs, sentences

# Of the rules' finds those whose evidence is one short stretch that answers by itself.
_RULES = ("who_said", "missing_name", "definition", "courtesy_name", "birthplace", "effective_date", "passed_by")
_PHRASE = {
    "en": (
        "Which sentence mentions “{p}”?", "What does the document say about “{p}”?", "Where is “{p}” mentioned?",
        "What is said about {p}?", "Find the sentence with the words “{p}”.", "What is written of {p}?",
    ),
    "zh": (
        "哪句话提到“{p}”？", "关于“{p}”，文中是怎么说的？", "文中哪里写到“{p}”？", "请找出写有“{p}”的那句话。",
        "文中怎样讲到{p}？",
    ),
}  # fmt: skip
_WORDS = (
    "Which sentence speaks of both “{a}” and “{b}”?", "What is said where {a} and {b} come together?",
    "In which sentence do the words {a} and {b} stand?", "What does the text say about the {a} and the {b}?",
)  # fmt: skip
_LINKING_WORDS = (
    "the a an of to and in that it is was he she his her they with for as at by on not had be but which who this from"
    " have were so all or if my your you i we their its there been when what would could should will may might no"
)
_LINKING = frozenset(_LINKING_WORDS.split())
_WORD = re.compile(r"[A-Za-z][A-Za-z'’-]*[A-Za-z]")
_RUN = re.compile(r"[\u3400-\u9fff]{4,}")
_COMMON_ZH = frozenset("之乎者也矣焉哉而其以于与则曰的了是在不有我他这那")


@dataclass(frozen=True)
class Real:
    """kind: phrase, words, or the rule's; sentence: what answers, as it stands in the text; answers: what a right reply
    holds; once: stands once in all that is shown, or the question would be ambiguous."""

    kind: str
    sentence: str
    question: str
    answers: tuple[str, ...]
    once: tuple[str, ...]


def real_questions(
    text: str, language: str, count: int, rng: random.Random, found: Iterable[Found], source: str
) -> list[Real]:
    """Up to `count` questions on different sentences of `text`, drawn over its whole length. found: the rules' finds
    in `source`, the document that the text was taken from."""
    zh = language == "zh"
    spans = [
        (start + a, start + b)
        for start, end in paragraphs(text)
        for a, b in sentences(text[start:end], language)
        if (12 if zh else 45) <= b - a <= (110 if zh else 280)
    ]
    rng.shuffle(spans)
    from_rules = [one for one in found if one.kind in _RULES and one.end - one.start <= (120 if zh else 320)]
    rng.shuffle(from_rules)
    chosen: list[Real] = []
    taken: set[str] = set()
    by_rule: list[Callable[[], Real | None]] = [_of_find(one, source, text) for one in from_rules[: count * 4]]
    while len(chosen) < count and (spans or by_rule):
        if by_rule and (not spans or rng.random() < 0.3):
            real = by_rule.pop()()
        elif spans:
            start, end = spans.pop()
            real = _about(text, text[start:end], language, rng)
        if real is not None and real.sentence not in taken:
            taken.add(real.sentence)
            chosen.append(real)
    return chosen


def _about(text: str, sentence: str, language: str, rng: random.Random) -> Real | None:
    """A question that names something of the sentence which stands nowhere else."""
    if text.count(sentence) != 1 or "|" in sentence or "[" in sentence:
        return None
    if language == "zh":
        phrase = _phrase_zh(sentence, rng)
    elif rng.random() < 0.35:
        return _by_words(text, sentence, rng)
    else:
        phrase = _phrase_en(sentence, rng)
    if not phrase or text.count(phrase) != 1 or "\n" in phrase:
        return None
    question = rng.choice(_PHRASE[language]).replace("{p}", phrase)
    return Real("phrase", sentence, question, (sentence,), (phrase, sentence))


def _phrase_en(sentence: str, rng: random.Random) -> str:
    """Two to five words in a row that begin and end with a word of weight."""
    words = list(_WORD.finditer(sentence))
    weighty = [i for i, word in enumerate(words) if word[0].lower() not in _LINKING and len(word[0]) > 3]
    if len(weighty) < 2:
        return ""
    first = rng.choice(weighty[:-1])
    last = next((i for i in weighty if first < i <= first + 4), -1)
    return sentence[words[first].start() : words[last].end()] if last > 0 else ""


def _phrase_zh(sentence: str, rng: random.Random) -> str:
    """Four to eight characters in a row, not all of them particles."""
    runs = _RUN.findall(sentence)
    if not runs:
        return ""
    run = rng.choice(runs)
    length = min(len(run), rng.randint(4, 8))
    start = rng.randint(0, len(run) - length)
    phrase: str = run[start : start + length]
    return phrase if sum(c in _COMMON_ZH for c in phrase) * 2 <= length else ""


def _by_words(text: str, sentence: str, rng: random.Random) -> Real | None:
    """Two words of weight, one of which stands nowhere else."""
    words = [w for w in dict.fromkeys(_WORD.findall(sentence)) if w.lower() not in _LINKING and len(w) > 4]
    rare = [word for word in words if text.count(word) == 1]
    if not rare or len(words) < 2:
        return None
    one = rng.choice(rare)
    pair = [one, rng.choice([word for word in words if word != one])]
    rng.shuffle(pair)
    question = rng.choice(_WORDS).replace("{a}", pair[0]).replace("{b}", pair[1])
    return Real("words", sentence, question, (sentence,), (one, sentence))


def _of_find(one: Found, source: str, text: str) -> Callable[[], Real | None]:
    def make() -> Real | None:
        evidence = source[one.start : one.end]
        stands = text.count(evidence) == 1 and (not one.once or text.count(one.once) == 1)
        if not stands or one.title:
            return None
        return Real(one.kind, evidence, one.question, one.answers, (evidence, one.once) if one.once else (evidence,))

    return make
