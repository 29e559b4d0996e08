"""`longverse eval …`: needle, longbench, ruler, loss, report. Options to settings, results to files and screen.

Everything heavy is imported inside the commands, so that `longverse --help` stays fast.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from . import console
from .commands_backend import Who
from .commands_common import AsJson, with_options

app = typer.Typer(
    invoke_without_command=True,
    help="Measure a model: facts in long texts, LongBench, RULER, loss by position. A stopped run goes on.",
)


@app.callback()
def start(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        console.line(context.get_help())


Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder for results and for going on after a stop.")]
Seed = Annotated[int, typer.Option("--seed", help="Makes other texts and facts.")]


def _numbers(text: str, option: str) -> tuple[int, ...]:
    """ "1000,2K,4k" to numbers; K is a thousand."""
    from longverse.errors import UserError

    values = []
    for part in text.split(","):
        part = part.strip().lower()
        digits = part.removesuffix("k")
        if not (digits.isascii() and digits.isdigit()):
            raise UserError(f"{option} {text!r} is no list of numbers: write it like 1000,2000,4K.")
        values.append(int(digits) * (1000 if part.endswith("k") else 1))
    return tuple(values)


def _names(text: str | None) -> tuple[str, ...]:
    """ "vt, cwe" to its names."""
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def _saved(paths: list[Path]) -> None:
    for path in paths:
        console.note(f"written: {path}")


def _out(out: Path | None, kind: str, model: str) -> Path:
    from longverse.errors import expand

    return expand(out) if out is not None else Path("results") / f"{kind}-{Path(model).name.removesuffix('.gguf')}"


@contextmanager
def _progress(title: str, unit: str, folder: Path) -> Iterator[console.Task]:
    """A progress bar; a Ctrl-C says where the finished rows are."""
    with console.Task(title, unit=unit) as task:
        try:
            yield task
        except KeyboardInterrupt:
            task.close()
            console.note(f"Stopped; all that is finished is kept in {folder}: the same command goes on.")
            raise


def _show(result: Any, folder: Path, as_json: bool) -> None:
    """Prints a result (needle, v2, RULER, loss) and writes its files."""
    if as_json:
        console.json_line(result.to_dict())
    else:
        console.line(result.markdown().rstrip())
    _saved(result.save(folder))


@app.command()
@with_options()
def needle(
    lengths: Annotated[
        str | None,
        typer.Option("--lengths", help="Prompt lengths in tokens, like 4K,16K; by default eight to 8,000."),
    ] = None,
    depths: Annotated[int, typer.Option("--depths", help="How many depths, from first to last sentence.")] = 5,
    language: Annotated[str, typer.Option("--language", "-l", help="en, zh or en,zh.")] = "en",
    mode: Annotated[
        str, typer.Option("--mode", help="facts, several (one question for all), hop (two steps) or paraphrase.")
    ] = "facts",
    kinds: Annotated[str | None, typer.Option("--kinds", help="Only these kinds of fact, like code,date.")] = None,
    repeats: Annotated[int, typer.Option("--repeats", help="Facts a cell.")] = 2,
    one_per_document: Annotated[
        bool, typer.Option("--one-per-document", help="A document for every fact: stricter, and slower.")
    ] = False,
    haystack: Annotated[Path | None, typer.Option("--haystack", help="Your own text to hide the facts in.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Longest answer, in tokens.")] = 64,
    seed: Seed = 0,
    out: Out = None,
    as_json: AsJson = False,
    *,
    who: Who,
) -> None:
    """Hide facts in long texts and ask for them: a heatmap of depth against length.

    Example: longverse eval needle --lengths 2K,8K --language en,zh
    """
    from longverse.errors import UserError, expand
    from longverse.evaluation.needle import NeedleSettings, default_lengths, run_needle
    from longverse.textfiles import read_text

    if depths < 1:
        raise UserError("--depths must be at least 1.")
    settings = NeedleSettings(  # checked before the model is loaded
        lengths=(1,) if lengths is None else _numbers(lengths, "--lengths"),
        depths=tuple(i / (depths - 1) for i in range(depths)) if depths > 1 else (0.5,),
        languages=_names(language),
        mode=mode,
        kinds=_names(kinds),
        repeats=repeats,
        one_per_document=one_per_document,
        max_new_tokens=max_new_tokens,
        seed=seed,
        haystack=None if haystack is None else read_text(expand(haystack)),
        haystack_name="generated" if haystack is None else haystack.name,
    )
    with who.ask() as backend:
        if lengths is None:
            settings = replace(settings, lengths=default_lengths(backend.window, max_new_tokens))
            if backend.window is not None and backend.window > 2 * settings.lengths[-1]:
                console.note(f"up to {settings.lengths[-1]:,} of {backend.window:,} tokens: --lengths goes further")
        folder = _out(out, "needle", backend.name)
        with _progress("Asking", "questions", folder) as task:
            result = run_needle(backend, settings, journal=folder / "needle.jsonl", on_progress=task)
    _show(result, folder, as_json)


@app.command()
@with_options()
def longbench(
    data: Annotated[
        str | None, typer.Option("--data", "-d", help="The benchmark's folder, its data.zip, or a hub dataset.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="Prompts and lengths; by default DATA/config (v2: DATA/prompts).")
    ] = None,
    tasks: Annotated[str | None, typer.Option("--tasks", "-t", help="Only these tasks, like hotpotqa,trec.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", "-n", help="Only the first rows of each task.")] = None,
    max_length: Annotated[
        int, typer.Option("--max-length", help="Longest prompt in tokens, before the template.")
    ] = 31500,
    truncation: Annotated[
        str, typer.Option("--truncation", help="middle (the protocol), context (corrected) or off.")
    ] = "middle",
    e: Annotated[bool, typer.Option("--e", help="LongBench-E: 13 tasks in three buckets of length.")] = False,
    v2: Annotated[bool, typer.Option("--v2", help="LongBench v2: multiple choice.")] = False,
    reasoning: Annotated[bool, typer.Option("--reasoning", help="With --v2: reason first, then choose.")] = False,
    score: Annotated[
        Path | None, typer.Option("--score", help="Only score a folder of predictions, ours or others'.")
    ] = None,
    out: Out = None,
    as_json: AsJson = False,
    *,
    who: Who,
) -> None:
    """Run LongBench by its own protocol, or score its predictions. A stopped run goes on with the same command.

    Example: longverse eval longbench --data LongBench --max-length 7500 --tasks multi_news --limit 20
    """
    from longverse.errors import UserError, expand
    from longverse.evaluation.longbench.runner import LongBenchRun
    from longverse.evaluation.longbench.score import check_metrics
    from longverse.evaluation.longbench.tasks import choose_tasks, config_folder, locate, read_config, read_task
    from longverse.models.checkpoint import cache_folder

    if e and v2:
        raise UserError("--e and --v2 are different benchmarks: choose one.")
    config = None if config is None else expand(config)
    if v2:
        if score is not None or tasks:
            raise UserError("--score and --tasks belong to LongBench v1: leave them out with --v2.")
        if truncation != "middle":
            raise UserError("LongBench v2 cuts long texts in the middle, by its protocol: leave --truncation out.")
        _longbench_v2(data, config, limit, max_length, reasoning, out, as_json, who)
        return
    if reasoning:
        raise UserError("--reasoning belongs to LongBench v2: add --v2, or leave it out.")
    wanted = choose_tasks(list(_names(tasks)), e=e)
    if score is not None:
        _score_longbench(expand(score), data, wanted if tasks else None, e, out, as_json)
        return
    if data is None:
        raise UserError("LongBench's rows and prompts are not part of longverse: give its folder with --data.")
    check_metrics(wanted)
    folder = locate(data, cache_folder())
    read = read_config(config if config is not None else config_folder(data, folder), wanted)
    for task in wanted:
        read_task(folder, task, e=e)  # every row is checked before the model is loaded
    with who.ask() as backend:
        place = _out(out, "longbench", backend.name)
        with _progress("LongBench", "rows", place) as report:
            scores = LongBenchRun(
                backend=backend, data=folder, config=read, out=place, tasks=wanted, max_length=max_length,
                truncation=truncation, limit=limit, e=e, on_progress=report,
            ).run()  # fmt: skip
        settings = {
            "e": e, "max_length": max_length, "truncation": truncation, "limit": limit, "tasks": list(wanted),
            "cut_rows": sum(s.cut or 0 for s in scores),
        }  # fmt: skip
        _show_longbench(scores, backend.describe(), settings, place, as_json)


def _score_longbench(
    folder: Path, data: str | None, tasks: tuple[str, ...] | None, e: bool, out: Path | None, as_json: bool
) -> None:
    from longverse.evaluation.longbench.score import check_against, prediction_file, read_predictions, score_folder
    from longverse.evaluation.longbench.tasks import locate, read_task
    from longverse.models.checkpoint import cache_folder

    scores = score_folder(folder, e=e, tasks=tasks)
    if data is not None:
        rows = locate(data, cache_folder())
        for one in scores:
            path = prediction_file(folder, one.task, e=e)
            check_against(read_task(rows, one.task, e=e), read_predictions(path, one.task), path, partial=True)
    _show_longbench(scores, {"model": folder.resolve().name}, {"e": e, "scored": folder.name}, out, as_json)


def _show_longbench(
    scores: Any, model: dict[str, Any], settings: dict[str, Any], out: Path | None, as_json: bool
) -> None:
    from longverse.evaluation.longbench import tables

    if as_json:
        console.json_line(tables.to_dict(scores, model=model, settings=settings))
    else:
        console.line(tables.markdown(scores, model=str(model["model"]), settings=settings).rstrip())
    if out is not None:
        _saved(tables.save(out, scores, model=model, settings=settings))


def _longbench_v2(
    data: str | None, config: Path | None, limit: int | None, max_length: int, reasoning: bool, out: Path | None,
    as_json: bool, who: Who,
) -> None:  # fmt: skip
    from longverse.errors import UserError, expand
    from longverse.evaluation.longbench.v2 import items_file, read_items, read_prompts, run_v2

    if data is None:
        raise UserError("LongBench v2's items are not part of longverse: give its data.json with --data.")
    path = expand(data)
    if not path.exists():
        raise UserError(f"{data} does not exist: give LongBench v2's data.json or its folder with --data.")
    items = read_items(path, limit)
    digest = hashlib.sha256(items_file(path).read_bytes()).hexdigest()[:16]
    folder = config if config is not None else (path if path.is_dir() else path.parent) / "prompts"
    prompts = read_prompts(folder, reasoning=reasoning)
    with who.ask() as backend:
        place = _out(out, "longbench-v2", backend.name)
        with _progress("LongBench v2", "answers", place) as task:
            result = run_v2(
                backend, items, prompts, place, max_length=max_length, reasoning=reasoning, data=digest,
                on_progress=task,
            )  # fmt: skip
    _show(result, place, as_json)


@app.command()
@with_options()
def ruler(
    lengths: Annotated[
        str, typer.Option("--lengths", help="Tokens of prompt and answer, like 4096,8192,16384.")
    ] = "4096,8192",
    tasks: Annotated[str | None, typer.Option("--tasks", "-t", help="Only these tasks, like vt,cwe.")] = None,
    samples: Annotated[int, typer.Option("--samples", help="Rows a task and length.")] = 5,
    qa: Annotated[
        Path | None, typer.Option("--qa", help="Your SQuAD or HotpotQA file for the qa tasks; else generated.")
    ] = None,
    seed: Seed = 0,
    out: Out = None,
    as_json: AsJson = False,
    *,
    who: Who,
) -> None:
    """RULER's thirteen tasks at rising lengths, and the length up to which the model really reads.

    Example: longverse eval ruler --lengths 4096,8192 --tasks niah_single_1,vt --samples 5
    """
    from longverse.errors import expand
    from longverse.evaluation.ruler import RulerSettings, run_ruler
    from longverse.evaluation.ruler_tasks import TASKS, read_questions

    questions = None if qa is None else read_questions(expand(qa))
    settings = RulerSettings(
        lengths=_numbers(lengths, "--lengths"),
        tasks=_names(tasks) or TASKS,
        samples=samples,
        seed=seed,
        qa_file=None if questions is None else questions.name,
    )
    with who.ask() as backend:
        folder = _out(out, "ruler", backend.name)
        with _progress("RULER", "rows", folder) as task:
            result = run_ruler(backend, settings, qa=questions, journal=folder / "ruler.jsonl", on_progress=task)
    _show(result, folder, as_json)


@app.command()
@with_options(
    "attention", "processes", "backend", "endpoint", "tokenizer", "key_env", "concurrency", "timeout", "retries"
)
def loss(
    text: Annotated[Path | None, typer.Argument(help="A text file; without one, generated prose is read.")] = None,
    length: Annotated[int | None, typer.Option("--length", help="Tokens read at once; by default the window.")] = None,
    texts: Annotated[int, typer.Option("--texts", help="Stretches of that length, spread over the text.")] = 1,
    stride: Annotated[
        int | None, typer.Option("--stride", help="Slide over the whole text by this many tokens instead.")
    ] = None,
    by_length: Annotated[
        bool, typer.Option("--by-length", help="The same tokens with contexts of 512, 1,024 … up to --length instead.")
    ] = False,
    blocks: Annotated[int, typer.Option("--blocks", help="Blocks of positions in the table.")] = 16,
    seed: Seed = 0,
    out: Out = None,
    as_json: AsJson = False,
    *,
    who: Who,
) -> None:
    """Loss by position or by length: up to where does more context still help?

    Example: longverse eval loss book.txt --length 8192 --by-length
    """
    from longverse.errors import UserError, expand
    from longverse.evaluation.engine_backend import EngineBackend
    from longverse.evaluation.haystack import generated_text
    from longverse.evaluation.perplexity import loss_by_length, loss_by_position, sliding_loss
    from longverse.textfiles import read_text

    if by_length and stride is not None:
        raise UserError("--by-length and --stride are different ways to read: choose one.")
    if (length is not None and length < 2) or texts < 1:
        raise UserError("--length must be at least 2 tokens and --texts at least 1.")
    words = None if text is None else read_text(expand(text))
    with who.ask() as backend:
        assert isinstance(backend, EngineBackend)
        engine = backend.engine
        reach = length if length is not None else engine.window
        ids = engine.tokenizer.encode(words if words is not None else generated_text("en", seed, reach * texts * 8))
        if length is None and words is not None:
            reach = min(reach, len(ids))
        folder = _out(out, "loss", engine.name)
        with console.Task("Reading", unit="tokens") as task:
            if by_length:
                steps = [reach, *(512 * 2**i for i in range(20) if 512 * 2**i < reach)]
                result = loss_by_length(backend, ids, lengths=steps, texts=texts, on_progress=task)
            elif stride is None:
                result = loss_by_position(backend, ids, length=reach, texts=texts, blocks=blocks, on_progress=task)
            else:
                result = sliding_loss(backend, ids, context=reach, stride=stride, blocks=blocks, on_progress=task)
    result.settings["text"] = "generated" if text is None else text.name
    _show(result, folder, as_json)


@app.command("report")
def report_command(
    folders: Annotated[list[Path], typer.Argument(help="Folders with results of `longverse eval`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page: .html, or .md.")] = Path("report.html"),
) -> None:
    """Compare runs on one page: tables, heatmaps, curves.

    Example: longverse eval report results/needle-smol results/longbench-smol -o report.html
    """
    from longverse.errors import UserError, expand
    from longverse.evaluation.files import write_text
    from longverse.evaluation.report import markdown, page, read_runs

    target = expand(out)
    if target.suffix.lower() not in (".html", ".md"):
        raise UserError(f"{out.name} is neither .html nor .md: choose one of the two for --out.")
    runs = read_runs([expand(folder) for folder in folders])
    write_text(target, page(runs) if target.suffix.lower() == ".html" else markdown(runs))
    console.line(f"{out}: {len(runs)} results compared")
