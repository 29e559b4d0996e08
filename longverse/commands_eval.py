"""`longverse eval …`: needle, longbench, ruler, loss, report. Options to settings, results to files and screen.

Everything heavy is imported inside the commands, so that `longverse --help` stays fast.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import console

if TYPE_CHECKING:
    from longverse.evaluation.backends import Backend

app = typer.Typer(
    invoke_without_command=True,
    help="Measure a model: facts in long texts, LongBench, RULER, loss by position. A stopped run goes on.",
)


@app.callback()
def start(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        console.line(context.get_help())


Model = Annotated[str, typer.Option("--model", "-m", help="Embedded name, folder, .gguf file or hub id.")]
Rope = Annotated[str | None, typer.Option("--rope", help="Change the RoPE plan, such as abf:500000 or dynamic:2.")]
Window = Annotated[int | None, typer.Option("--window", help="Take this many tokens, beyond the model's window too.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
BackendName = Annotated[str, typer.Option("--backend", help="engine (ours) or transformers.")]
Endpoint = Annotated[
    str | None, typer.Option("--endpoint", help="An OpenAI-compatible server instead, like http://127.0.0.1:8000/v1.")
]
TokenizerFolder = Annotated[
    str | None, typer.Option("--tokenizer", help="With --endpoint: the served model, for counting its tokens.")
]
KeyEnv = Annotated[str, typer.Option("--key-env", help="With --endpoint: the environment variable that holds the key.")]
Concurrency = Annotated[int, typer.Option("--concurrency", help="With --endpoint: requests at once.")]
Timeout = Annotated[float, typer.Option("--timeout", help="With --endpoint: seconds to wait for one answer.")]
Retries = Annotated[int, typer.Option("--retries", help="With --endpoint: tries after the first.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder for results and for going on after a stop.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Seed = Annotated[int, typer.Option("--seed", help="Makes other texts and facts.")]


def _backend(
    model: str, rope: str | None, window: int | None, dtype: str, device: str, backend: str, endpoint: str | None,
    tokenizer: str | None, key_env: str, concurrency: int, timeout: float, retries: int,
) -> Backend:  # fmt: skip
    from longverse.errors import UserError

    if backend not in ("engine", "transformers"):
        raise UserError(f"No back end is called {backend!r}: choose engine or transformers, or give --endpoint.")
    if endpoint is not None:
        from longverse.evaluation.endpoint import EndpointBackend

        if rope is not None or backend != "engine":
            raise UserError(
                "--rope and --backend change a model loaded here, not one behind --endpoint: leave them out."
            )
        parts: dict[str, Any] = {}
        if tokenizer is not None:
            from longverse.evaluation.backends import load_tokenizer

            parts["tokenizer"], parts["chat"] = load_tokenizer(tokenizer)
        served = EndpointBackend(
            endpoint, model, key=os.environ.get(key_env), window=window, concurrency=concurrency, timeout=timeout,
            retries=retries, **parts,
        )  # fmt: skip
        served.check()
        return served
    if tokenizer is not None:
        raise UserError("--tokenizer belongs to --endpoint: a model loaded here brings its own.")
    if backend == "transformers":
        from longverse.evaluation.backends import TransformersBackend

        if rope is not None or window is not None:
            raise UserError("--rope and --window belong to the engine: leave out --backend transformers.")
        return TransformersBackend(model, dtype=dtype, device="cpu" if device == "auto" else device)
    from longverse.evaluation.backends import EngineBackend
    from longverse.inference.engine import Engine

    with console.Task(f"Loading {model}", unit="bytes", at_once=True) as report:
        engine = Engine.load(model, dtype=dtype, device=device, rope=rope, window=window, on_progress=report)
    for note in engine.notes:
        console.note(note)
    return EngineBackend(engine)


def _numbers(text: str, option: str) -> tuple[int, ...]:
    """ "1000,2K,4k" to numbers; K is a thousand."""
    from longverse.errors import UserError

    values = []
    for part in text.split(","):
        part = part.strip().lower()
        digits = part.removesuffix("k")
        if not digits.isdigit():
            raise UserError(f"{option} {text!r} is no list of numbers: write it like 1000,2000,4K.")
        values.append(int(digits) * (1000 if part.endswith("k") else 1))
    return tuple(values)


def _saved(paths: list[Path]) -> None:
    for path in paths:
        console.note(f"written: {path}")


def _out(out: Path | None, kind: str, model: str) -> Path:
    return out if out is not None else Path("results") / f"{kind}-{Path(model).stem}"


@app.command()
def needle(
    model: Model = "smol",
    lengths: Annotated[
        str | None, typer.Option("--lengths", help="Prompt lengths in tokens; by default eight up to the window.")
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
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Longest answer, in tokens.")] = 24,
    seed: Seed = 0,
    attention: Annotated[
        str, typer.Option("--attention", help="exact, or pages: in linear time, past the window too.")
    ] = "exact",
    out: Out = None,
    as_json: AsJson = False,
    rope: Rope = None,
    window: Window = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    backend: BackendName = "engine",
    endpoint: Endpoint = None,
    tokenizer: TokenizerFolder = None,
    key_env: KeyEnv = "OPENAI_API_KEY",
    concurrency: Concurrency = 4,
    timeout: Timeout = 600.0,
    retries: Retries = 4,
) -> None:
    """Hide facts in long texts and ask for them: a heatmap of depth against length.

    Example: longverse eval needle --lengths 2K,8K --language en,zh
    """
    from longverse.errors import UserError, expand
    from longverse.evaluation.needle import NeedleSettings, default_lengths, run_needle
    from longverse.textfiles import read_text

    if depths < 1:
        raise UserError("--depths must be at least 1.")
    text = None if haystack is None else read_text(expand(haystack))
    chosen = None if lengths is None else _numbers(lengths, "--lengths")
    NeedleSettings(
        lengths=chosen or (1,), languages=tuple(language.split(",")), mode=mode, repeats=repeats,
        kinds=tuple(kinds.split(",")) if kinds else (), max_new_tokens=max_new_tokens,
    )  # fmt: skip
    asked = _backend(
        model, rope, window, dtype, device, backend, endpoint, tokenizer, key_env, concurrency, timeout, retries
    )
    if attention != "exact":
        from longverse.evaluation.backends import EngineBackend

        if not isinstance(asked, EngineBackend):
            raise UserError("--attention changes a model loaded here: leave out --endpoint and --backend.")
        asked.attention = attention
    settings = NeedleSettings(
        lengths=chosen or default_lengths(asked.window, max_new_tokens),
        depths=tuple(i / (depths - 1) for i in range(depths)) if depths > 1 else (0.5,),
        languages=tuple(language.split(",")),
        mode=mode,
        kinds=tuple(kinds.split(",")) if kinds else (),
        repeats=repeats,
        one_per_document=one_per_document,
        max_new_tokens=max_new_tokens,
        seed=seed,
        haystack=text,
        haystack_name="generated" if haystack is None else haystack.name,
    )
    folder = _out(out, "needle", asked.name)
    with console.Task("Asking", unit="questions") as report:
        result = run_needle(asked, settings, journal=folder / "needle.jsonl", on_progress=report)
    paths = result.save(folder)
    console.line(json.dumps(result.to_dict(), ensure_ascii=False) if as_json else result.markdown().rstrip())
    _saved(paths)


@app.command()
def longbench(
    data: Annotated[
        str | None, typer.Option("--data", "-d", help="The benchmark's folder, its data.zip, or a hub dataset.")
    ] = None,
    model: Model = "smol",
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
    rope: Rope = None,
    window: Window = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    backend: BackendName = "engine",
    endpoint: Endpoint = None,
    tokenizer: TokenizerFolder = None,
    key_env: KeyEnv = "OPENAI_API_KEY",
    concurrency: Concurrency = 4,
    timeout: Timeout = 600.0,
    retries: Retries = 4,
) -> None:
    """Run LongBench by its own protocol, or score its predictions. A stopped run goes on with the same command.

    Example: longverse eval longbench --data LongBench --max-length 7500 --tasks multi_news --limit 20
    """
    from longverse.errors import UserError
    from longverse.evaluation.longbench import tables
    from longverse.evaluation.longbench.runner import LongBenchRun
    from longverse.evaluation.longbench.score import check_against, read_predictions, score_folder
    from longverse.evaluation.longbench.tasks import choose_tasks, locate, read_config, read_task

    names = None if tasks is None else [t.strip() for t in tasks.split(",") if t.strip()]
    if sum((e, v2)) > 1:
        raise UserError("--e and --v2 are different benchmarks: choose one.")
    if v2:
        if score is not None or names:
            raise UserError("--score and --tasks belong to LongBench v1: leave them out with --v2.")
        asked = lambda: _backend(  # noqa: E731
            model, rope, window, dtype, device, backend, endpoint, tokenizer, key_env, concurrency, timeout, retries
        )
        _longbench_v2(data, config, limit, max_length, reasoning, out, as_json, asked)
        return
    chosen = choose_tasks(names, e=e) if names else None
    if score is not None:
        scores = score_folder(score, e=e, tasks=chosen)
        if data is not None:
            folder = locate(data, _cache())
            inner = score / ("pred_e" if e else "pred")
            for one in scores:
                path = (inner if inner.is_dir() else score) / f"{one.task}.jsonl"
                rows = read_task(folder, one.task, e=e)
                check_against(rows, read_predictions(path, one.task), path, partial=True)
        about = {"model": score.resolve().name}
        settings: dict[str, Any] = {"e": e, "scored": score.name}
        _show_longbench(tables, scores, about, settings, out, as_json)
        return
    if data is None:
        raise UserError("LongBench's rows and prompts are not part of longverse: give its folder with --data.")
    folder = locate(data, _cache())
    wanted = choose_tasks(names, e=e)
    read = read_config(config if config is not None else folder / "config", wanted)
    for task in wanted:
        read_task(folder, task, e=e)  # every row is checked before the model is loaded
    asked_backend = _backend(
        model, rope, window, dtype, device, backend, endpoint, tokenizer, key_env, concurrency, timeout, retries
    )
    place = _out(out, "longbench", asked_backend.name)
    with console.Task("LongBench", unit="rows") as report:
        run = LongBenchRun(
            backend=asked_backend, data=folder, config=read, out=place, tasks=wanted, max_length=max_length,
            truncation=truncation, limit=limit, e=e, on_progress=report,
        )  # fmt: skip
        try:
            scores = run.run()
        except KeyboardInterrupt:
            console.note(f"Stopped; every finished row is kept in {place}: the same command goes on.")
            raise
    settings = {
        "e": e, "max_length": max_length, "truncation": truncation, "limit": limit, "tasks": list(wanted),
        "cut_rows": sum(s.cut or 0 for s in scores),
    }  # fmt: skip
    _show_longbench(tables, scores, asked_backend.describe(), settings, place, as_json)


def _cache() -> Path:
    from longverse.models.checkpoint import cache_folder

    return cache_folder()


def _show_longbench(
    tables: Any, scores: Any, model: dict[str, Any], settings: dict[str, Any], out: Path | None, as_json: bool
) -> None:
    if as_json:
        console.line(json.dumps(tables.to_dict(scores, model=model, settings=settings), ensure_ascii=False))
    else:
        console.line(tables.markdown(scores, model=str(model["model"]), settings=settings).rstrip())
    if out is not None:
        _saved(tables.save(out, scores, model=model, settings=settings))


def _longbench_v2(
    data: str | None, config: Path | None, limit: int | None, max_length: int, reasoning: bool, out: Path | None,
    as_json: bool, asked: Callable[[], Backend],
) -> None:  # fmt: skip
    from longverse.errors import UserError
    from longverse.evaluation.longbench.v2 import read_items, read_prompts, run_v2

    if data is None:
        raise UserError("LongBench v2's items are not part of longverse: give its data.json with --data.")
    path = Path(data).expanduser()
    if not path.exists():
        raise UserError(f"{data} does not exist: give LongBench v2's data.json or its folder with --data.")
    items = read_items(path, limit)
    folder = config if config is not None else (path if path.is_dir() else path.parent) / "prompts"
    prompts = read_prompts(folder, reasoning=reasoning)
    backend = asked()
    place = _out(out, "longbench-v2", backend.name)
    with console.Task("LongBench v2", unit="items") as report:
        result = run_v2(backend, items, prompts, place, max_length=max_length, reasoning=reasoning, on_progress=report)
    console.line(json.dumps(result.to_dict(), ensure_ascii=False) if as_json else result.markdown().rstrip())
    _saved(result.save(place))


@app.command()
def ruler(
    model: Model = "smol",
    lengths: Annotated[str, typer.Option("--lengths", help="Tokens of prompt and answer, like 4K,8K,16K.")] = "4K,8K",
    tasks: Annotated[str | None, typer.Option("--tasks", "-t", help="Only these tasks, like vt,cwe.")] = None,
    samples: Annotated[int, typer.Option("--samples", help="Rows a task and length.")] = 5,
    qa: Annotated[
        Path | None, typer.Option("--qa", help="Your SQuAD or HotpotQA file for the qa tasks; else generated.")
    ] = None,
    seed: Seed = 0,
    out: Out = None,
    as_json: AsJson = False,
    rope: Rope = None,
    window: Window = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    backend: BackendName = "engine",
    endpoint: Endpoint = None,
    tokenizer: TokenizerFolder = None,
    key_env: KeyEnv = "OPENAI_API_KEY",
    concurrency: Concurrency = 4,
    timeout: Timeout = 600.0,
    retries: Retries = 4,
) -> None:
    """RULER's thirteen tasks at rising lengths, and the length up to which the model really reads.

    Example: longverse eval ruler --lengths 4K,8K --tasks niah_single_1,vt --samples 5
    """
    from longverse.evaluation.ruler import RulerSettings, run_ruler
    from longverse.evaluation.ruler_tasks import TASKS, read_questions

    settings = RulerSettings(
        lengths=_numbers(lengths, "--lengths"),
        tasks=tuple(tasks.split(",")) if tasks else TASKS,
        samples=samples,
        seed=seed,
        qa_file=None if qa is None else qa.name,
    )
    questions = None if qa is None else read_questions(qa)
    asked = _backend(
        model, rope, window, dtype, device, backend, endpoint, tokenizer, key_env, concurrency, timeout, retries
    )
    folder = _out(out, "ruler", asked.name)
    with console.Task("RULER", unit="rows") as report:
        result = run_ruler(asked, settings, qa=questions, journal=folder / "ruler.jsonl", on_progress=report)
    paths = result.save(folder)
    console.line(json.dumps(result.to_dict(), ensure_ascii=False) if as_json else result.markdown().rstrip())
    _saved(paths)


@app.command()
def loss(
    text: Annotated[Path | None, typer.Argument(help="A text file; without one, generated prose is read.")] = None,
    model: Model = "smol",
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
    rope: Rope = None,
    window: Window = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Loss by position or by length: up to where does more context still help?

    Example: longverse eval loss book.txt --length 8192 --by-length
    """
    from longverse.errors import UserError, expand
    from longverse.evaluation.backends import EngineBackend
    from longverse.evaluation.haystack import generated_text
    from longverse.evaluation.perplexity import loss_by_length, loss_by_position, sliding_loss
    from longverse.textfiles import read_text

    words = None if text is None else read_text(expand(text))
    asked = _backend(model, rope, window, dtype, device, "engine", None, None, "", 1, 1.0, 0)
    assert isinstance(asked, EngineBackend)
    engine = asked.engine
    reach = length if length is not None else engine.window
    if by_length and stride is not None:
        raise UserError("--by-length and --stride are different ways to read: choose one.")
    if reach < 2 or texts < 1:
        raise UserError("--length must be at least 2 tokens and --texts at least 1.")
    if words is None:
        words = generated_text("en", seed, reach * texts * 8)
    ids = engine.tokenizer.encode(words)
    if length is None and text is not None:
        reach = min(reach, len(ids))
    folder = _out(out, "loss", engine.name)
    with console.Task("Reading", unit="tokens") as report:
        if by_length:
            steps = [reach, *(512 * 2**i for i in range(20) if 512 * 2**i < reach)]
            result = loss_by_length(engine, ids, lengths=steps, texts=texts, on_progress=report)
        elif stride is None:
            result = loss_by_position(engine, ids, length=reach, texts=texts, blocks=blocks, on_progress=report)
        else:
            result = sliding_loss(engine, ids, context=reach, stride=stride, blocks=blocks, on_progress=report)
    result.settings["text"] = "generated" if text is None else text.name
    paths = result.save(folder)
    console.line(json.dumps(result.to_dict(), ensure_ascii=False) if as_json else result.markdown().rstrip())
    _saved(paths)


@app.command("report")
def report_command(
    folders: Annotated[list[Path], typer.Argument(help="Folders with results of `longverse eval`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page: .html, or .md.")] = Path("report.html"),
) -> None:
    """Compare runs on one page: tables, heatmaps, curves.

    Example: longverse eval report results/needle-smol results/longbench-smol -o report.html
    """
    from longverse.errors import UserError
    from longverse.evaluation.files import write_text
    from longverse.evaluation.report import markdown, page, read_runs

    if out.suffix.lower() not in (".html", ".md"):
        raise UserError(f"{out.name} is neither .html nor .md: choose one of the two for --out.")
    runs = read_runs(folders)
    write_text(out, page(runs) if out.suffix.lower() == ".html" else markdown(runs))
    console.line(f"{out}: {len(runs)} results compared")
