"""What the tasks ask of the teacher: the generator sees chunks, the student sees everything."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass

from longverse.data.long_sft.context import Spec
from longverse.data.long_sft.draft import Reject
from longverse.data.long_sft.found import Found
from longverse.data.long_sft.gates import supported
from longverse.data.long_sft.pool import Opened
from longverse.data.long_sft.prompts import fill, variants
from longverse.data.teacher import Teacher, Unusable
from longverse.data.text import fold, language_of_short


@dataclass(frozen=True)
class Asked:
    """A question across documents: evidence spans in the source documents, in the order they were given."""

    question: str
    answer: str
    evidence: list[tuple[int, int]]


@dataclass
class Asker:
    """Turns the teacher's replies into finds, and checks them. lock: held by whoever builds; given up while waiting for
    the endpoint, so that other items go on."""

    teacher: Teacher
    lock: threading.Lock

    @property
    def name(self) -> str:
        return self.teacher.config.model

    def ask_about(
        self, spec: Spec, rng: random.Random, opened: Opened, start: int, end: int, depths: list[float]
    ) -> list[Found]:
        """A question for each depth, from the chunk that lies there: no chunk and no question twice, and no evidence
        within another's. In a short stretch chunks are smaller, so that each depth has one of its own."""
        size = min(self.teacher.config.chunk_tokens, opened.tokens_between(start, end) // len(depths))
        chunks = dict.fromkeys(self._chunk(opened, start, end, depth, size) for depth in depths)
        found: list[Found] = []
        for a, b in chunks:
            one = self._question(spec, opened, a, b)
            apart = all(one.end <= other.start or one.start >= other.end for other in found)
            if apart and all(one.question != other.question for other in found):
                found.append(one)
        return found

    def ask_across(self, spec: Spec, rng: random.Random, spans: list[tuple[Opened, int, int]]) -> Asked:
        """One question on two documents."""
        size = self.teacher.config.chunk_tokens
        chunks = [self._chunk(opened, start, end, rng.random(), size) for opened, start, end in spans]
        passages = [opened.text[a:b] for (opened, _, _), (a, b) in zip(spans, chunks, strict=True)]
        reply = self._ask(
            "teacher_two", spec, title=spans[0][0].about.title,
            other_title=spans[1][0].about.title, passage=passages[0],
            other_passage=passages[1],
        )  # fmt: skip
        question, answer = _text(reply, "question"), _text(reply, "answer")
        evidence = []
        for field, (a, _), passage in zip(("evidence", "other_evidence"), chunks, passages, strict=True):
            place, stop = locate(passage, _text(reply, field))
            evidence.append((a + place, a + stop))
        quoted = [opened.text[a:b] for (opened, _, _), (a, b) in zip(spans, evidence, strict=True)]
        if not supported(answer, quoted, spec.language):
            raise Reject("answer not in evidence")
        if not any(fold(answer) in fold(text) for text in quoted):
            _in_language(spec, answer)
        self._check(spec, spans[0][0].about.title, question, answer)
        return Asked(question, answer, evidence)

    def summarise(self, spec: Spec, opened: Opened, start: int, end: int) -> str:
        """A summary of summaries. Long texts take several levels: as many as it needs until one request holds all."""
        size = self.teacher.config.chunk_tokens
        texts, place = [], start
        while place < end:
            stop = min(opened.end_for(place, size), end)
            stop = stop if stop > place else min(place + 4 * size, end)
            texts.append(opened.text[place:stop])
            place = stop
        name, title = "teacher_summary_part", opened.about.title
        while True:
            sums = [_text(self._ask(name, spec, title=title, passage=text), "summary") for text in texts]
            for text in sums:
                _in_language(spec, text)
            if len(sums) == 1:
                return sums[0]
            name = "teacher_summary_merge"
            texts = ["\n\n".join(sums[i : i + 12]) for i in range(0, len(sums), 12)]

    def _question(self, spec: Spec, opened: Opened, start: int, end: int) -> Found:
        passage = opened.text[start:end]
        reply = self._ask("teacher_question", spec, title=opened.about.title, passage=passage)
        question, answer = _text(reply, "question"), _text(reply, "answer")
        place, stop = locate(passage, _text(reply, "evidence"))
        if fold(answer) not in fold(passage[place:stop]):
            raise Reject("answer not in evidence")
        self._check(spec, opened.about.title, question, answer)
        return Found("asked", start + place, start + stop, question, (answer,), answer, once=passage[place:stop])

    def _check(self, spec: Spec, title: str, question: str, answer: str) -> None:
        _in_language(spec, question)
        if not self.teacher.config.closed_book:
            return
        known = _text(self._ask("teacher_closed_book", spec, title=title, question=question), "answer")
        if fold(answer) in fold(known):
            raise Reject("answerable without the document")

    def _chunk(self, opened: Opened, start: int, end: int, depth: float, size: int) -> tuple[int, int]:
        middle = start + round(depth * (end - start))
        a = max(start, opened.start_for(middle, size // 2))
        return a, min(end, opened.end_for(a, size))

    def _ask(self, name: str, spec: Spec, **values: str) -> dict[str, object]:
        messages = [
            {"role": "system", "content": variants("teacher_system", spec.language)[0]},
            {"role": "user", "content": fill(variants(name, spec.language)[0], **values)},
        ]
        self.lock.release()
        try:
            return self.teacher.ask(messages, attempt=spec.attempt)
        except Unusable as error:
            raise Reject(error.gate) from None
        finally:
            self.lock.acquire()


def _in_language(spec: Spec, text: str) -> None:
    """Reject a text in another language than the item's; numbers and marks alone are of every language."""
    if any(map(str.isalpha, text)) and language_of_short(text) != spec.language:
        raise Reject("language does not match")


def _text(reply: dict[str, object], field: str) -> str:
    value = reply.get(field)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise Reject("endpoint reply lacks a field")
    return value.strip()


def locate(passage: str, quote: str) -> tuple[int, int]:
    """Where a quotation stands in a passage, white space aside. Reject when it does not."""
    wanted = "".join(quote.split())
    places = [i for i, char in enumerate(passage) if not char.isspace()]
    at = "".join(passage[i] for i in places).find(wanted) if wanted else -1
    if at < 0:
        raise Reject("evidence is not in the passage")
    return places[at], places[at + len(wanted) - 1] + 1


def estimate_requests(
    tasks: dict[str, int], mean_tokens: float, config_chunk: int, questions: float, closed_book: bool
) -> int:
    """Requests that a build will make, for the cost shown before it starts. tasks: items of each family."""
    each = 2 if closed_book else 1
    parts = max(1.0, mean_tokens / config_chunk)
    return round(
        tasks.get("single_doc_qa", 0) * each
        + tasks.get("multi_doc_qa", 0) * each
        + tasks.get("multi_turn", 0) * each * questions
        + tasks.get("summary", 0) * (parts * 13 / 12 + 1)
    )
