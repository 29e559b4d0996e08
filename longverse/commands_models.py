"""The commands that make one checkpoint of another: convert, quantize, export, doctor.

Plain functions for the command line's app to mount. Everything heavy is imported inside them, so that `--help` stays
quick. Each raises UserError for a user's mistake.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import console
from .errors import UserError

if TYPE_CHECKING:
    from .models.convert import Written
    from .models.export import Check

Source = Annotated[
    str, typer.Argument(help="A checkpoint folder, a .gguf file, a model name or a hub id (owner/name).")
]
Target = Annotated[Path, typer.Argument(help="The folder to write; it must not exist yet.")]
Dtype = Annotated[str, typer.Option(help="keep, bfloat16, float16 or float32.")]
SHARD_GB = 5.0
ShardSize = Annotated[float, typer.Option("--shard-size", help="Largest file to write, in GB.", min=0.001)]


def convert(
    model: Source,
    target: Annotated[Path | None, typer.Argument(help="The folder to write; it must not exist yet.")] = None,
    dtype: Dtype = "keep",
    tokenizer: Annotated[
        bool, typer.Option("--tokenizer", help="Only bring the tokenizer files up to date; without a target, in place.")
    ] = False,
    shard_size: ShardSize = SHARD_GB,
) -> None:
    """Rewrite a checkpoint as safetensors with a complete config, shard by shard.

    Takes .bin shards, safetensors and GGUF. What the config of a known XVERSE release leaves out is filled in.

    Example: longverse convert ./XVERSE-13B-256K ./xverse-256k
    """
    if tokenizer:
        from .models.tokenizer_migration import migrate_tokenizer

        changes = migrate_tokenizer(model, target)
        for change in changes or ["The tokenizer files are up to date."]:
            typer.echo(change)
        return
    if target is None:
        raise UserError("convert needs a folder to write to: longverse convert MODEL TARGET.")
    from .models import convert as module

    with console.Task("Converting", unit="bytes") as report:
        written = module.convert(model, target, dtype=dtype, shard_bytes=int(shard_size * 1e9), on_progress=report)
    _tell(written)


def quantize(
    model: Source,
    target: Target,
    bits: Annotated[int, typer.Option(help="8 or 4.")] = 8,
    group: Annotated[
        int | None,
        typer.Option(help="Weights that share a scale: 32, 64, 128, or 0 for a row (int8). Default 0 or 64."),
    ] = None,
    symmetric: Annotated[
        bool | None,
        typer.Option("--symmetric/--zero-points", help="Without or with zero points. Default: int8 without."),
    ] = None,
    calibrate: Annotated[
        Path | None, typer.Option(help="A text file like what the model will read: better int4, in minutes (GPTQ).")
    ] = None,
    shard_size: ShardSize = SHARD_GB,
) -> None:
    """Quantise the weights of a checkpoint to int8 or int4, from disk to disk.

    The result is a compressed-tensors checkpoint (pack-quantized). longverse loads all of them; transformers, with
    the compressed-tensors package, those without zero points: int8 as it is, int4 with --symmetric.

    Example: longverse quantize ./xverse-256k ./xverse-256k-int4 --bits 4
    """
    from .models import quantize as module

    text = None
    if calibrate is not None:
        from .documents.reader import read

        text = read(calibrate).text
    with console.Task("Quantising", unit="bytes") as report:
        written = module.quantize(
            model,
            target,
            bits=bits,
            group=group,
            symmetric=symmetric,
            calibration=text,
            shard_bytes=int(shard_size * 1e9),
            on_progress=report,
        )
    _tell(written)


def export(
    model: Source,
    target: Annotated[Path, typer.Argument(help="The folder (or .gguf file) to write; it must not exist yet.")],
    to: Annotated[
        str, typer.Option(help="llama (transformers, vLLM, SGLang), xverse (with our model files) or gguf.")
    ] = "llama",
    rope: Annotated[str, typer.Option(help="For dynamic NTK: fixed (one base for --window) or dynamic.")] = "fixed",
    window: Annotated[
        int | None, typer.Option(help="Tokens the fixed base is for. Default: the model's window.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="keep, bfloat16, float16 or float32; for gguf also q8_0.")] = "keep",
    check: Annotated[bool, typer.Option("--check/--no-check", help="Compare ids and logits with the source.")] = True,
    shard_size: ShardSize = SHARD_GB,
) -> None:
    """Write a checkpoint that other engines run right, and compare it with its source.

    Example: longverse export ./XVERSE-13B-256K ./xverse-llama --to llama --window 262144
    """
    if to == "gguf":
        if rope != "fixed":
            raise UserError("A GGUF file has one fixed base, so --rope fixed is its only choice: leave --rope out.")
        if shard_size != SHARD_GB:
            raise UserError("A GGUF file is written whole: leave --shard-size out.")
        if not check:
            raise UserError("A GGUF file is always read back and compared: leave --no-check out.")
        _export_gguf(model, target, dtype, window)
        return
    from .models import export as module

    with console.Task("Exporting", unit="bytes") as report:
        written, result = module.export(
            model,
            target,
            layout=to,
            rope=rope,
            window=window,
            dtype=dtype,
            shard_bytes=int(shard_size * 1e9),
            check=check,
            on_progress=report,
        )
    _tell(written, result)


def _export_gguf(model: str, target: Path, dtype: str, window: int | None) -> None:
    from .models.export import export_gguf

    with console.Task("Exporting", unit="tensors") as report:
        notes = export_gguf(model, target, dtype=dtype, window=window, on_progress=report)
    _note(notes)
    typer.echo(f"{target}: {target.stat().st_size / 1e9:.3f} GB, read back and compared with its source.")


def doctor(
    path: Annotated[Path, typer.Argument(help="A checkpoint folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Say what is wrong with a checkpoint for long documents, and what to type. Leaves with 1 if there are errors.

    Example: longverse doctor ./XVERSE-13B-256K
    """
    import json
    from dataclasses import asdict

    from .models.doctor import diagnose

    findings = diagnose(path)
    for finding in findings:
        if as_json:
            typer.echo(json.dumps(asdict(finding), ensure_ascii=False))
            continue
        typer.echo(f"{finding.level:8}{finding.about:13}{finding.what}")
        if finding.remedy:
            typer.echo(f"{'':21}-> {finding.remedy}")
    if any(finding.level == "error" for finding in findings):
        raise typer.Exit(1)


def _note(notes: list[str]) -> None:
    from .models.releases import licence_shown

    for note in notes:
        console.note(note)
    licence_shown(notes)


def _tell(written: Written, check: Check | None = None) -> None:
    _note(written.notes)
    files = f"{written.shards} file{'s' if written.shards > 1 else ''}"
    typer.echo(
        f"{written.folder}: {written.written_bytes / 1e9:.3f} GB in {files} (read {written.read_bytes / 1e9:.3f} GB)."
    )
    if check is not None:
        typer.echo(
            f"Checked: {check.equal_ids} of {check.texts} hard texts give the same ids; mean KL {check.kl:.1e} nats"
            f" over {check.tokens} tokens in {check.dtype} (limit {check.limit:.0e}): equal to its source."
        )
