"""One page that compares runs: every result file of the given folders, in tables, heatmaps and curves.

The HTML page is self-contained (no script, no font, no file beside it) and reads well in print and in the dark;
the Markdown holds the same tables. Results that were made with other settings are named, never merged.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longverse.errors import UserError
from longverse.evaluation.files import read_json
from longverse.evaluation.needle import NeedleResult
from longverse.evaluation.perplexity import LossResult
from longverse.evaluation.plots import short_length
from longverse.evaluation.ruler import RulerResult

KINDS = ("needle", "longbench", "longbench-e", "longbench-v2", "ruler", "loss")
_INK = ("#1c6b66", "#cf6a3f", "#4a5d9e", "#b08b2e", "#7d4a86", "#5b6b73", "#a3363b", "#3f8f4f")


@dataclass(frozen=True)
class Run:
    """A result file: its kind, the name it is shown under, and its content."""

    kind: str
    name: str
    value: dict[str, Any]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Every result file (a JSON object with a known "kind") in the folders and below; other JSON is passed over.

    A run is called by its model, and by its folder too where two runs of one kind have the same model. UserError
    for a folder that does not exist or when nothing is found.
    """
    found: list[tuple[str, str, Path, dict[str, Any]]] = []
    for folder in folders:
        if not folder.exists():
            raise UserError(f"{folder} does not exist: give folders that `longverse eval` has written.")
        for path in sorted(folder.rglob("*.json")) if folder.is_dir() else [folder]:
            value = read_json(path)
            if isinstance(value, dict) and value.get("kind") in KINDS:
                try:
                    model = str(value["model"]["model"])
                    _blocks([Run(value["kind"], model, value)])
                except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                    raise UserError(
                        f"{path} is a damaged result, or one of another version ({type(error).__name__}: {error}): "
                        "make that run again."
                    ) from None
                found.append((f"{value['kind']} {value.get('way', '')}", model, path, value))
    if not found:
        raise UserError(
            f"No results are in {', '.join(map(str, folders))}: give folders that `longverse eval` has written."
        )
    runs = []
    for way, model, path, value in found:
        alike = [row[2] for row in found if row[:2] == (way, model)]
        runs.append(Run(value["kind"], model if len(alike) == 1 else f"{model} ({_apart(path, alike)})", value))
    return runs


def _apart(path: Path, alike: Sequence[Path]) -> str:
    """The folder of a result; with those above it where others are called the same."""
    parts = path.parent.parts
    for count in range(1, len(parts)):
        if sum(other.parent.parts[-count:] == parts[-count:] for other in alike) == 1:
            return "/".join(parts[-count:])
    return str(path)


# A block of the page: a heading, a remark, and a table, or a heatmap (cells are shares 0..1), or curves.
@dataclass(frozen=True)
class _Block:
    title: str
    note: str = ""
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    heat: tuple[tuple[float | None, ...], ...] | None = None  # per row, beside its label
    curves: tuple[tuple[str, tuple[tuple[float, float], ...]], ...] = ()
    axes: tuple[str, str] = ("", "")
    doubling: bool = False  # the horizontal axis is logarithmic, its ticks the points
    small: bool = False  # stands beside others in a row


def _cell(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _run_block(runs: Sequence[Run]) -> _Block:
    """Whose answers they are, a line a model: nothing that was run in another way should look alike."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for run in runs:
        m = run.value["model"]
        plan = _plan(m["rope"]) if m.get("rope") else "–"
        window = f"{m['window']:,}" if m.get("window") else "–"
        backend, weights, dtype, attention, cache = (
            str(m.get(key) or "–") for key in ("backend", "weights", "dtype", "attention", "cache")
        )
        about = (str(m["model"]), backend, weights[:8], dtype, window, plan, attention, cache)
        made = rows.setdefault(about, [])
        if (kind := run.kind.replace("loss", f"loss ({_WAYS.get(run.value.get('way', ''), '')})")) not in made:
            made.append(kind)
    columns = ("model", "back end", "weights", "numbers", "window", "RoPE", "attention", "cache", "measured")
    return _Block("Who was asked", "", columns, tuple((*about, ", ".join(made)) for about, made in rows.items()))


def _plan(rope: dict[str, Any]) -> str:
    """A RoPE plan in words: kind and base, and factor and original window where it has them."""
    plan = f"{rope['kind']}, base {rope['theta']:,.0f}"
    if rope.get("factor", 1) != 1:
        plan += f", factor {rope['factor']:g}"
    if rope.get("original_window"):
        plan += f" from {rope['original_window']:,}"
    return plan


def _needle_blocks(runs: Sequence[Run]) -> list[_Block]:
    blocks = []
    for run in runs:
        result = NeedleResult.from_dict(run.value)
        s = result.settings
        for language in s["languages"]:
            grid = result.grid(language)
            share = result.found(language)
            failed = f"; {result.failures} trials failed" if result.failures else ""
            blocks.append(
                _Block(
                    title=f"Needles: {run.name}, {'Chinese' if language == 'zh' else 'English'}",
                    note=f"{'Nothing answered' if share is None else f'{100 * share:.0f} % found'}{failed}; "
                    f"mode {s['mode']}, {s['repeats']} facts a cell, haystack {s['haystack_name']}.",
                    small=True,
                    columns=("depth", *map(short_length, s["lengths"])),
                    rows=tuple((f"{100 * d:.0f} %",) for d in s["depths"]),
                    heat=tuple(tuple(row) for row in grid),
                )
            )
    return blocks


def _ruler_blocks(runs: Sequence[Run]) -> list[_Block]:
    blocks, lines = [], []
    for run in runs:
        result = RulerResult.from_dict(run.value)
        lengths, tasks = result.settings["lengths"], result.settings["tasks"]
        shares = [[None if (v := result.score(t, n)) is None else v / 100 for n in lengths] for t in tasks]
        average = [None if (v := result.average(n)) is None else v / 100 for n in lengths]
        effective = result.effective_length()
        blocks.append(
            _Block(
                title=f"RULER: {run.name}",
                note=f"{result.rows_a_cell}; effective length: "
                f"{f'below {lengths[0]:,}' if effective is None else f'{effective:,}'} tokens.",
                small=True,
                columns=("task", *(f"{n:,}" for n in lengths)),
                rows=(*((task,) for task in tasks), ("average",)),
                heat=(*map(tuple, shares), tuple(average)),
            )
        )
        points = [(float(n), 100 * v) for n, v in zip(lengths, average, strict=True) if v is not None]
        lines.append((run.name, tuple(points)))
    if any(len(points) > 1 for _, points in lines):
        blocks.append(
            _Block(
                "RULER by length",
                curves=tuple(lines),
                axes=("tokens of prompt and answer", "average, per cent"),
                doubling=True,
            )
        )
    return blocks


def _longbench_blocks(runs: Sequence[Run]) -> list[_Block]:
    blocks = []
    plain = [r for r in runs if r.kind == "longbench"]
    if plain:
        tasks = list(dict.fromkeys(t for r in plain for t in r.value["scores"]))
        published = plain[0].value["published"]
        columns = ("task", *(r.name for r in plain), *(f"{c} (published)" for c in published["columns"]))
        rows = []
        for task in tasks:
            ours = [_cell((r.value["scores"].get(task) or {}).get("score"), 2) for r in plain]
            rows.append((task, *ours, *map(_cell, published["rows"].get(task, [None] * len(published["columns"])))))
        notes = [f"{r.name}: {_longbench_note(r.value)}" for r in plain]
        for name, key in (("mean of the tasks", "tasks"), ("mean of the six categories", "leaderboard")):
            means = [_cell((r.value["averages"] or {}).get(key), 2) for r in plain]
            rows.append((name, *means, *("–" for _ in published["columns"])))
        blocks.append(_Block("LongBench", " ".join([*notes, published["note"]]), columns, tuple(rows)))
        beside = [
            (r.name, task, variant, _cell(s["score"], 2), _cell(value, 2))
            for r in plain
            for task, s in r.value["scores"].items()
            for variant, value in s["beside"].items()
        ]
        if beside:
            columns = ("run", "task", "variant", "official", "variant's")
            blocks.append(_Block("LongBench: quirks corrected, beside", "", columns, tuple(beside)))
    for run in (r for r in runs if r.kind == "longbench-e"):
        buckets = ("0-4k", "4-8k", "8k+")
        e_rows = tuple(
            (task, _cell(s["score"], 2), *(_cell((s["buckets"] or {}).get(b), 2) for b in buckets))
            for task, s in run.value["scores"].items()
        )
        blocks.append(_Block(f"LongBench-E: {run.name}", "", ("task", "score", *buckets), e_rows))
    for run in (r for r in runs if r.kind == "longbench-v2"):
        scores = run.value["scores"]
        way = "with reasoning" if run.value["settings"]["reasoning"] else "direct"
        unanswered, failed = run.value["unanswered"], len(run.value["failed"])
        note = f"{run.value['items']} items, {unanswered} without a letter, {failed} failed."
        row = tuple(_cell(v) for v in scores.values())
        blocks.append(_Block(f"LongBench v2, {way}: {run.name}", note, tuple(scores), (row,)))
    return blocks


def _longbench_note(value: dict[str, Any]) -> str:
    scores = value["scores"].values()
    failed = sum(s["failed"] for s in scores)
    missing = sum(s["missing"] for s in scores)
    parts = [f"{len(value['scores'])} of 21 tasks, {sum(s['rows'] for s in scores):,} rows"]
    if value["settings"].get("max_length"):
        parts.append(f"--max-length {value['settings']['max_length']:,}")
    if failed or missing:
        parts.append(f"{failed} rows failed and {missing} not run")
    return ", ".join(parts) + "."


_WAYS = {"whole": "by position", "length": "by length", "sliding": "sliding"}


def _loss_blocks(runs: Sequence[Run]) -> list[_Block]:
    results = [(run, LossResult.from_dict(run.value)) for run in runs]
    rows = []
    for run, result in results:
        window = result.effective_window()
        way = _WAYS[result.kind]
        if result.kind == "sliding":
            way += f" by {result.settings['stride']:,}"
        reach = "–" if window is None else f"{window:,}"
        length = f"{result.settings['length']:,}"
        rows.append((run.name, way, length, _cell(result.mean, 4), _cell(result.perplexity, 2), reach))
    columns = ("run", "read", "tokens", "nats a token", "perplexity", "effective window")
    blocks = [_Block("Loss", "", columns, tuple(rows))]
    for title, kinds, axis in (
        ("Loss by position", ("whole", "sliding"), "position in tokens"),
        ("Loss by length", ("length",), "length of the context in tokens"),
    ):
        lines = tuple((run.name, tuple(result.points())) for run, result in results if result.kind in kinds)
        if lines:
            blocks.append(_Block(title, curves=lines, axes=(axis, "nats a token"), doubling="length" in kinds))
    return blocks


_MAKERS: tuple[tuple[tuple[str, ...], Callable[[Sequence[Run]], list[_Block]]], ...] = (
    (("needle",), _needle_blocks),
    (("longbench", "longbench-e", "longbench-v2"), _longbench_blocks),
    (("ruler",), _ruler_blocks),
    (("loss",), _loss_blocks),
)


def _blocks(runs: Sequence[Run]) -> list[_Block]:
    blocks = [_run_block(runs)]
    for kinds, make in _MAKERS:
        chosen = [run for run in runs if run.kind in kinds]
        if chosen:
            blocks += make(chosen)
    return blocks


def _full_rows(block: _Block) -> list[tuple[str, ...]]:
    if block.heat is None:
        return list(block.rows)
    return [
        (*row, *(_cell(None if v is None else 100 * v, 0) for v in heat))
        for row, heat in zip(block.rows, block.heat, strict=True)
    ]


def markdown(runs: Sequence[Run]) -> str:
    """The tables of all runs; curves as tables of their points."""
    lines = ["# Evaluation", ""]
    for block in _blocks(runs):
        lines += [f"## {block.title}", ""]
        if block.note:
            lines += [block.note, ""]
        if block.columns:
            lines += ["| " + " | ".join(block.columns) + " |", "|---" * len(block.columns) + "|"]
            lines += ["| " + " | ".join(row) + " |" for row in _full_rows(block)] + [""]
        for name, points in block.curves:
            lines.append(f"{name}: " + "; ".join(f"{x:,.0f}: {y:.3g}" for x, y in points))
        if block.curves:
            lines.append("")
    return "\n".join(lines)


_STYLE = """
:root { color-scheme: light dark; --ink: #22282c; --paper: #fff; --faint: #6b7479; --rule: #dfe4e6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ea; --paper: #15191b; --faint: #98a2a8; --rule: #333b3f; } }
body { font: 15px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 72rem;
  margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .3rem }
p { color: var(--faint); margin: .2rem 0 .7rem; max-width: 60rem } .beside p { max-width: 24rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .32rem .7rem; text-align: left; border-bottom: 1px solid var(--rule); white-space: nowrap }
.n { text-align: right } th { font-weight: 600; color: var(--faint); white-space: normal }
tr.sum td { font-weight: 600 } .beside { display: flex; flex-wrap: wrap; column-gap: 3rem }
table.heat th + th { text-align: center; padding: .32rem .2rem } td.long { white-space: normal }
table.heat td + td { border: 2px solid var(--paper); min-width: 2.4rem; text-align: center; padding: .32rem .2rem }
svg { max-width: 100%; height: auto } svg text { fill: var(--ink); font: 12px system-ui, sans-serif }
""".strip()
_SCALE = (
    (140, 45, 25),
    (207, 106, 63),
    (237, 197, 141),
    (244, 239, 217),
    (181, 214, 205),
    (90, 166, 155),
    (28, 107, 102),
)


def _colour(share: float) -> tuple[str, str]:
    """Background and ink of a heatmap's cell."""
    at = min(max(share, 0.0), 1.0) * (len(_SCALE) - 1)
    low = min(int(at), len(_SCALE) - 2)
    red, green, blue = (round(a + (b - a) * (at - low)) for a, b in zip(_SCALE[low], _SCALE[low + 1], strict=True))
    return f"#{red:02x}{green:02x}{blue:02x}", "#fff" if share < 0.2 or share > 0.82 else "#22282c"


def _table(block: _Block) -> str:
    number = [all(_is_number(row[c]) for row in block.rows if c < len(row)) for c in range(len(block.columns))]
    mark = [' class="n"' if one else "" for one in number]
    head = "".join(f"<th{m}>{html.escape(c)}</th>" for c, m in zip(block.columns, mark, strict=True))
    body = []
    for index, row in enumerate(block.rows):
        cells = []
        for cell, one in zip(row, mark, strict=False):
            long = ' class="long"' if len(cell) > 40 else one
            cells.append(f"<td{long}>{html.escape(cell)}</td>")
        for value in block.heat[index] if block.heat is not None else ():
            if value is None:
                cells.append("<td>–</td>")
            else:
                back, ink = _colour(value)
                cells.append(f'<td style="background:{back};color:{ink}">{100 * value:.0f}</td>')
        total = ' class="sum"' if row[0].startswith(("average", "mean")) else ""
        body.append(f"<tr{total}>{''.join(cells)}</tr>")
    kind = ' class="heat"' if block.heat is not None else ""
    return f'<div class="wide"><table{kind}><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _is_number(cell: str) -> bool:
    return cell.replace(",", "").replace(".", "", 1).isdigit() or cell == "–"


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    step = 10 ** math.floor(math.log10((high - low) / count))
    while (high - low) / step > count * 1.5:
        step *= 2 if str(step).lstrip("0.").startswith(("1", "5")) else 2.5
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _svg(block: _Block) -> str:
    width, height, left, right, bottom, top = 860, 330, 56, 30, 44, 12
    points = [p for _, line in block.curves for p in line]
    if not points:
        return ""
    scale = math.log2 if block.doubling else float
    x0, x1 = scale(min(p[0] for p in points)), scale(max(p[0] for p in points))
    y0, y1 = min(p[1] for p in points), max(p[1] for p in points)
    x1 += (x1 == x0) or 0
    y0, y1 = (y0 - 0.5, y1 + 0.5) if y0 == y1 else (y0 - 0.06 * (y1 - y0), y1 + 0.06 * (y1 - y0))

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            left + 10 + (scale(x) - x0) / (x1 - x0) * (width - left - right - 10),
            top + (y1 - y) / (y1 - y0) * (height - bottom - top),
        )

    name = html.escape(block.title, quote=True)
    out = [
        f'<svg viewBox="0 0 {width} {height + 22 * len(block.curves)}" width="{width}" role="img" aria-label="{name}">'
    ]
    for tick in _ticks(y0, y1):
        _, y = at(points[0][0], tick)
        out.append(f'<line x1="{left}" x2="{width - right + 8}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--rule)"/>')
        out.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for tick in sorted({p[0] for p in points}) if block.doubling else _ticks(x0, x1, 8):
        x, _ = at(tick, y0)
        out.append(f'<text x="{x:.1f}" y="{height - bottom + 18}" text-anchor="middle">{tick:,.0f}</text>')
    out.append(
        f'<text x="{width / 2}" y="{height - 6}" text-anchor="middle">{html.escape(block.axes[0])}</text>'
        f'<text x="14" y="{height / 2}" transform="rotate(-90 14 {height / 2})" text-anchor="middle">'
        f"{html.escape(block.axes[1])}</text>"
    )
    for number, (name, line) in enumerate(block.curves):
        ink = _INK[number % len(_INK)]
        places = [at(*p) for p in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        out.append(f'<polyline points="{path}" fill="none" stroke="{ink}" stroke-width="2"/>')
        if len(line) <= 24:
            out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{ink}"/>' for x, y in places]
        y = height + 22 * number + 8
        out.append(f'<rect x="{left}" y="{y - 6}" width="18" height="4" fill="{ink}"/>')
        out.append(f'<text x="{left + 26}" y="{y}">{html.escape(name)}</text>')
    return "".join(out) + "</svg>"


def page(runs: Sequence[Run]) -> str:
    """The HTML page."""
    body = ["<h1>Evaluation</h1>", f"<p>{len(runs)} results, made by longverse eval.</p>"]
    if any(run.kind == "needle" for run in runs):
        body.append("<p>Needles: the depth of the fact down, tokens of the prompt across, per cent found.</p>")
    for small, some in itertools.groupby(_blocks(runs), key=lambda block: block.small):
        parts = [f"<section>{_section(block)}</section>" for block in some]
        body += ['<div class="beside">', *parts, "</div>"] if small else parts
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Evaluation</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _section(block: _Block) -> str:
    note = f'<p class="note">{html.escape(block.note)}</p>' if block.note else ""
    table = _table(block) if block.columns else ""
    return f"<h2>{html.escape(block.title)}</h2>{note}{table}{_svg(block) if block.curves else ''}"
