"""Write the figures of benchmarks/results/ into README.md, README.zh-CN.md and docs/: no number in their places is
typed by hand.

A place for figures is a pair of comments, `<!-- figures: NAME -->` and `<!-- end -->`; what stands between them is
replaced. `--check` changes nothing and fails where a file is not up to date (the tests run it).

    python benchmarks/figures.py [--check]
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import RESULTS, table

ROOT = Path(__file__).parent.parent
PLACE = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def machine_line(results: dict[str, Any], chinese: bool) -> str:
    machine = results["machine"]
    if chinese:
        return f"{machine['cpu']}，{machine['threads']} 线程，torch {machine['torch']}，{machine['date']}。"
    threads = f"{machine['threads']} thread{'s' if machine['threads'] != 1 else ''}"
    return f"{machine['cpu']}, {threads}, torch {machine['torch']}, {machine['date']}."


def first_light(chinese: bool) -> str:
    """Time to the first word and to the second question, beside transformers."""
    results = load("first_light")
    labels = {
        "first": ("the first word over a document", "读完文档、给出第一个词"),
        "second": ("a second question about it", "再问同一文档"),
        "decode": ("a further token", "每多写一个 token"),
    }
    rows = []
    for size, document in results["documents"].items():
        for key, label in labels.items():
            ours, theirs = document["seconds"][f"ours {key}"], document["seconds"][f"theirs {key}"]
            ratio = f"{document[f'{key} ratio']:.1f}x"
            rows.append([f"{int(size):,}", label[chinese], f"{ours:.3f} s", f"{theirs:.3f} s", ratio])
    english = ["tokens", "time to", "longverse", "transformers", "ratio"]
    header = ["token 数", "所用时间", "longverse", "transformers", "倍数"] if chinese else english
    return f"{table(header, rows)}\n\n{machine_line(results, chinese)}\n"


def needle(chinese: bool) -> str:
    """Facts found by length over all depths, per cent: smol, and the model it was made from."""
    results = load("needle")
    lengths = results["smol"]["settings"]["lengths"]
    names = {"en": ("English", "英文"), "zh": ("Chinese", "中文")}
    untrained = {"ABF x5": "只改基数 ×5", "dynamic NTK": "只加动态 NTK"}
    rows = []
    for name, result in results.items():
        if not isinstance(result, dict) or "grids" not in result:
            continue
        for language, grid in result["grids"].items():
            found = dict(zip(result["settings"]["lengths"], zip(*grid, strict=True), strict=True))
            cells = []
            for length in lengths:
                depths = [share for share in found.get(length, ()) if share is not None]
                cells.append(f"{100 * sum(depths) / len(depths):.0f}" if depths else "–")
            shown = name
            for plan, translated in untrained.items():
                shown = shown.replace(f", {plan}", f"，{translated}") if chinese else shown
            rows.append([shown, names[language][chinese], *cells])
    first = ["模型", "语言"] if chinese else ["model", "language"]
    return f"{table([*first, *(f'{n // 1000}K' for n in lengths)], rows)}\n\n{machine_line(results, chinese)}\n"


def _shares(cell: dict[str, Any] | None, names: tuple[str, ...], chinese: bool) -> str:
    """Shares of one cell and of how many: `92 → 98 % of 52`."""
    if not cell:
        return "–"
    shares = " → ".join(f"{100 * cell[name]:.0f}" for name in names)
    return f"{shares} %（{cell['of']}）" if chinese else f"{shares} % of {cell['of']}"


def smol_facts(chinese: bool) -> str:
    """Facts of kinds never trained on, by length, language and sort."""
    results = load("smol_facts")
    names = {"en": ("English", "英文"), "zh": ("Chinese", "中文")}
    order = ("plain", "absent", "hop", "several")
    rows = []
    for cell in results["cells"]:
        if cell["model"] != "smol":
            continue
        for language, found in sorted(cell["found"].items()):
            cells = [_shares(found.get(sort), ("right", "in_the_end"), chinese) for sort in order]
            length = f"{cell['length']:,}" + (f", {cell['rope']}" if cell["rope"] else "")
            rows.append([length, names[language][chinese], *cells])
    header = ["token 数", "语言"] if chinese else ["tokens", "language"]
    return f"{table([*header, *order], rows)}\n\n{machine_line(results, chinese)}\n"


def citations(chinese: bool) -> str:
    """Answers and citations over generated reports."""
    results = load("citations")
    names = {"en": ("English", "英文"), "zh": ("Chinese", "中文")}
    columns = {
        "answerable right at first": ("answered rightly at first", "初次答对"),
        "answerable right": ("and after a second look", "二次核对后答对"),
        "answerable cited": ("right paragraph cited", "引用段落正确"),
        "answerable refused": ("refused wrongly", "误拒"),
        "unanswerable refused": ("no answer there: refused", "无答案时拒答"),
        "reworded right": ("reworded: answered rightly in the end", "换说法：最终答对"),
        "reworded cited": ("reworded: right paragraph", "换说法：段落正确"),
    }
    rows = []
    for row in results["rows"]:
        cells = [f"{100 * row[key]:.0f} %" if row.get(key) is not None else "–" for key in columns]
        counts = f"{row['answerable questions']} + {row['unanswerable questions']} + {row['reworded questions']}"
        rows.append([f"{row['tokens']:,}", names[row["language"]][chinese], counts, *cells])
    header = ["token 数", "语言", "问题数"] if chinese else ["tokens", "language", "questions"]
    return f"{table([*header, *(name[chinese] for name in columns.values())], rows)}\n"


def transcript(chinese: bool) -> str:
    """The README's opening: what one run of the command printed."""
    return f"```text\n{load('transcript')['text']}\n```\n"


def demo_seeds(chinese: bool) -> str:
    """How many of ten questions smol answers rightly over generated reports."""
    results = load("demo_seeds")
    right = [run["right"] for run in results["runs"]]
    shortest = min(run["tokens"] for run in results["runs"])
    if chinese:
        return (
            f"在 {len(right)} 份较短的年报上（每份至少 {shortest:,} token，`benchmarks/demo_seeds.py`），"
            f"十个问题 `smol` 平均答对 {results['mean']:.1f} 个，最少 {min(right)} 个。\n"
        )
    return (
        f"On {len(right)} shorter reports, of at least {shortest:,} tokens, `smol` answers {results['mean']:.1f} of ten"
        f" questions on average and {min(right)} at worst (`benchmarks/demo_seeds.py`).\n"
    )


def load_convert(chinese: bool) -> str:
    """Peak memory and speed of loading and converting, beside transformers."""
    results = load("load_convert")
    gigabyte, size = 1e9, results["shape"]["input_bytes"]
    rows = []
    for name, job in results["jobs"].items():
        final, peak = job["final_bytes"] / gigabyte, job["peak_bytes"] / gigabyte
        speed = f"{size / job['seconds'] / 1e6:,.0f}" if "load" not in name else "–"
        rows.append([name, f"{job['seconds']:.1f}", f"{final:.2f}", f"{peak:.2f}", f"{peak - final:+.2f}", speed])
    header = ["", "seconds", "final GB", "peak GB", "peak − final", "MB/s of input"]
    return f"{table(header, rows)}\n\n{machine_line(results, chinese)}\n"


def quant_quality(chinese: bool) -> str:
    """What quantised weights cost and give on smol."""
    results = load("quant_quality")
    texts = list(results["tokens"])
    rows = []
    for name, form in results["formats"].items():
        speed = form["tokens_per_second"]
        rows.append(
            [name, f"{form['weight_bytes'] / 1e6:.0f}"]
            + [f"{form['kl'][text]:.4f}" for text in texts]
            + [f"{form['perplexity'][text]:.1f}" for text in texts]
            + [f"{speed['prefill']:,.0f}", f"{speed['decode']:.1f}", f"{100 * form['needles']:.0f} %"]
        )
    kl, perplexity = [f"KL {text}" for text in texts], [f"perplexity {text}" for text in texts]
    header = ["weights", "MB", *kl, *perplexity, "read tok/s", "write tok/s", "facts found"]
    return f"{table(header, rows)}\n\n{machine_line(results, chinese)}\n"


def round_trip(chinese: bool) -> str:
    """Perplexity at each step of smol's round through the formats."""
    results = load("round_trip")
    rows = [[name, f"{s['perplexity']:.2f}", f"{s['bytes'] / 1e6:.0f}"] for name, s in results["round"].items()]
    return f"{table(['step', 'perplexity', 'MB'], rows)}\n"


def cpu_long(chinese: bool, name: str = "cpu_long") -> str:
    """Reading and writing on a CPU, beside transformers and llama.cpp."""
    results = load(name)
    names = {
        "ours exact": ("longverse, exact", "longverse，精确"),
        "ours exact, int8 cache": ("int8 cache", "int8 缓存"),
        "ours exact, int4 cache": ("int4 cache", "int4 缓存"),
        "ours sparse": ("sparse", "稀疏"),
        "ours sparse:0.8": ("sparse:0.8", "稀疏 0.8"),
        "ours pages": ("pages", "分页"),
        "transformers bf16": ("transformers, bf16", "transformers，bf16"),
        "transformers float32": ("transformers, float32", "transformers，float32"),
        "llama.cpp Q4_1, f16 cache": ("llama.cpp, Q4_1", "llama.cpp，Q4_1"),
    }
    measured = {key.split(" @ ")[0] for key in results["rows"]}
    names = {name: heads for name, heads in names.items() if name in measured}
    parts = {
        "read_seconds": ("reading, s", "阅读，秒", 1.0),
        "token_seconds": ("a further token, ms", "每多写一个 token，毫秒", 1e3),
    }
    rows = []
    for length in sorted({int(key.split(" @ ")[1]) for key in results["rows"]}):
        for part, (english, translated, scale) in parts.items():
            cells = []
            for name in names:
                row = results["rows"].get(f"{name} @ {length}", {})
                late = f"> {row['limit']}" if "limit" in row and part == "read_seconds" else "–"
                cells.append(f"{row[part] * scale:.1f}" if part in row else late)
            rows.append([f"{length:,}", translated if chinese else english, *cells])
    header = ["token 数", ""] if chinese else ["tokens", ""]
    measured_rows = [(key, row) for key, row in results["rows"].items() if "mass_kept" in row]
    kept, little = (
        min((row["mass_kept"] for key, row in measured_rows if key.startswith(f"{way} @")), default=None)
        for way in ("ours sparse", "ours sparse:0.8")
    )
    weights = ", ".join(sorted({row["weights"] for row in results["rows"].values() if "weights" in row}))
    note = (
        f"longverse 写答案时用 {weights} 权重；稀疏阅读至少保留 {kept:.0%} 的注意力"
        + (f"（0.8 档至少 {little:.0%}）" if little else "")
        + "，分页是近似。"
        if chinese
        else f"Ours writes with {weights} weights; sparse reading kept {kept:.0%} of the attention or more"
        + (f", with the dial at 0.8 {little:.0%}" if little else "")
        + "; pages are an approximation. "
    )
    shown = table([*header, *(name[chinese] for name in names.values())], rows)
    return f"{shown}\n\n{note}{machine_line(results, chinese)}\n"


def cpu_kernels(chinese: bool, name: str = "cpu_kernels") -> str:
    """How near the kernels that write come to the memory's own speed."""
    results = load(name)
    rows = [[row["what"], f"{row['gb']:.1f}", f"{row['share']:.0%}"] for row in results["rows"]]
    return f"{table(['', 'GB/s', 'of plain reading'], rows)}\n\n{machine_line(results, chinese)}\n"


def kv_quality(chinese: bool) -> str:
    """What rounded caches cost, by layout."""
    results = load("kv_quality")
    columns = [key for key in next(iter(results["layouts"].values())) if key.startswith("KL")]
    rows = []
    for name, row in results["layouts"].items():
        found = results["facts_found"].get(name.split(" ")[0]) if "ours" in name or name == "full" else None
        cells = [f"{row[key]:.5f}" for key in columns]
        rows.append([name, f"{row['bytes a token']:,.0f}", *cells, "–" if found is None else f"{found:.0%}"])
    return f"{table(['layout', 'bytes a token', *columns, 'facts found'], rows)}\n\n{machine_line(results, chinese)}\n"


def sparse_quality(chinese: bool, name: str = "sparse_quality") -> str:
    """What sparse reading and writing cost and give."""
    results = load(name)
    forms = {
        "seconds": "{:.1f}", "times faster": "{:.2f}", "blocks read": "{:.0%}", "mass kept": "{:.1%}", "KL": "{:.4f}",
        "KL, made text": "{:.3f}", "KL, novel": "{:.3f}", "ms a token": "{:.1f}", "mass written": "{:.1%}",
        "facts found": "{:.0%}",
    }  # fmt: skip
    forms = {key: form for key, form in forms.items() if any(row.get(key) is not None for row in results["rows"])}
    rows = [
        [f"{row['tokens']:,}", str(row["dial"])]
        + [form.format(row[key]) if row.get(key) is not None else "–" for key, form in forms.items()]
        for row in results["rows"]
    ]
    return f"{table(['tokens', 'dial', *forms], rows)}\n\n{machine_line(results, chinese)}\n"


def pages_lengths(chinese: bool, name: str = "pages_lengths") -> str:
    """Facts found past the window, and what reading costs."""
    results = load(name)
    modes = [mode for mode in ("facts", "several", "hop") if mode in results["lengths"][0]]
    rows = []
    for record in sorted(results["lengths"], key=lambda record: record["length"]):
        cells = [
            f"{sum(trial['score'] or 0 for trial in record[mode]):.0f} of {len(record[mode])}"
            if mode in record
            else "–"
            for mode in modes
        ]
        speed = [f"{record['microseconds a token']:.0f} µs", f"{record['first token']:.2f} s"]
        rows.append([f"{record['length']:,}", *cells, *speed])
    header = ["tokens", *modes, "reading, a token", "slowest first token of an answer"]
    return f"{table(header, rows)}\n\n{machine_line(results, chinese)}\n"


def pages_variants(chinese: bool) -> str:
    """Ways of choosing pages and of answering from them, over one document."""
    results = load("pages_variants")
    rows = []
    for name, asked in results["variants"].items():
        trials = [trial for mode in asked.values() for trial in mode]
        seen = [trial["seen"] for trial in trials if trial["seen"] is not None]
        first = results["first"][name]
        rows.append(
            [name, f"{sum(trial['score'] or 0 for trial in trials):.0f} of {len(trials)}",
             f"{sum(seen) / len(seen):.0%}", f"{sum(first) / len(first):.1f} s"]
        )  # fmt: skip
    header = [f"{results['length']:,} tokens", "right", "right page seen", "to the first token"]
    return f"{table(header, rows)}\n\n{machine_line(results, chinese)}\n"


def pages_reports(chinese: bool) -> str:
    """Questions about generated reports, read by pages and read exactly."""
    results = load("pages_reports")
    shares = [key for key in results["rows"][0] if key not in ("tokens", "language", "read", "counts", "misses")]
    rows = [
        [f"{row['tokens']:,}", row["read"], *("–" if row[key] is None else f"{row[key]:.0%}" for key in shares)]
        for row in results["rows"]
    ]
    return f"{table(['tokens', 'read', *shares], rows)}\n\n{machine_line(results, chinese)}\n"


def recipe_study(chinese: bool) -> str:
    """What each step of the recipe brings, by multiples of the base window, and the card's claims judged."""
    results = load("recipe_study")
    rows, factors = results["rows"], sorted({row["factor"] for row in results["rows"]})
    header = [f"{factor}x, {factor * results['window']:,}" for factor in factors]
    parts = []
    for title, key, form in (
        ("facts found, both languages", "found", "{:.0%}"),
        ("loss of the same last tokens, nats", "loss", "{:.2f}"),
    ):
        cells = []
        for name in dict.fromkeys(row["variant"] for row in rows):
            own = {row["factor"]: row | {"found": (row["found_en"] + row["found_zh"]) / 2}
                   for row in rows if row["variant"] == name}  # fmt: skip
            cells.append([name, *(form.format(own[f][key]) if f in own else "–" for f in factors)])
        parts.append(table([title, *header], cells))

    def at(claim: dict[str, Any]) -> str:  # short texts are the same ones at every factor
        return "" if claim["claim"].startswith("Short texts") else f" at {claim['factor']}x"

    claims = [
        [claim["claim"], f"{claim['value']:.2f} against {claim['other']:.2f}" + at(claim), claim["verdict"]]
        if "value" in claim
        else [claim["claim"], "–", claim["verdict"]]
        for claim in results["claims"]
    ]
    parts.append(table(["the card's claim", "figures", "verdict"], claims))
    return "\n\n".join(parts) + f"\n\n{machine_line(results, chinese)}\n"


def plan_check(chinese: bool) -> str:
    """Planned beside measured memory and seconds."""
    results = load("plan_check")

    def pair(row: dict[str, Any], key: str, scale: float, form: str) -> str:
        planned, measured = row[f"planned_{key}"], row[f"measured_{key}"]
        if planned is None:
            return f"– / {form.format(measured * scale)}"
        return f"{form.format(planned * scale)} / {form.format(measured * scale)} ({planned / measured - 1:+.0%})"

    rows = [
        [f"{row['tokens']:,}", row["cache"], pair(row, "bytes", 1e-6, "{:,.0f}"), pair(row, "prefill", 1, "{:.2f}"),
         pair(row, "token", 1e3, "{:.1f}")]
        for row in results["rows"]
    ]  # fmt: skip
    header = ["tokens", "cache", "memory, MB, planned / measured", "reading, s", "a token, ms"]
    return f"{table(header, rows)}\n\n{machine_line(results, chinese)}\n"


def train_throughput(chinese: bool, name: str = "train_throughput") -> str:
    """A step of training beside transformers' Trainer."""
    results = load(name)
    rows = [
        [f"{row['tokens']:,}", *(f"{row[side]['tokens_per_second']:.0f}" for side in ("ours", "trainer")),
         f"{row['tokens_per_second_ratio']:.2f}",
         *(f"{row[side]['peak'] / 1e9:.2f}" for side in ("ours", "trainer")), f"{row['memory_ratio']:.2f}"]
        for row in results["rows"]
    ]  # fmt: skip
    header = ["tokens a step", "ours, tokens/s", "Trainer", "ratio", "ours, peak GB", "Trainer", "ratio"]
    return f"{table(header, rows)}\n\n{results['dtype']}. {machine_line(results, chinese)}\n"


def compare_runs(chinese: bool) -> str:
    """Losses of runs of one recipe with one optimizer and another."""
    results = load("compare_runs")
    names = list(results["runs"])
    rows = [
        [row["stage"], f"{row['step']:,}", *(f"{row['losses'][name]:.2f}" for name in names)] for row in results["rows"]
    ]
    return f"{table(['stage', 'around step', *names], rows)}\n"


def reopen(chinese: bool, name: str = "reopen") -> str:
    """A long document read, kept and opened again."""
    results = load(name)
    fresh = next(iter(results["runs"].values()))["tokens"]  # of the fresh reading, or of the one that is kept
    rows = [
        [name, f"{one['reused']:,}", f"{one['seconds']:.1f}", "yes" if one["tokens"] == fresh else "NO"]
        for name, one in results["runs"].items()
    ]
    header = [f"{results['tokens']:,} tokens", "reused", "to the first new token, s", "answer as read fresh"]
    return f"{table(header, rows)}\n\n{machine_line(results, chinese)}\n"


WRITERS: dict[str, Callable[[bool], str]] = {
    "cpu_long": cpu_long,
    "cpu_long_amx": lambda chinese: cpu_long(chinese, "cpu_long_amx"),
    "cpu_long_avx2": lambda chinese: cpu_long(chinese, "cpu_long_avx2"),
    "cpu_kernels": cpu_kernels,
    "cpu_kernels_amx": lambda chinese: cpu_kernels(chinese, "cpu_kernels_amx"),
    "kv_quality": kv_quality,
    "sparse_quality": sparse_quality,
    "sparse_quality_32k": lambda chinese: sparse_quality(chinese, "sparse_quality_32k"),
    "sparse_quality_32k_needles": lambda chinese: sparse_quality(chinese, "sparse_quality_32k_needles"),
    "sparse_quality_64k": lambda chinese: sparse_quality(chinese, "sparse_quality_64k"),
    "sparse_quality_64k_needles": lambda chinese: sparse_quality(chinese, "sparse_quality_64k_needles"),
    "sparse_quality_64k_amx": lambda chinese: sparse_quality(chinese, "sparse_quality_64k_amx"),
    "pages_lengths": pages_lengths,
    "pages_lengths_amx": lambda chinese: pages_lengths(chinese, "pages_lengths_amx"),
    "pages_variants": pages_variants,
    "pages_reports": pages_reports,
    "recipe_study": recipe_study,
    "plan_check": plan_check,
    "reopen": reopen,
    "reopen_256k": lambda chinese: reopen(chinese, "reopen_256k"),
    "reopen_256k_amx": lambda chinese: reopen(chinese, "reopen_256k_amx"),
    "train_throughput": train_throughput,
    "train_throughput_amx": lambda chinese: train_throughput(chinese, "train_throughput_amx"),
    "compare_runs": compare_runs,
    "first_light": first_light,
    "needle": needle,
    "smol_facts": smol_facts,
    "citations": citations,
    "transcript": transcript,
    "demo_seeds": demo_seeds,
    "load_convert": load_convert,
    "quant_quality": quant_quality,
    "round_trip": round_trip,
}


def render(path: Path) -> str:
    """The file's text with every place filled anew."""
    chinese = path.name.endswith("zh-CN.md")

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}{WRITERS[match[2]](chinese)}{match[3]}"

    return PLACE.sub(fill, path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for path in (ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = render(path)
        if text == path.read_text():
            continue
        stale.append(path.name)
        if not check:
            path.write_text(text)
    print(f"{'out of date' if check else 'written'}: {', '.join(stale)}" if stale else "every figure is up to date")
    sys.exit(1 if check and stale else 0)


if __name__ == "__main__":
    main()
