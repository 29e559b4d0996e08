"""`longverse demo`: an invented report, questions about it in one session, which answers were right, and where in the
report they stand; and a question that the report does not answer."""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from . import commands_cite, console
from .documents.reader import decode
from .documents.report import LANGUAGES, Report, generate_report, unanswerable
from .errors import UserError

if TYPE_CHECKING:
    from .documents.citations import Cited
    from .inference.engine import Engine, Stats

ANSWER_TOKENS = 64  # an answer is one sentence, in Chinese two tokens a character
USUAL_TOKENS = 16_000
WHOLE_WORDS = 250_000  # of the long document whose reading time is told


@dataclass
class Row:
    """One question and how it went."""

    question: str
    expected: str
    answer: str
    right: bool
    seconds: float
    stats: Stats
    cited: Cited
    cites_it: bool  # whether a citation is the sentence that states the fact


def usual_tokens(window: int) -> int:
    """How long a report is when nobody says: USUAL_TOKENS, or what a smaller window leaves beside a question."""
    return min(USUAL_TOKENS, max(1000, window * 3 // 4))


def check(folder: Path, language: str) -> None:
    """Refuse, before a model is loaded, what cannot work."""
    if language not in LANGUAGES:
        raise UserError(f"The language {language!r} is unknown: choose en or zh.")
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}: make it first or choose another with --folder.")


def run(
    engine: Engine, seed: int, tokens: int, questions: int, language: str, folder: Path, *, as_json: bool, quiet: bool
) -> None:
    """Write the report, ask, and show the table. A report past the model's window is read by pages."""
    from .commands_open import choose_cache
    from .documents.ask import prepare
    from .documents.second_look import checked
    from .inference.sampling import Sampling

    report = sized_report(engine, seed, tokens, questions, language)
    document = decode(report.text.encode(), f"longverse-report-{seed}.md")
    absent = unanswerable(report, 1, seed)
    asked = [fact.question for fact in report.facts]
    prompts = prepare(engine, document, [*asked, *absent], ANSWER_TOKENS, limited=False)
    attention = "exact" if prompts.planned_tokens <= engine.window else "pages"
    form = choose_cache(engine, prompts.planned_tokens, "auto", attention, quiet=quiet)
    session = engine.session(prompts.planned_tokens, attention=attention, cache=form)
    path = write(report, folder, document.name)
    length = len(engine.tokenizer.encode(report.text))
    screen = console.out()
    if not as_json:
        screen.print(Text(report.title, style="bold"))
        console.line(f"{document.words:,} words, {length:,} tokens, invented from seed {seed} and written to {path}")
    sampling = Sampling(max_new_tokens=ANSWER_TOKENS, stop=("\n", ". ", "。"))
    rows: list[Row] = []
    for number, (fact, ids) in enumerate(zip(report.facts, prompts.ids, strict=False), start=1):
        title = "Reading the report" if number == 1 else f"Question {number} of {len(report.facts)}"
        started = time.perf_counter()
        with console.Task(title, quiet=quiet) as task:
            done = session.complete(ids, sampling, on_progress=task)
        answer = done.text.strip()
        cited = checked(session, prompts, number - 1, answer, done.tokens, sampling)
        answer = cited.answer or answer
        seconds = time.perf_counter() - started
        cites_it = any(passage.start <= fact.position < passage.end for passage in cited.citations)
        right = fact.is_answered_by(answer)
        rows.append(Row(fact.question, fact.answer, answer, right, seconds, done.stats, cited, cites_it))
        if not as_json:
            show(number, rows[-1])
    refused = None
    if absent:
        done = session.complete(prompts.ids[-1], sampling)
        refused = checked(session, prompts, len(asked), done.text, done.tokens, sampling)
    if as_json:
        made = record(report, rows, path, length, engine.name)
        if refused is not None:
            made["not_in_the_report"] = {
                "question": absent[0], "answer": refused.answer, "found": refused.found
            }  # fmt: skip
        console.json_line(made)
        return
    if refused is not None:
        show_refused(absent[0], refused, language)
    totals(rows, length, path)
    if document.words < WHOLE_WORDS and (line := whole(engine, length / document.words)) is not None:
        console.line(line)
    console.line("\nIn the browser: longverse serve, and open http://127.0.0.1:8000/")
    console.line(f'Next: longverse ask {path} "{rows[-1].question}" --keep')


def show(number: int, row: Row) -> None:
    """One question: verdict and time, what was asked, answered and expected."""
    screen = console.out()
    verdict = ("right", "green") if row.right else ("wrong", "red")
    screen.print(Text.assemble(f"\n{number:2d}  ", (row.question, "bold")))
    screen.print(Text.assemble("    answer    ", row.answer or "(none)"))
    screen.print(Text.assemble("    expected  ", row.expected))
    screen.print(Text.assemble("    ", verdict, (f"     {console.duration(row.seconds)}", "dim")))
    if row.cited.found:
        commands_cite.show(row.cited, indent="    ")
    else:
        screen.print(Text("    not found in the report", style="yellow"))


def show_refused(question: str, cited: Cited, language: str) -> None:
    """The question without an answer in the report."""
    from .documents.citations import NOT_FOUND

    screen = console.out()
    screen.print(Text.assemble("\n --  ", (question, "bold"), (" (the report does not say)", "dim")))
    screen.print(Text.assemble("    answer    ", cited.answer if cited.found else NOT_FOUND[language]))


def sized_report(engine: Engine, seed: int, tokens: int, questions: int, language: str) -> Report:
    """The shortest report of at least `tokens` tokens that the templates give, found by widening the word count."""
    per_word = 1.5 if language == "en" else 1.6
    words = int(tokens / per_word)
    while True:
        report = generate_report(seed, target_words=words, questions=1, language=language)
        length = len(engine.tokenizer.encode(report.text))
        if length >= tokens:
            return generate_report(seed, target_words=words, questions=questions, language=language)
        words += max(20, int((tokens - length) / per_word))


def write(report: Report, folder: Path, name: str) -> Path:
    """Write the report into `folder`, or into the temporary folder where that one is not writable."""
    for place in (folder, Path(tempfile.gettempdir())):
        target, beside = place / name, place / f".{name}.part"
        try:
            beside.write_text(report.text, encoding="utf-8")
            os.replace(beside, target)
        except OSError:
            with suppress(OSError):
                beside.unlink()
            continue
        return target
    raise UserError(
        f"The report can be written neither to {folder} nor to the temporary folder: choose one with --folder."
    )


def totals(rows: list[Row], length: int, path: Path) -> None:
    """What it took, and what to try next."""
    first, rest = rows[0].stats, rows[1:]
    right = sum(row.right for row in rows)
    console.line()
    console.out().print(Text(f"{right} of {len(rows)} right", style="bold"))
    reading = f"read {first.prompt_tokens:,} tokens in {console.duration(first.prefill_seconds)}"
    console.line(f"{reading} ({first.prefill_rate:,.0f} tok/s); wrote {sum(row.stats.new_tokens for row in rows):,}")
    if rest:
        mean = sum(row.seconds for row in rest) / len(rest)
        console.line(f"every further question {console.duration(mean)} on average: the report is read once")
    memory = max(row.stats.peak_memory_bytes for row in rows) / 2**30
    console.line(f"memory {memory:.1f} GiB at most; attention {first.attention}")
    cites = sum(row.cited.found and row.cites_it for row in rows)
    console.line(f"{cites} of {len(rows)} citations are the sentence that states the answer")


def whole(engine: Engine, tokens_per_word: float) -> str | None:
    """A line on what WHOLE_WORDS words like these would take here; None where no rates are known."""
    from .commands_open import unread
    from .commands_plan import predict
    from .inference.memory import requirements
    from .plan import say_bytes

    tokens = int(WHOLE_WORDS * tokens_per_word)
    session = unread(engine, tokens, "pages")
    foreseen = predict(engine, session, tokens)
    if foreseen is None:
        return None
    needs, _ = requirements(engine, tokens)
    return (
        f"{WHOLE_WORDS:,} words like these, {tokens:,} tokens, would be read by pages in about"
        f" {console.duration(foreseen[0])} and take {say_bytes(needs[session.cache_format])}; longverse read keeps them"
    )


def record(report: Report, rows: list[Row], path: Path, length: int, model: str) -> dict[str, object]:
    """The same for `--json`."""
    return {
        "title": report.title, "file": str(path), "tokens": length, "model": model,
        "right": sum(row.right for row in rows), "questions": len(rows),
        "answers": [
            {"question": row.question, "answer": row.answer, "expected": row.expected, "right": row.right,
             "cites_it": row.cites_it, **commands_cite.record(row.cited),
             "seconds": round(row.seconds, 3), "stats": console.stats_record(row.stats)}
            for row in rows
        ],
    }  # fmt: skip
