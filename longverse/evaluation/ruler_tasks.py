"""RULER's 13 tasks, generated: texts that can be made of any length, whose answers are known by construction.

Source: Hsieh et al. 2024, "RULER: What's the Real Context Size of Your Long-Context Language Models?"
(arXiv:2404.06654) and the authors' repository (NVIDIA/RULER): definitions, counts, worked examples and the beginnings
of the answers. Wording, words and texts here are our own, so scores are near to but not the same as those of the
authors' files.

Each task gives a `Draft`: parts that the length is fitted by (sentences, lines or words that can be left out),
what must stay, the question, the answer's beginning, and the references.
"""

from __future__ import annotations

import functools
import hashlib
import math
import random
import string
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from longverse.errors import UserError
from longverse.evaluation.files import read_json, read_rows
from longverse.evaluation.haystack import generated, vocabulary

SHORT = 4096  # tokens: below it the authors list common words 6 times and others once
_NOISE = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
_START = """
amber ancient apt arctic autumn balmy blue bold brave breezy bright brisk calm candid cedar civic clever
cobalt copper coral cosmic crisp curious daring dawn deft eager early easy elder electric emerald fabled
faint fern fleet floral fond frosty gentle gilded glad golden grand green happy hazel hidden honest humble
icy idle indigo ivory jade jolly keen kind lively lofty lone loyal lucid lunar magic maple marble mellow
mild misty modest mossy narrow noble nutmeg oaken olive opal pale paper patient pearl pine placid plain
plum polar proud quick quiet rapid rare red restless rosy round rural rustic sable sage scarlet serene
sharp shy silent silk silver sleek slow small snowy solar solid sonic spry stark steady steep still stout
sunny swift tall tame tidy tiny topaz tranquil true urban vast velvet vivid warm wary wild windy wise witty
woolly young zesty
""".split()  # noqa: SIM905
_END = """
acorn anchor apple arrow badge banner barn basket beacon bell birch bloom boat bridge brook bucket candle
canyon castle cave cliff cloud clover coast comet compass cottage crane creek crown dale dune eagle ember
falcon feather field finch flame flute forest forge fountain fox garden gate glacier glade grove harbor
hawk hearth hedge heron hill hollow island jacket kettle kite lake lantern leaf ledge lily lodge lynx marsh
meadow mill mirror moon moth mountain nest oak ocean orchard otter owl path pebble pepper pine plain planet
pond prairie quarry quill raven reef ridge river robin rocket saddle sail shell shore sparrow spring
squirrel star stone stream summit swan tower trail tulip tunnel valley violin wagon walnut wave well willow
wren
""".split()  # noqa: SIM905


@dataclass(frozen=True)
class Draft:
    """A row before its length is fitted.

    parts: yields the pieces, as many as a length asks for; build(pieces) makes the whole prompt of them and of
    what must stay; lead: how the answer begins, given to the model; references: the answers; any_of: one reference is
    enough (the qa tasks), else the score is the share of them that is found. new_tokens: length of the answer.
    """

    parts: Callable[[], Iterator[str]]
    build: Callable[[Sequence[str]], str]
    lead: str
    references: tuple[str, ...]
    any_of: bool = False
    new_tokens: int = 128


TASKS = (
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
    "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2",
)  # fmt: skip


def make_draft(task: str, rng: random.Random, length: int, qa: QuestionFile | None = None) -> Draft:
    """One row of a task for `length` tokens of prompt and answer; qa: the user's question file for qa_1 and qa_2, else
    their texts are generated."""
    if task.startswith("niah_"):
        return _NIAH[task](rng)
    if task == "vt":
        return _variables(rng)
    if task == "cwe":
        return _common_words(rng, length)
    if task == "fwe":
        return _frequent_words(rng)
    if task in ("qa_1", "qa_2"):
        return _from_file(rng, qa) if qa is not None else _generated_qa(rng, hops=2 if task == "qa_2" else 1)
    raise UserError(f"RULER has no task called {task!r}: choose among {', '.join(TASKS)}.")


# ---- needles in a haystack ------------------------------------------------------------------------------


def _word(rng: random.Random) -> str:
    return f"{rng.choice(_START)}-{rng.choice(_END)}"


def _different(rng: random.Random, make: Callable[[random.Random], str], count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[make(rng)] = None
    return list(found)


def _number(rng: random.Random) -> str:
    return str(rng.randint(1_000_000, 9_999_999))


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _noise() -> Iterator[str]:
    while True:
        yield " ".join(_NOISE) + "\n"


def _niah(
    *, haystack: str, what: str = "number", keys: int = 1, values: int = 1, queries: int = 1, uuid_keys: bool = False
) -> Callable[[random.Random], Draft]:
    """keys: how many keys have needles; values: needles of each key; queries: how many of the keys are asked for."""
    value = _number if what == "number" else _uuid
    key = _uuid if uuid_keys else _word
    end = " " if haystack == "essay" else "\n"  # prose runs on; noise and needles have a line each

    def needle(name: str, number: str) -> str:
        return f"One of the special magic {what}s for {name} is: {number}.{end}"

    def make(rng: random.Random) -> Draft:
        seed = rng.getrandbits(48)
        names = _different(rng, key, max(keys, queries))
        table = {name: _different(rng, value, values) for name in names}
        asked = names[:queries]
        stay = [needle(name, number) for name, numbers in table.items() for number in numbers]
        rng.shuffle(stay)
        places = [rng.random() for _ in stay]

        def needles() -> Iterator[str]:
            inner = random.Random(seed)
            while True:
                if (name := key(inner)) not in table:  # another value for a key that is asked for would be right too
                    yield needle(name, value(inner))

        parts = {"noise": _noise, "essay": lambda: generated("en", seed), "needles": needles}[haystack]
        one = len(asked) * values == 1
        noun, be, them = (f"special magic {what}", "is", "it") if one else (f"special magic {what}s", "are", "them")
        which = ", ".join(asked[:-1]) + (f", and {asked[-1]}" if len(asked) > 1 else asked[0])

        def build(pieces: Sequence[str]) -> str:
            text = _scatter(pieces, stay, places)
            about = f"A {noun} {be}" if one else f"Some {noun} {be}"
            question = f"What {be} {'the' if one else 'all the'} {noun} for {which} mentioned in the provided text?"
            return (
                f"{about} hidden within the following text. Memorise {them}; you will be asked about {them} "
                f"afterwards.\n{text}\n{question}"
            )

        lead = f" The {noun} for {which} mentioned in the provided text {be}"
        return Draft(parts, build, lead, tuple(number for name in asked for number in table[name]))

    return make


def _scatter(pieces: Sequence[str], stay: Sequence[str], places: Sequence[float]) -> str:
    """The pieces with every sentence of `stay` after the share `places` of them."""
    at: dict[int, list[str]] = {}
    for sentence, place in zip(stay, places, strict=True):
        at.setdefault(round(place * len(pieces)), []).append(sentence)
    out = []
    for index in range(len(pieces) + 1):
        out += at.get(index, [])
        if index < len(pieces):
            out.append(pieces[index])
    return "".join(out).strip()


_NIAH = {
    "niah_single_1": _niah(haystack="noise"),
    "niah_single_2": _niah(haystack="essay"),
    "niah_single_3": _niah(haystack="essay", what="uuid"),
    "niah_multikey_1": _niah(haystack="essay", keys=4),
    "niah_multikey_2": _niah(haystack="needles"),
    "niah_multikey_3": _niah(haystack="needles", what="uuid", uuid_keys=True),
    "niah_multivalue": _niah(haystack="essay", values=4),
    "niah_multiquery": _niah(haystack="essay", queries=4),
}


# ---- tracing and counting -------------------------------------------------------------------------------
# vt and cwe begin with one worked example: the same task, short, with its answer.


def _chain(rng: random.Random, letters: int, hops: int) -> tuple[list[str], str, list[str]]:
    """Names, value and lines of a chain: a variable is set, and each further one takes the value of the one before."""
    names = _different(rng, lambda r: "".join(r.choices(string.ascii_uppercase, k=letters)), hops + 1)
    value = str(rng.randint(10_000, 99_999))
    lines = [f"VAR {names[0]} = {value}\n"]
    return names, value, lines + [f"VAR {later} = VAR {earlier}\n" for earlier, later in pairwise(names)]


def _variables(rng: random.Random, hops: int = 4, noise_in_example: int = 5) -> Draft:
    names, value, chain = _chain(rng, 5, hops)
    shown, shown_value, shown_chain = _chain(rng, 3, hops)
    # In order: a variable is set before the next takes its value.
    places = sorted(rng.random() for _ in chain)
    shown_places = sorted(rng.random() for _ in shown_chain)

    def ask(text: str, number: str) -> str:
        return (
            f"Memorise and track the chain of variable assignments hidden in the following text.\n\n{text}\n"
            f"Question: Find all variables that are assigned the value {number} in the text above."
        )

    def lead(number: str) -> str:
        return (
            f" Answer: According to the chain of assignments in the text above, {hops + 1} variables are assigned the "
            f"value {number}, they are:"
        )

    text = _scatter(list(islice(_noise(), noise_in_example)), shown_chain, shown_places)
    example = f"{ask(text, shown_value)}{lead(shown_value)} {' '.join(shown)}\n\n"
    return Draft(
        _noise,
        lambda pieces: example + ask(_scatter(pieces, chain, places), value),
        lead(value),
        tuple(names),
        new_tokens=30,
    )


def _coined(rng: random.Random) -> str:
    """A word of six letters that is none; words of one length are never part of each other."""
    return "".join(rng.choice("bcdfghjklmnprstvw") + rng.choice("aeiou") for _ in range(3))


@functools.cache
def _english() -> tuple[str, ...]:
    """English words none of which is a part of another."""
    words = sorted({word for word in (*_START, *_END, *vocabulary()) if len(word) > 3})
    return tuple(word for word in words if not any(word in other and word != other for other in words))


def _words(rng: random.Random, most: int) -> Iterator[str]:
    """Words in random order, none twice and none a part of another: all English ones and, where these are fewer than
    `most`, coined ones to make up that number, mixed, so that an early word is as likely English as a late one. Past
    `most`, coined ones."""
    english = frozenset(_english())

    def coined() -> Iterator[str]:
        seen = {word[i : i + 6] for word in english for i in range(len(word) - 5)}
        while True:
            word = _coined(rng)
            if word not in seen and not any(word[i:j] in english for i in range(3) for j in range(i + 4, 7)):
                seen.add(word)
                yield word

    more = coined()
    mixed = [*_english(), *islice(more, max(0, most - len(english)))]
    rng.shuffle(mixed)
    yield from mixed
    yield from more


def _common_words(rng: random.Random, length: int, common: int = 10) -> Draft:
    often, seldom = (6, 1) if length < SHORT else (30, 3)
    shown, shown_often, shown_seldom = (20, 3, 1) if length < SHORT else (40, 10, 3)  # words in the example
    seed = rng.getrandbits(48)

    def listed(words: Sequence[str], times: int, others: Sequence[str], times_others: int) -> str:
        every = [*words] * times + [*others] * times_others
        random.Random(seed + 1).shuffle(every)
        return (
            "Below is a numbered list of words. In these words, some appear more often than others. Memorise the ones "
            f"that appear most often.\n{_numbered(every)}\n"
            f"Question: What are the {common} most common words in the above list?"
        )

    def fresh() -> Iterator[str]:
        # A listed word takes three tokens or more (number, dot, word), so the row holds no more different ones.
        return _words(random.Random(seed), length // (3 * seldom))

    lead = f" Answer: The top {common} words that appear most often in the list are:"
    first = list(islice(fresh(), shown + common))
    in_example, words = first[:shown], first[shown:]
    told = in_example[:common]
    example = f"{listed(told, shown_often, in_example[common:], shown_seldom)}{lead} {_numbered(told)}\n\n"
    return Draft(
        lambda: islice(fresh(), shown + common, None),
        lambda pieces: example + listed(words, often, pieces, seldom),
        lead,
        tuple(words),
        new_tokens=120,
    )


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def _frequent_words(rng: random.Random, top: int = 3) -> Draft:
    # Zipf's law with exponent 2: of n words the one of rank k comes n / (k ** 2 * zeta(2)) times, rounded down and not
    # drawn, so that the order of the ranks is certain. The first rank is dots.
    vocabulary = ["....", *_different(rng, _coined, 1500)]
    seed = rng.getrandbits(48)

    def build(pieces: Sequence[str]) -> str:
        words: list[str] = []
        for rank, word in enumerate(vocabulary, 1):
            words += [word] * math.floor(len(pieces) / (rank**2 * math.pi**2 / 6))
        random.Random(seed).shuffle(words)
        return (
            "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
            f"appearing coded words. {' '.join(words)}\n"
            "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
            "frequently appearing words in the above coded text?"
        )

    def parts() -> Iterator[str]:
        while True:
            yield ""  # only their number counts

    lead = " Answer: According to the coded text above, the three most frequently appearing words are:"
    return Draft(parts, build, lead, tuple(vocabulary[1 : top + 1]), new_tokens=50)


# ---- questions over documents ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """own: titles of the documents that go with it and always stay; near: those that distract first."""

    text: str
    answers: tuple[str, ...]
    own: tuple[str, ...]
    near: tuple[str, ...] = ()


@dataclass(frozen=True)
class QuestionFile:
    """Questions of a user's file, and all its documents by title. name: with a fingerprint of the content."""

    name: str
    questions: tuple[Question, ...]
    documents: dict[str, str]


def read_questions(path: Path) -> QuestionFile:
    """A SQuAD file ({"data": [{"title", "paragraphs": [{"context", "qas"}]}]}) or a HotpotQA one (rows with
    question, answer and context [[title, sentences]]; a JSON list or JSON lines). UserError for anything else.

    As the authors take them: of SQuAD the paragraph, distracted first by those of its article; of HotpotQA all the
    documents of the row. Questions without an answer are passed over.
    """
    value: Any = [row for _, row in read_rows(path)] if path.suffix == ".jsonl" else read_json(path)
    questions: list[Question] = []
    documents: dict[str, str] = {}
    try:
        if isinstance(value, dict):
            for article_number, article in enumerate(value["data"]):
                titles = [f"{article_number} {number}" for number in range(len(article["paragraphs"]))]
                for title, paragraph in zip(titles, article["paragraphs"], strict=True):
                    documents[title] = paragraph["context"]
                    near = tuple(other for other in titles if other != title)
                    for qa in paragraph["qas"]:
                        answers = tuple(dict.fromkeys(a["text"] for a in qa["answers"]))
                        if answers and not qa.get("is_impossible"):
                            questions.append(Question(qa["question"], answers, (title,), near))
        else:
            for row in value:
                own = []
                for title, sentences in row["context"]:
                    text = "".join(sentences) if isinstance(sentences, list) else sentences
                    documents[title] = f"{title}\n{text}"
                    own.append(title)
                questions.append(Question(row["question"], (row["answer"],), tuple(dict.fromkeys(own))))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path} is neither a SQuAD nor a HotpotQA file: give one of those with --qa.") from None
    questions = [question for question in questions if len(question.own) < len(documents)]
    if not questions:
        raise UserError(f"{path} has too few questions or documents: give a whole SQuAD or HotpotQA file with --qa.")
    digest = hashlib.sha256(repr((questions, documents)).encode()).hexdigest()[:16]
    return QuestionFile(f"{path.name} ({digest})", tuple(questions), documents)


def _qa_draft(
    rng: random.Random, own: list[str], others: Callable[[], Iterator[str]], question: str, answers: tuple[str, ...]
) -> Draft:
    places = [rng.random() for _ in own]
    order = (
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    )

    def build(pieces: Sequence[str]) -> str:
        listed = list(pieces)
        for document, place in zip(own, places, strict=True):
            listed.insert(round(place * len(listed)), document)
        text = "\n\n".join(f"Document {number}:\n{document.strip()}" for number, document in enumerate(listed, 1))
        return f"{order}\n\nThe following are given documents.\n\n{text}\n\n{order}\n\nQuestion: {question}"

    return Draft(others, build, " Answer:", answers, any_of=True, new_tokens=32)


def _from_file(rng: random.Random, qa: QuestionFile) -> Draft:
    question = rng.choice(qa.questions)
    near = [title for title in question.near if title not in question.own]
    rest = [title for title in qa.documents if title not in question.own and title not in set(near)]
    rng.shuffle(near)
    rng.shuffle(rest)

    def others() -> Iterator[str]:
        # The authors repeat the distractors too when a text is to be longer than the collection.
        while near or rest:
            yield from (qa.documents[title] for title in (*near, *rest))

    return _qa_draft(rng, [qa.documents[t] for t in question.own], others, question.text, question.answers)


def _generated_qa(rng: random.Random, hops: int) -> Draft:
    from longverse.evaluation.facts import Picker, make_fact

    seed = rng.getrandbits(48)
    kind = rng.choice(("employer", "boat", "meeting") if hops == 2 else ("birthplace", "profession", "pet"))
    fact = make_fact("hop" if hops == 2 else "facts", kind, Picker("en", seed))

    def document(number: int, sentence: str | None = None) -> str:
        lines = [s.strip() for s in islice(generated("en", seed + number), 4)]
        return " ".join(lines[:2] + ([sentence] if sentence else []) + lines[2:])

    own = [document(-1 - i, sentence) for i, sentence in enumerate(fact.sentences)]

    def others() -> Iterator[str]:
        number = 0
        while True:
            number += 1
            yield document(number)

    return _qa_draft(rng, own, others, fact.question, fact.accepted)
