"""`longverse data …`: corpus, sft, inspect. Everything heavy is imported inside the commands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import console

if TYPE_CHECKING:
    from longverse.data.inspect import Inspection
    from longverse.data.teacher import Spent, TeacherConfig

app = typer.Typer(
    no_args_is_help=True,
    help="Make training data: a tokenised corpus, long instruction items. A stopped build goes on where it was.",
)

Config = Annotated[Path, typer.Argument(help="A YAML file; docs/data.md names every key.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


@app.command()
def corpus(config: Config, quiet: Quiet = False) -> None:
    """Choose, deduplicate and tokenise documents into a memory-mapped store with a mixture.

    Example: longverse data corpus recipes/data_corpus.yaml
    """
    from longverse.data.corpus import build_corpus, load_corpus_config

    settings = load_corpus_config(config)
    with console.Task("Tokenising", quiet=quiet, at_once=True) as task:
        store = build_corpus(settings, config.parent, on_progress=lambda tokens, _: task(tokens, None))
    console.line((store.folder / "report.md").read_text(encoding="utf-8"))
    console.note(f"The store is in {store.folder}.", quiet=quiet)


@app.command()
def sft(
    config: Config,
    quiet: Quiet = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before an endpoint is used for money.")] = False,
) -> None:
    """Build long instruction items: questions, summaries, code, few-shot, conversations, stated facts.

    Example: longverse data sft recipes/data_sft.yaml
    """
    from longverse.data.long_sft.builder import build_sft, estimate
    from longverse.data.long_sft.plan import load_sft_config

    settings = load_sft_config(config)
    if settings.teacher is not None:
        cost = estimate(settings)
        console.note(
            f"{settings.teacher.model}: about {cost['requests']:,.0f} requests, {cost['prompt_tokens']:,.0f} tokens in "
            f"and {cost['reply_tokens']:,.0f} out, {cost['money']:.2f} in money by the given prices, at least "
            f"{cost['seconds'] / 60:.0f} minutes (replies of an earlier run are not asked for again)."
        )
        if cost["money"] > 0 and not yes and not typer.confirm("Go on?"):
            raise typer.Exit(1)
    spent: list[Spent] = []
    with console.Task("Building", unit="items", quiet=quiet, at_once=True) as task:

        def on_progress(done: int, total: int) -> None:
            if settings.teacher is not None and spent:
                task.title = f"Building ({_spending(spent[-1], settings.teacher)})"
            task(done, total)

        result = build_sft(settings, config.parent, on_progress=on_progress, on_spent=spent.append)
    console.line((result.path.parent / "report.md").read_text(encoding="utf-8"))
    if result.spent is not None and settings.teacher is not None:
        console.note(_spending(result.spent, settings.teacher), quiet=quiet)
    if (made := result.report["items"]) < settings.items:
        console.error(
            f"warning: only {made:,} of {settings.items:,} items were built; the gates turned down every attempt "
            f"at the others (see {result.path.parent / 'report.md'})."
        )
    console.note(f"The items are in {result.path}.", quiet=quiet)


def _spending(spent: Spent, teacher: TeacherConfig) -> str:
    return (
        f"{spent.requests:,} requests, {spent.kept:,} kept, {spent.retries:,} tried again, {spent.prompt_tokens:,} + "
        f"{spent.reply_tokens:,} tokens, {spent.money(teacher):.2f} spent"
    )


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A file of items, one JSON object a line.")],
    samples: Annotated[int, typer.Option("--samples", "-n", help="Items to show, with their evidence.")] = 3,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Count every item again under this model's tokenizer.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Which items are shown.")] = 0,
    context: Annotated[int, typer.Option("--context", help="Characters shown around evidence.")] = 160,
) -> None:
    """Check every field of a file of items; show lengths, depths and samples.

    Example: longverse data inspect items.jsonl --samples 5 --tokenizer smol
    """
    from longverse.data.inspect import inspect_items
    from longverse.data.vocabulary import ChatCounter, load_vocabulary

    counter = ChatCounter(load_vocabulary(tokenizer)) if tokenizer else None
    found = inspect_items(file, samples=samples, seed=seed, counter=counter)
    _show(found, context)
    if found.wrong:
        raise typer.Exit(1)


def _show(found: Inspection, context: int) -> None:
    from rich.table import Table
    from rich.text import Text

    from longverse.data.inspect import pieces_of

    screen = console.out()
    screen.print(f"{found.items:,} good items, {found.tokens:,} tokens; {found.wrong:,} lines with a fault")
    for number, problem in found.problems:
        screen.print(Text(f"  line {number}: {problem}", style="red"))
    for title, rows in (
        ("Family", sorted(found.tasks.items())),
        ("Language", sorted(found.languages.items())),
        ("Tokens", found.length_rows()),
        ("Evidence depth", [(f"{i / 10:.1f}-{(i + 1) / 10:.1f}", n) for i, n in enumerate(found.depths)]),
    ):
        most = max((n for _, n in rows), default=0) or 1
        table = Table(title, "", "", box=None, padding=(0, 1))
        for label, n in rows:
            table.add_row(label, f"{n:,}", "█" * round(30 * n / most))
        screen.print(table)
    for number, item in found.samples:
        about = (item.id, item.task, item.kind, item.language, f"{item.tokens:,} tokens")
        screen.print(Text(f"── line {number} · {' · '.join(about)} ──"))
        for message in range(len(item.messages)):
            text = Text(f"{item.messages[message]['role']}: ", style="bold")
            for piece in pieces_of(item, message, context):
                if piece.left_out:
                    text.append(f" ⟨{piece.left_out:,} characters⟩ ", style="dim")
                else:
                    text.append(piece.text, style="black on yellow" if piece.evidence else "not bold")
            screen.print(text)
