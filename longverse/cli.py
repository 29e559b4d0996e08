"""The `longverse` command: options to settings, results to the screen.

Nothing heavy is imported at the top: `longverse --help` must answer at once, and a wrong file name is said before torch
loads.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import (
    __version__,
    commands_data,
    commands_eval,
    commands_models,
    commands_open,
    commands_plan,
    commands_serve,
    commands_store,
    commands_train,
    console,
)
from .commands_ask import ask, summarize
from .commands_common import AsJson, Drawing, Loading, Quiet, with_options
from .errors import UserError

# typer carries click inside itself and names few of its exceptions; this is the base of all wrong options.
UsageError = typer.BadParameter.__base__

# What writing to a full or broken disk raises; opening a file names the file too.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)

GREETING = """longverse reads long documents with a language model on this machine.

  longverse demo                                     a long report, ten questions, checked answers
  longverse ask report.txt "Who leads the project?"  ask about a text of your own
  longverse chat report.txt                          talk about it, turn by turn

`longverse --help` lists everything."""


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    """Language models that read long documents, on one machine."""
    if version:
        print(f"longverse {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(GREETING)


app.command()(ask)
app.command()(summarize)


@app.command()
@with_options()
def chat(
    files: Annotated[list[str] | None, typer.Argument(help="Documents, or folders of them, to talk about.")] = None,
    loading: Loading = Loading(),
    drawing: Drawing = Drawing(max_new_tokens=512),
    system: Annotated[
        str | None, typer.Option("--system", help="Instructions that stand before the conversation.")
    ] = None,
    attention: commands_open.Attention = "auto",
    keep: commands_open.Keep = False,
    quiet: Quiet = False,
) -> None:
    """Talk with a model, turn by turn; /help lists the commands inside.

    Documents are read as `longverse ask` reads them, and answers from them are checked and cited like its own.

    [bold]Examples[/bold]

    longverse chat

    longverse chat report.pdf notes.docx --temperature 0.7

    printf 'Hello!\\\\nTell me a joke.\\\\n' | longverse chat
    """
    from .commands_ask import read_documents
    from .commands_chat import Chat

    if "-" in (files or ()):
        raise UserError("The chat reads your turns from standard input, so the document must be a file.")
    commands_open.check_attention(attention)
    documents = read_documents(files, quiet=quiet) if files else []
    settings = drawing.sampling()
    engine = loading.engine(quiet)
    Chat(engine, settings, system=system, attention=attention, keep=keep, quiet=quiet).run(documents)


@app.command()
@with_options()
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue, or - for standard input.")],
    as_chat: Annotated[bool, typer.Option("--chat", help="Send it as a message in the model's chat format.")] = False,
    loading: Loading = Loading(),
    drawing: Drawing = Drawing(max_new_tokens=128),
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Continue a text.

    [bold]Examples[/bold]

    longverse generate "The three largest oceans are"

    longverse generate --chat "Write a haiku about rain" --temperature 0.8 --seed 1
    """
    if prompt == "-":
        from .documents.reader import read

        prompt = read("-").text
    if not prompt:
        raise UserError("The prompt is empty: give a text to continue.")
    from .commands_open import choose_cache

    settings = drawing.sampling()
    engine = loading.engine(quiet)
    ids = engine.chat.encode([{"role": "user", "content": prompt}]) if as_chat else engine.tokenizer.encode(prompt)
    planned = len(ids) + drawing.max_new_tokens
    if planned > engine.window:
        raise UserError(
            f"The prompt has {len(ids):,} tokens, with {drawing.max_new_tokens:,} for the answer {planned:,}, and"
            f" {engine.name} reads {engine.window:,}: shorten it, lower --max-new-tokens or choose a model with a"
            " larger window."
        )
    session = engine.session(planned, cache=choose_cache(engine, planned, "auto", quiet=quiet))
    text = ""
    with console.Task("Reading the prompt", quiet=quiet) as task:
        for piece in session.stream(ids, settings, on_progress=task):
            task.close()
            text += piece
            if not as_json:
                console.write(piece)
    if as_json:
        record = {"prompt": prompt, "text": text, "model": engine.name, "stats": console.stats_record(session.stats)}
        console.json_line(record)
        return
    console.write("" if text.endswith("\n") else "\n")
    console.note(console.figures(session.stats), quiet=quiet)


@app.command()
def models(as_json: AsJson = False) -> None:
    """List the models that longverse knows by name.

    Any Llama-shaped .gguf file, folder with config.json and safetensors, or hub id works with --model too.
    """
    from .models.checkpoint import cache_folder, known_models

    entries = known_models()
    if as_json:
        rows = [
            {"name": e.name, "summary": e.summary, "licence": e.licence, "window": e.window}
            | {"where": str(e.where) if e.where else None, "hint": e.hint}
            for e in entries
        ]
        console.json_line({"models": rows, "cache": str(cache_folder())})
        return
    cells = [
        [e.name, f"{e.window:,}", e.licence, e.summary, "here" if e.where else f"absent: {e.hint}"] for e in entries
    ]
    console.out().print(console.table(("name", "window", "licence", "what it is", "where"), cells, right=(1,)))
    print(f"\nConverted models are kept in {cache_folder()}.")
    print("A .gguf file, a folder or a hub id works too: longverse ask --model PATH …")


@app.command()
def rope(
    model: Annotated[str, typer.Argument(help="An embedded name, a folder, a config.json or a .gguf file.")] = "smol",
    change: Annotated[
        str | None, typer.Option("--rope", help="Show the plan after this change, such as dynamic:2.")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the wavelengths to this .png or .svg file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show how a model encodes positions: kind, base, effective base by length. Reads no weights.

    [bold]Examples[/bold]

    longverse rope smol

    longverse rope smol --rope abf:500000,dynamic:2 --plot waves.png
    """
    from .commands_rope import config_of, draw, record, show

    name, config = config_of(model)
    if change is not None:
        config = config.with_rope(change)
    if as_json:
        console.json_line(record(name, config))
    else:
        show(name, config)
    if plot is not None:
        draw(name, config, plot)
        console.note(f"Wavelengths drawn to {plot}.", quiet=as_json)


@app.command()
@with_options()
def demo(
    loading: Loading = Loading(),
    seed: Annotated[int, typer.Option("--seed", min=0, help="Another seed writes another report.")] = 1,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens",
            min=1000,
            help="How long the report is at least, in tokens; by default 16,000, or what fits. Past the window it is"
            " read by pages.",
        ),
    ] = None,
    questions: Annotated[int, typer.Option("--questions", min=1, max=100, help="How many questions to ask.")] = 10,
    language: Annotated[str, typer.Option("--language", help="en or zh.")] = "en",
    folder: Annotated[Path, typer.Option("--folder", help="Where the report is written.")] = Path("."),
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a long annual report, ask about it, and check the answers.

    The report is invented from the seed: its company, people and numbers exist nowhere else, so the model has to find
    them in the text.

    [bold]Examples[/bold]

    longverse demo

    longverse demo --seed 7 --tokens 6000 --questions 20

    longverse demo --tokens 400000                 # 250,000 words and more, in some minutes
    """
    from .commands_demo import check, run, usual_tokens

    check(folder, language)
    engine = loading.engine(quiet)
    run(engine, seed, tokens or usual_tokens(engine.window), questions, language, folder, as_json=as_json, quiet=quiet)


app.add_typer(commands_eval.app, name="eval")
app.add_typer(commands_data.app, name="data")
for command in (commands_models.convert, commands_models.quantize, commands_models.export, commands_models.doctor):
    app.command()(command)
app.command()(commands_train.extend)
app.command()(commands_train.finetune)
app.command()(commands_serve.serve)
app.command()(commands_store.read)
app.command()(commands_plan.plan)
app.add_typer(commands_store.library_app, name="library")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a user's mistake, 130 after Ctrl-C.

    A UserError, a wrong option, a full disk and too little memory are one line. Any other
    exception is a defect of ours and keeps its traceback.
    """
    console.prepare_output()
    try:
        result: Any = app(args=arguments, prog_name="longverse", standalone_mode=False)
        sys.stdout.flush()
        if result == 130:  # typer's way of passing on Ctrl-C
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except UserError as error:
        console.error(str(error))
        return 2
    except UsageError as error:  # type: ignore[misc]
        command = error.ctx.command_path if error.ctx is not None else "longverse"
        console.error(f"{error.format_message().rstrip('.')}. `{command} --help` shows what is possible.")
        return 2
    except (KeyboardInterrupt, typer.Abort):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # an impatient second Ctrl-C must not print a traceback
        print(file=sys.stderr)
        console.error("stopped.")
        return 130
    except BrokenPipeError:  # `longverse … | head`: the reader has seen enough
        _drop_output()
        return 141
    except OSError as error:
        if error.filename is not None or error.errno not in NO_ROOM:
            raise
        _drop_output()
        console.error(f"The output cannot be written ({error.strerror}): make room, or send it elsewhere.")
        return 2
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        console.error(
            "The memory does not suffice: take a smaller or quantised model, --dtype bfloat16, a shorter text or fewer"
            " new tokens, or another --device."
        )
        return 2


def _drop_output() -> None:
    """Write what standard output still takes; then let the interpreter's last flush succeed, which would print a
    traceback otherwise."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _out_of_memory(error: BaseException) -> bool:
    """Whether Python, the CPU or a card had too little memory, told without importing torch."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator: can't allocate memory" in str(error)
    )
