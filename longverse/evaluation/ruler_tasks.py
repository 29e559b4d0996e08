"""RULER's 13 tasks, generated: texts that can be made of any length, whose answers are known by construction.

Source: Hsieh et al. 2024, "RULER: What's the Real Context Size of Your Long-Context Language Models?"
(arXiv:2404.06654): the definitions and settings of the 13 tasks. Wording, words and texts here are our own, so
scores are near to but not the same as those of the authors' files.

Each task gives a `Draft`: parts that the length is fitted by (sentences, lines or words that can be left out),
what must stay, the question, and the references.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from longverse.errors import UserError
from longverse.evaluation.files import read_json, read_rows
from longverse.evaluation.haystack import generated

_NOISE = ("The grass is green. ", "The sky is blue. ", "The sun is yellow. ", "Here we go. ", "There and back again. ")
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
    what must stay; references: the answers; any_of: one reference is enough (the qa tasks), else the score is the
    share of them that is found. new_tokens: length of the answer.
    """

    parts: Callable[[], Iterator[str]]
    build: Callable[[Sequence[str]], str]
    references: tuple[str, ...]
    any_of: bool = False
    new_tokens: int = 128


TASKS = (
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
    "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2",
)  # fmt: skip


def make_draft(task: str, rng: random.Random, qa: QuestionFile | None = None) -> Draft:
    """One row of a task; qa: the user's question file for qa_1 and qa_2, else their texts are generated."""
    if task.startswith("niah_"):
        return _NIAH[task](rng)
    if task == "vt":
        return _variables(rng)
    if task == "cwe":
        return _common_words(rng)
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


def _noise(rng: random.Random) -> Iterator[str]:
    while True:
        yield "".join(_NOISE)


def _needle(key: str, value: str, what: str) -> str:
    return f"One of the special magic {what}s for {key} is: {value}. "


def _niah(
    *, haystack: str, what: str = "number", keys: int = 1, values: int = 1, queries: int = 1, uuid_keys: bool = False
) -> Callable[[random.Random], Draft]:
    """keys: how many keys have needles; values: needles of each key; queries: how many of the keys are asked for."""
    value = _number if what == "number" else _uuid

    def make(rng: random.Random) -> Draft:
        seed = rng.getrandbits(48)
        names = _different(rng, _uuid if uuid_keys else _word, max(keys, queries))
        table = {name: _different(rng, value, values) for name in names}
        asked = names[:queries]
        stay = [_needle(name, v, what) for name, all_values in table.items() for v in all_values]
        rng.shuffle(stay)
        places = [rng.random() for _ in stay]

        def parts() -> Iterator[str]:
            inner = random.Random(seed)
            if haystack == "noise":
                return _noise(inner)
            if haystack == "essay":
                return generated("en", seed)
            return (_needle((_uuid if uuid_keys else _word)(inner), value(inner), what) for _ in iter(int, 1))

        many = len(asked) * values > 1
        which = ", ".join(asked[:-1]) + (f", and {asked[-1]}" if len(asked) > 1 else asked[0])

        def build(pieces: Sequence[str]) -> str:
            text = _scatter(pieces, stay, places)
            noun = f"special magic {what}{'s' if many else ''}"
            ask = f"What {'are all the' if many else 'is the'} {noun} for {which} mentioned in the provided text?"
            lead = f"The {noun} for {which} mentioned in the provided text {'are' if many else 'is'}"
            return (
                f"Some special magic {what}s are hidden within the following text. Memorise them; you will be asked "
                f"about them afterwards.\n{text}\n{ask} {lead}"
            )

        references = tuple(v for name in asked for v in table[name])
        return Draft(parts, build, references)

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


def _variables(rng: random.Random, hops: int = 4) -> Draft:
    names = _different(rng, lambda r: "".join(r.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(5)), hops + 1)
    value = str(rng.randint(10_000, 99_999))
    chain = [f"VAR {names[0]} = {value}. "]
    chain += [f"VAR {later} = VAR {earlier}. " for earlier, later in pairwise(names)]
    # In order: a variable is set before the next takes its value.
    places = sorted(rng.random() for _ in chain)

    def build(pieces: Sequence[str]) -> str:
        return (
            "Memorise and track the chain of variable assignments hidden in the following text.\n\n"
            f"{_scatter(pieces, chain, places)}\n\n"
            f"Question: find all variables that are assigned the value {value} in the text above. "
            f"Answer: according to the chain of assignments, {len(names)} variables are assigned the value {value}, "
            "they are:"
        )

    return Draft(lambda: _noise(rng), build, tuple(names), new_tokens=30)


def _coined(rng: random.Random) -> str:
    return "".join(rng.choice("bcdfghjklmnprstvw") + rng.choice("aeiou") for _ in range(rng.randint(2, 4)))


def _common_words(rng: random.Random, common: int = 10, often: int = 30, seldom: int = 3) -> Draft:
    words = _different(rng, _coined, common)
    seed = rng.getrandbits(48)

    def parts() -> Iterator[str]:
        inner, seen = random.Random(seed), set(words)
        while True:
            word = _coined(inner)
            if word not in seen:
                seen.add(word)
                yield word

    def build(pieces: Sequence[str]) -> str:
        # Pads and short lists too: every other word comes `seldom` times, the common ones `often` times.
        listed = [w for w in words for _ in range(often)] + [w for w in pieces for _ in range(seldom)]
        random.Random(seed + 1).shuffle(listed)
        numbered = " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))
        return (
            "Below is a numbered list of words. In these words, some appear more often than others. Memorise the ones "
            f"that appear most often.\n{numbered}\n"
            f"Question: what are the {common} most common words in the above list? "
            f"Answer: the top {common} words that appear most often in the list are:"
        )

    return Draft(parts, build, tuple(words), new_tokens=120)


def _frequent_words(rng: random.Random, exponent: float = 2.0, top: int = 3) -> Draft:
    # Zipf's law: the word of rank k is 1 / (k ** exponent * zeta(exponent)) of the text. The first rank is dots.
    vocabulary = ["....", *_different(rng, _coined, 1500)]
    weights = [1 / rank**exponent for rank in range(1, len(vocabulary) + 1)]
    shares = [weight / sum(weights) for weight in weights]
    seed = rng.getrandbits(48)

    def build(pieces: Sequence[str]) -> str:
        # Exact shares and not draws, so that the order of the ranks is certain at every length.
        words: list[str] = []
        for word, share in zip(vocabulary, shares, strict=True):
            times = round(share * len(pieces))
            if times == 0:
                break
            words += [word] * times
        words += vocabulary[len(set(words)) :][: len(pieces) - len(words)]  # the rare ones once each
        random.Random(seed).shuffle(words)
        return (
            "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
            f"appearing coded words.\n{' '.join(words)}\n"
            "Question: do not provide any explanation. Please ignore the dots '....'. What are the three most "
            "frequently appearing words in the above coded text? Answer: according to the coded text above, the three "
            "most frequently appearing words are:"
        )

    def parts() -> Iterator[str]:
        while True:
            yield ""  # only their number counts

    return Draft(parts, build, tuple(vocabulary[1 : top + 1]), new_tokens=50)


# ---- questions over documents ---------------------------------------------------------------------------


@dataclass(frozen=True)
class QuestionFile:
    """Questions of a user's file: (question, answers, titles of its own documents), and all documents by title."""

    questions: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]
    documents: dict[str, str]


def read_questions(path: Path) -> QuestionFile:
    """A SQuAD file ({"data": [{"title", "paragraphs": [{"context", "qas"}]}]}) or a HotpotQA one (rows with
    question, answer and context [[title, sentences]]; a JSON list or JSON lines). UserError for anything else."""
    value: Any = [row for _, row in read_rows(path)] if path.suffix == ".jsonl" else read_json(path)
    questions: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = []
    documents: dict[str, str] = {}
    try:
        if isinstance(value, dict):
            for article in value["data"]:
                for number, paragraph in enumerate(article["paragraphs"]):
                    title = f"{article.get('title', 'untitled')} {number}"
                    documents[title] = paragraph["context"]
                    for qa in paragraph["qas"]:
                        answers = tuple(dict.fromkeys(a["text"] for a in qa["answers"]))
                        if answers:
                            questions.append((qa["question"], answers, (title,)))
        else:
            for row in value:
                titles = []
                for title, sentences in row["context"]:
                    documents[title] = "".join(sentences) if isinstance(sentences, list) else sentences
                    titles.append(title)
                support = [title for title, _ in row.get("supporting_facts", [])]
                questions.append((row["question"], (row["answer"],), tuple(dict.fromkeys(support)) or tuple(titles)))
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} is neither a SQuAD nor a HotpotQA file: give one of those with --qa.") from None
    if len(questions) < 1 or len(documents) < 2:
        raise UserError(f"{path} has too few questions or documents: give a whole SQuAD or HotpotQA file with --qa.")
    return QuestionFile(tuple(questions), documents)


def _documents_prompt(documents: Sequence[str], question: str) -> str:
    text = "\n\n".join(f"Document {i}:\n{doc.strip()}" for i, doc in enumerate(documents, 1))
    return (
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
        f"\n\nThe following are given documents.\n\n{text}\n\nAnswer the question based on the given documents. Only "
        f"give me the answer and do not output any other words.\n\nQuestion: {question} Answer:"
    )


def _qa_draft(
    rng: random.Random, own: list[str], others: Callable[[], Iterator[str]], question: str, answers: tuple[str, ...]
) -> Draft:
    places = [rng.random() for _ in own]

    def build(pieces: Sequence[str]) -> str:
        listed = list(pieces)
        for document, place in zip(own, places, strict=True):
            listed.insert(round(place * len(listed)), document)
        return _documents_prompt(listed, question)

    return Draft(others, build, answers, any_of=True, new_tokens=32)


def _from_file(rng: random.Random, qa: QuestionFile) -> Draft:
    question, answers, titles = rng.choice(qa.questions)
    own = [f"{title}\n{qa.documents[title]}" for title in titles]
    rest = [title for title in qa.documents if title not in titles]
    rng.shuffle(rest)

    def others() -> Iterator[str]:
        # The authors repeat the distractors too when a text is to be longer than the collection.
        while rest:
            for title in rest:
                yield f"{title}\n{qa.documents[title]}"

    return _qa_draft(rng, own, others, question, answers)


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
