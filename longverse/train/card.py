"""The model card of a run: what was done, with what, at what cost, and what was measured."""

from __future__ import annotations

from pathlib import Path

from longverse.models.adapters import CONFIG
from longverse.models.checkpoint import Loaded
from longverse.models.network import NetworkConfig
from longverse.models.shards import replacing
from longverse.train.config import Recipe, Source
from longverse.train.probe import Figures
from longverse.train.trainer import read_log


def write_card(
    folder: Path,
    *,
    recipe: Recipe,
    loaded: Loaded,
    out: Path,
    original: NetworkConfig,
    shape: NetworkConfig,
    probes: dict[str, Figures],
) -> None:
    """Write README.md into a finished adapter or checkpoint folder. Figures come from the run's log and probes."""
    log = read_log(out / "log.jsonl")
    adapter = (folder / CONFIG).exists()
    lines = ["---"]
    if recipe.licence:
        lines.append(f"license: {recipe.licence.lower()}")
    lines += [f"base_model: {recipe.model}", *(["library_name: peft"] if adapter else []), "---", ""]
    lines += [f"# {recipe.name}", ""]
    what = f"A rank-{recipe.lora.rank} LoRA adapter for" if adapter else "A checkpoint trained from"
    lines += [f"{what} `{recipe.model}`, made by longverse.", ""]
    lines += [
        "| | before | after |",
        "|---|---|---|",
        f"| RoPE | {original.rope.describe()} | {shape.rope.describe()} |",
        f"| window stated | {original.window:,} tokens | {shape.window:,} tokens |",
        "",
    ]
    if adapter:
        lines += _use(shape, original)
    lines += ["## What was done", ""]
    columns = (
        *("stage", "RoPE change", "data", "examples of", "steps", "tokens", "labels", "learning rate"),
        *("loss, first and last tenth", "hours"),
    )
    lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for number, stage in enumerate(recipe.stages):
        own = [line for line in log if line["number"] == number]
        tenth = max(1, len(own) // 10)
        begin = sum(line["loss"] for line in own[:tenth]) / tenth if own else float("nan")
        end = sum(line["loss"] for line in own[-tenth:]) / tenth if own else float("nan")
        cells = [
            stage.name,
            stage.rope or "none",
            "; ".join(_source(source) for source in stage.data),
            f"{stage.min_tokens:,} to {stage.max_tokens:,} tokens",
            f"{len(own):,}",
            f"{sum(line['tokens'] for line in own):,}",
            f"{sum(line['labels'] for line in own):,}",
            f"{stage.learning_rate:g}, {stage.schedule}",
            f"{begin:.3f}, {end:.3f}",
            f"{sum(line['seconds'] for line in own) / 3600:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    weightings = ", ".join(sorted({stage.weighting for stage in recipe.stages}))
    lines += ["", f"Loss weights: {weightings}. Seed {recipe.seed}."]
    if recipe.lora.bits and recipe.method == "lora":
        lines += ["", f"Trained over weights held in {recipe.lora.bits} bits (QLoRA); a merge is made with those."]
    lines += _probed(recipe, probes)
    with replacing(folder / "README.md") as aside:
        aside.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _source(source: Source) -> str:
    return Path(source.label).name


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def _probed(recipe: Recipe, probes: dict[str, Figures]) -> list[str]:
    lines = []
    if any(figures.found for figures in probes.values()):
        lines += [
            "",
            "## Needle probe",
            "",
            f"Share of {recipe.probe.facts} invented facts found by exact attention, greedy, by length in tokens; a"
            " handful of questions, for following a run: measure with `longverse eval needle`.",
            "",
        ]
        lengths = sorted({int(n) for figures in probes.values() for row in figures.found.values() for n in row})
        lines.append("| after stage | language | " + " | ".join(f"{n:,}" for n in lengths) + " |")
        lines.append("|---|---|" + "---|" * len(lengths))
        for stage, figures in probes.items():
            for language, row in figures.found.items():
                cells = [_percent(row.get(str(n))) for n in lengths]
                lines.append(f"| {stage} | {language} | " + " | ".join(cells) + " |")
    if any(figures.loss for figures in probes.values()):
        blocks = next(figures.loss for figures in probes.values() if figures.loss)
        lines += [
            "",
            "## Loss by position",
            "",
            "Nats a token of a held-out text, by the tokens that stand before.",
            "",
        ]
        lines.append("| after stage | " + " | ".join(f"to {end - 1:,}" for _, end, _ in blocks) + " |")
        lines.append("|---|" + "---|" * len(blocks))
        for stage, figures in probes.items():
            lines.append(f"| {stage} | " + " | ".join(f"{nats:.3f}" for *_, nats in figures.loss) + " |")
    return lines


def _use(shape: NetworkConfig, original: NetworkConfig) -> list[str]:
    if shape == original:
        return ["It loads in longverse and in PEFT.", ""]
    lines = ["longverse merges it at load and sets the RoPE plan. With PEFT, set the plan on the base model first:", ""]
    lines += ["```python", "from peft import PeftModel"]
    lines += ["from transformers import AutoConfig, AutoModelForCausalLM", ""]
    lines.append("config = AutoConfig.from_pretrained(BASE)")
    if shape.rope != original.rope:
        lines.append(f"config.rope_parameters = {shape.rope.to_rope_parameters()}")
    window = shape.rope.original_window if shape.rope.kind == "dynamic" else shape.window
    lines += [
        f"config.max_position_embeddings = {window}",
        "model = AutoModelForCausalLM.from_pretrained(BASE, config=config)",
        "model = PeftModel.from_pretrained(model, FOLDER)",
        "```",
        "",
    ]
    return lines
