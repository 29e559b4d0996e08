"""Rules for English prose and Markdown. Each yields only what the text itself makes true."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from longverse.data.long_sft.found import Found
from longverse.data.text import paragraphs, sentences, squash

_TITLES = r"(?:(?:Mr|Mrs|Dr|Miss|Lord|Lady|Sir|Captain|Colonel|Major|Madame|Aunt|Uncle|Father|Sister|Brother)\.? )?"
_SAID = re.compile(
    rf"""(?:(?<=\s)|^)(?:"(?P<a>[A-Z][^"“”]{{28,220}}[,!?.])"|“(?P<b>[A-Z][^"“”]{{28,220}}[,!?.])”)\s+"""
    rf"(?:said|cried|replied|asked|answered|exclaimed|whispered|murmured|remarked|observed)\s+"
    rf"(?P<who>{_TITLES}[A-Z][a-z]+(?: [A-Z][a-z]+)?)(?=[.,;:])",
)
_NOT_NAMES_WORDS = "He She They It We You The His Her This That Then There Nobody One Somebody No Yes And But Not"
_NOT_NAMES = frozenset(_NOT_NAMES_WORDS.split())
_CHAPTER = re.compile(
    r"^[ \t]*(?P<word>CHAPTER|Chapter) (?P<number>[IVXLC]+|\d{1,3})(?:[.:]|\b)[ \t]*[-—]*[ \t]*"
    r"(?P<title>[A-Z_][^\n]{3,80}?)?[ \t]*$",
    re.MULTILINE,
)
_NAME = re.compile(r"(?<=[a-z,] )([A-Z][a-z]{2,}(?: [A-Z][a-z]{2,})?)\b")
_COMMON_WORDS = (
    "God Lord Heaven English French German Italian Christian Sunday Monday Christmas Sir Madam Mr Mrs "
    "Miss Lady Captain Doctor England France London Paris Papa Mamma Mother Father Uncle Aunt And But The"
)
_COMMON = frozenset(_COMMON_WORDS.split())


def find_english(text: str, title: str) -> list[Found]:
    """Everything the rules for English find, by place."""
    found = [*_said(text), *_chapters(text), *_sentences(text), *_tables(text), *_definitions(text)]
    return sorted(found, key=lambda f: (f.start, f.kind))


def names_in(text: str) -> Counter[str]:
    """How often each name of one word stands within a sentence of the text; "Mr." and the like are no names."""
    words = (word for name in _NAME.findall(text) for word in name.split())
    return Counter(word for word in words if word not in _COMMON and word not in _NOT_NAMES)


def speakers(text: str) -> set[str]:
    """Last names of those the text lets speak by name: surely persons."""
    return {squash(match["who"]).split()[-1] for match in _SAID.finditer(text)}


def _said(text: str) -> Iterator[Found]:
    known = names_in(text)
    for match in _SAID.finditer(text):
        who, quote = squash(match["who"]), match["a"] or match["b"]
        if who.split()[0] in _NOT_NAMES or "\n\n" in match[0] or who.split()[-1] in _NOT_NAMES:
            continue
        if known[who.split()[-1]] < 3:
            continue  # "answered Nature": no name that the text uses
        words = squash(quote).rstrip(",")
        yield Found(
            "who_said", match.start(), match.end(),
            f"Who says: “{words}”?", (who,), f"{who} says it.", once=quote,
        )  # fmt: skip


def _chapters(text: str) -> Iterator[Found]:
    matches = list(_CHAPTER.finditer(text))
    numbers = Counter(match["number"] for match in matches)
    for match in matches:
        number = match["number"]
        if numbers[number] != 1:
            continue  # numbered anew in every book, or listed in a table of contents
        name = f"Chapter {number}"
        if match["title"] and not match["title"].strip().endswith(","):
            heading = squash(match["title"]).strip("_ ").removesuffix(".")
            yield Found(
                "chapter_title", match.start(), match.end(), f"What is the title of {name}?", (heading,),
                f"{name} is titled “{heading}”.", once=match[0].strip(),
            )  # fmt: skip
        elif (after := re.match(r"\s*\n\s*\n\s*", text[match.end() :])) is not None:
            start = match.end() + after.end()
            stop = text.find("\n\n", start)
            spans = sentences(text[start : stop if stop > 0 else start + 2_000], "en")
            if not spans or not 30 <= spans[0][1] - spans[0][0] <= 300:
                continue
            first = text[start + spans[0][0] : start + spans[0][1]]
            shouted = sum(map(str.isupper, first)) > 0.3 * len(first)
            verse = "\n" in first and all(line[:1].isupper() for line in first.split("\n"))
            if verse or "\n " in first or shouted or not _plain(squash(first)) or stop - start < 200:
                continue  # a motto in verse, a date line, half a speech
            yield Found(
                "chapter_opening", match.start(), start + spans[0][1],
                f"Quote the first sentence of {name}.", (squash(first),), f"{name} begins: {squash(first)}",
                once=match[0].strip(),
            )  # fmt: skip


def _sentences(text: str) -> Iterator[Found]:
    """Cloze and next-sentence questions, at most one a paragraph, in turn."""
    names = Counter(name for name in _NAME.findall(text) if name.split()[0] not in _COMMON)
    turn = 0
    for start, end in paragraphs(text):
        if not 160 <= end - start <= 4_000 or text[start:end].count("\n") > 60:
            continue
        paragraph = text[start:end]
        spans = sentences(paragraph, "en")
        if len(spans) < 3:
            continue
        turn += 1
        i = turn % (len(spans) - 1)
        (a, b), (c, d) = spans[i], spans[i + 1]
        one, two = squash(paragraph[a:b]), squash(paragraph[c:d])
        if turn % 2:
            if 40 <= len(one) <= 240 and 30 <= len(two) <= 240 and _plain(one) and _plain(two):
                yield Found(
                    "next_sentence", start + a, start + d, f"Which sentence comes directly after this one: “{one}”?",
                    (two,), two, once=paragraph[a:b],
                )  # fmt: skip
            continue
        known = [
            m
            for m in _NAME.finditer(one)
            if names[m[1]] >= 3 and one.count(m[1]) == 1 and not re.search(r"\b(?i:the|an?)\s$", one[: m.start()])
        ]
        if known and 60 <= len(one) <= 300 and _plain(one):
            match = known[turn % len(known)]
            blank = one[: match.start(1)] + "____" + one[match.end(1) :]
            yield Found(
                "missing_name", start + a, start + b,
                f"Which name belongs in the gap of this sentence from the text? “{blank}”",
                (match[1],), f"The name is {match[1]}.", once=paragraph[a:b],
            )  # fmt: skip


def _plain(sentence: str) -> bool:
    """A whole sentence of running text: begins like one, ends like one, no half of a quotation."""
    return (
        sentence[:1].isupper()
        and sentence[-1] in ".!?"
        and not re.search(r'["“”*_\[\]|#<>]', sentence)
        and sentence.count("(") == sentence.count(")")
    )


_TABLE = re.compile(r"(?:^\|.*\|[ \t]*\n){3,}", re.MULTILINE)


def _tables(text: str) -> Iterator[Found]:
    """Cells of Markdown tables, asked by row and column."""
    for table in _TABLE.finditer(text):
        place, rows = table.start(), []
        for line in table[0].splitlines(keepends=True):
            rows.append((place, line.rstrip("\n"), [cell.strip() for cell in line.strip().strip("|").split("|")]))
            place += len(line)
        header = rows[0][2]
        if not all(re.fullmatch(r":?-+:?", cell) for cell in rows[1][2]) or len(set(header)) != len(header):
            continue
        keys = Counter(row[2][0] for row in rows[2:])
        for start, line, cells in rows[2:]:
            if len(cells) != len(header) or keys[cells[0]] != 1 or not cells[0] or not header[0]:
                continue
            for column in range(1, len(cells)):
                if cells[column] and header[column]:
                    yield Found(
                        "table_cell", start, start + len(line),
                        f"In the table with the columns {', '.join(filter(None, header))}: what is the "
                        f"{header[column]} where {header[0]} is {cells[0]}?",
                        (cells[column],), f"{cells[column]}", once=line,
                    )  # fmt: skip


_DEFINED = re.compile(
    r"(?:(?<=\n)|(?<=\. )|^)[“\"](?P<term>[A-Z][^“”\"\n]{2,50})[”\"] means (?P<what>[^.\n]{15,300})\."
)


def _definitions(text: str) -> Iterator[Found]:
    for match in _DEFINED.finditer(text):
        what = squash(match["what"])
        yield Found(
            "definition", match.start(), match.end(), f"What does “{match['term']}” mean according to the text?",
            (what,), f"“{match['term']}” means {what}.", once=match[0],
        )  # fmt: skip
