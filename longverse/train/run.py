"""A recipe from beginning to end: load, and for each stage change the RoPE plan, verify it, examine, forecast, train,
probe; then write what came of it.

    OUT/run.json           the recipe as it ran, and what it ran on
    OUT/log.jsonl          a line a step
    OUT/checkpoints/       state to go on from
    OUT/probe-NN-STAGE.json   needle figures after each stage
    OUT/stages/NN-STAGE/   (keep_stages) what each stage ended with
    OUT/adapter/           (lora) PEFT's format, our RoPE plan and window, a model card
    OUT/model/             (full, or merged on request) a checkpoint folder

Running the same command again goes on from the newest checkpoint, or does nothing when all is done.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longverse.data.lock import FolderLock, disk_errors
from longverse.data.vocabulary import fingerprint
from longverse.errors import UserError
from longverse.models.checkpoint import (
    Loaded,
    build,
    choose_device,
    choose_dtype,
    load,
    open_model,
    stored_dtype,
)
from longverse.models.network import NetworkConfig
from longverse.models.rope import RopePlan
from longverse.models.shards import read_json, write_json
from longverse.train import parallel
from longverse.train.card import write_card
from longverse.train.config import Recipe, Source, Stage
from longverse.train.doctor import Finding, examine
from longverse.train.examples import Conversations, Examples, Mixture, Texts
from longverse.train.forecast import Forecast, forecast
from longverse.train.forward import LossModel
from longverse.train.lora import add_lora, lora_layers, merge, merged, save_adapter
from longverse.train.new import make_model
from longverse.train.parallel import Ranks
from longverse.train.state import latest, load_state
from longverse.train.trainer import StepReport, make_optimizer, train_stage


def _ignore(*values: Any) -> None:
    return


@dataclass
class Watch:
    """What a run tells while it runs; every callback may be left out.

    note(text); progress(title, done, total) of loading and tokenising; findings(stage, list); planned(stage, forecast);
    step(report); probed(stage, figures); stop() -> True asks for an end with a checkpoint.
    """

    note: Callable[[str], None] = _ignore
    progress: Callable[[str, int, int], None] = _ignore
    findings: Callable[[Stage, list[Finding]], None] = _ignore
    planned: Callable[[Stage, Forecast], None] = _ignore
    step: Callable[[StepReport], None] = _ignore
    probed: Callable[[Stage, dict[str, Any]], None] = _ignore
    stop: Callable[[], bool] = lambda: False


@dataclass
class Outcome:
    """finished: False when a signal ended the run; adapter, model: what was written."""

    finished: bool
    stage: str
    step: int
    adapter: Path | None = None
    model: Path | None = None
    probes: dict[str, dict[str, Any]] = field(default_factory=dict)


def run_recipe(
    recipe: Recipe,
    out: str | Path,
    *,
    device: str = "auto",
    shipped: bool = False,
    write_merged: bool = False,
    stages: int | None = None,
    dry: bool = False,
    watch: Watch | None = None,
) -> Outcome:
    """Run a recipe, or go on with it.

    shipped       begin from an embedded model together with the adapter that comes with it (finetune); else from the
                  plain model (extend)
    write_merged  also write OUT/model for a LoRA run
    stages        stop after so many stages
    dry           load, examine and forecast the first stage only
    Raises UserError for whatever the user can mend.
    """
    out, watch = Path(out).expanduser(), watch or Watch()
    if recipe.new is not None and not (Path(recipe.model) / "config.json").exists():
        watch.note(f"{recipe.model} is not there: it is made, tokenizer and random weights.")
        make_model(recipe.new, Path(recipe.model), recipe.seed)
    loaded = load_for_training(recipe, device, shipped, lambda done, total: watch.progress("Loading", done, total))
    ranks = parallel.start(loaded.network.config, recipe.sequence, loaded.network.device)
    for text in loaded.notes:
        watch.note(text)
    if ranks.rank:
        return _run(recipe, out, loaded, ranks, write_merged, stages, dry, watch)
    with FolderLock(out), disk_errors(out):
        return _run(recipe, out, loaded, ranks, write_merged, stages, dry, watch)


def _run(
    recipe: Recipe,
    out: Path,
    loaded: Loaded,
    ranks: Ranks,
    write_merged: bool,
    stages: int | None,
    dry: bool,
    watch: Watch,
) -> Outcome:
    network = loaded.network
    original = network.config
    with ranks.leader_first():
        check_run(recipe, out, loaded, ranks)
        for stage in recipe.stages:  # what cannot be built is said before hours of training, not after
            for source in stage.data:
                build_data(source, watch)
    prepare(network, recipe)
    # Frozen bfloat16 weights under LoRA need no autocast; float32 weights that are trained in bfloat16 do.
    whole = recipe.method == "full" or bool(recipe.lora.also)
    model = LossModel(network, autocast=whole and precision(recipe, network.device) == torch.bfloat16)
    parallel.shard(model, network, ranks, model.autocast)
    found = latest(out / "checkpoints")
    at_stage, at_step = (found[1]["stage"][0], found[1]["step"]) if found is not None else (0, 0)
    if found is not None:
        watch.note(f"Going on after step {at_step} of stage {found[1]['stage'][1]}.")
    probes: dict[str, dict[str, Any]] = {}
    last = len(recipe.stages) if stages is None else min(stages, len(recipe.stages))
    for number, stage in enumerate(recipe.stages[:last]):
        change_rope(loaded, stage)
        first = at_step if number == at_stage else stage.steps if number < at_stage else 0
        if found is not None and number == at_stage:
            optimizer = make_optimizer(model, recipe)
            load_state(found[0], network, optimizer, first)
        elif number == 0 or number > at_stage:
            optimizer = make_optimizer(model, recipe)
        if first < stage.steps:
            with ranks.leader_first():
                mixture = open_mixture(recipe, stage, loaded, out, watch)
            _examine(model, mixture, stage, original.rope, loaded, ranks, watch)
            watch.planned(stage, forecast(model, mixture, stage, recipe, ranks))
            if dry:
                return Outcome(False, stage.name, first)
            end = train_stage(
                model,
                optimizer,
                mixture,
                stage,
                recipe,
                out,
                number=number,
                first_step=first,
                ranks=ranks,
                on_step=watch.step,
                stop=watch.stop,
            )
            if end.interrupted:
                return Outcome(False, stage.name, end.steps, probes=probes)
        state_window(loaded, stage, original)
        place = out / f"probe-{number:02d}-{stage.name}.json"
        # Of a stage before the checkpoint's the weights are gone: its figures are those of the file, or none.
        if recipe.probe.lengths and ranks.world == 1 and (number >= at_stage or place.exists()):
            probes[stage.name] = probe(recipe, loaded, place)
            watch.probed(stage, probes[stage.name])
        here = out / "stages" / f"{number:02d}-{stage.name}"
        if recipe.keep_stages and number >= at_stage and not here.exists():
            write_results(recipe, loaded, out, here, ranks, original, probes, False, watch)
    if last < len(recipe.stages):
        return Outcome(False, recipe.stages[last - 1].name, recipe.stages[last - 1].steps, probes=probes)
    return write_results(recipe, loaded, out, out, ranks, original, probes, write_merged, watch)


# ---- before the first step ----------------------------------------------------------------------------


def precision(recipe: Recipe, device: torch.device) -> torch.dtype:
    """The number type of products."""
    if recipe.precision == "auto":
        return choose_dtype("auto", device, torch.bfloat16)[0]
    return torch.bfloat16 if recipe.precision == "bf16" else torch.float32


def load_for_training(
    recipe: Recipe, device: str, shipped: bool, on_progress: Callable[[int, int], None] | None = None
) -> Loaded:
    """The model with weights in the type they are kept in while training: float32 where they are trained, else that of
    the products. Raises UserError for a quantised model."""
    place = choose_device(device)
    number = torch.float32 if recipe.method == "full" else precision(recipe, place)
    if shipped:
        dtype = "float32" if number == torch.float32 else "bfloat16"
        return load(recipe.model, dtype=dtype, device=device, on_progress=on_progress)
    opened = open_model(recipe.model, on_progress)
    if opened.form is not None:
        raise UserError(
            f"{opened.name} is quantised, and only a model in bf16 or float32 can be trained: take that one."
        )
    network = build(NetworkConfig.from_dict(opened.config), opened.tensors, number, place, None, on_progress)
    notes = list(opened.notes)
    if (stored := stored_dtype(opened.tensors.infos)) != number:
        notes.append(f"The file's {stored} weights are held as {number}.".replace("torch.", ""))
    return Loaded(opened.name, network, opened.tokenizer, opened.chat(), opened.config, opened.path, notes)


def check_run(recipe: Recipe, out: Path, loaded: Loaded, ranks: Ranks) -> None:
    """Write OUT/run.json, or compare with the one there: a folder belongs to one recipe and one model."""
    mine = {
        "fingerprint": recipe.fingerprint(),
        "model": loaded.name,
        "tokenizer": fingerprint(loaded.tokenizer),
        "shape": {key: value for key, value in asdict(loaded.network.config).items() if key not in ("rope", "window")},
        "recipe": recipe.to_dict(),
    }
    path = out / "run.json"
    if path.exists():
        theirs = read_json(path)
        remedy = f"give another --out, or delete {out} to begin anew"
        if (theirs.get("tokenizer"), theirs.get("shape")) != (mine["tokenizer"], mine["shape"]):
            raise UserError(f"{out} holds a run of another model ({theirs.get('model')}): {remedy}.")
        if theirs.get("fingerprint") != mine["fingerprint"]:
            change = _first_change(theirs.get("recipe", {}), json.loads(json.dumps(mine["recipe"])))
            raise UserError(f"{out} holds a run of another recipe ({change}): {remedy}.")
    if ranks.rank == 0:
        write_json(path, mine)


def _first_change(old: Any, new: Any, where: str = "") -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in new:
            if old.get(key) != new[key]:
                return _first_change(old.get(key), new[key], f"{where}.{key}" if where else str(key))
    if isinstance(old, list) and isinstance(new, list):
        for n, (a, b) in enumerate(zip(old, new, strict=False)):
            if a != b:
                return _first_change(a, b, f"{where}[{n}]")
        if len(old) != len(new):
            return f"{where}: {len(old)} then, {len(new)} now"
    return f"{where}: {old} then, {new} now"


def prepare(network: nn.Module, recipe: Recipe) -> None:
    """Make the weights that a recipe trains trainable; weights mapped from a file are copied first."""
    if recipe.method == "lora":
        add_lora(network, recipe.lora, recipe.seed)  # type: ignore[arg-type]
        return
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().clone()))
    network.tie()  # type: ignore[operator]


def change_rope(loaded: Loaded, stage: Stage) -> None:
    """Put a stage's RoPE plan into the live network and verify it there, at several planned lengths."""
    network = loaded.network
    if stage.rope is not None:
        shape = network.config
        plan = RopePlan.parse(stage.rope, shape.rope, shape.window)
        network.config = replace(shape, rope=plan)
        network.model.rotary.plan = plan
    for length in (1, stage.max_tokens, 4 * stage.max_tokens):
        network.config.rope.verify(network, length)


def state_window(loaded: Loaded, stage: Stage, original: NetworkConfig) -> None:
    """The window the network states from now on."""
    network = loaded.network
    window = stage.window or max(original.window, network.config.window, stage.max_tokens)
    network.config = replace(network.config, window=window)


def open_mixture(recipe: Recipe, stage: Stage, loaded: Loaded, out: Path, watch: Watch) -> Mixture:
    """The stage's sources, tokenised (conversations once; the result is kept in OUT/tokens)."""
    sources: list[Examples] = []
    for source in stage.data:
        if source.messages is not None:
            title = f"Tokenising {Path(source.messages).name}"

            def say(done: int, total: int, title: str = title) -> None:
                watch.progress(title, done, total)

            opened: Any = Conversations.open(
                source.messages,
                loaded.tokenizer,
                loaded.chat,
                min_tokens=stage.min_tokens,
                max_tokens=stage.max_tokens,
                cache=out / "tokens",
                on_progress=say,
            )
            for why, count in opened.left_out.items():
                limit = stage.max_tokens if why == "longer" else stage.min_tokens
                watch.note(f"{opened.label}: {count:,} conversations {why} than {limit:,} tokens are left out.")
        elif source.store is not None:
            opened = Texts.open(
                source.store, loaded.tokenizer, sequence=stage.max_tokens, keep=source.keep, seed=recipe.seed
            )
        else:
            from longverse.train.made import Made

            assert source.made is not None
            opened = Made(
                source.made,
                loaded.tokenizer,
                loaded.chat,
                stage.min_tokens,
                stage.max_tokens,
                recipe.seed,
                source.texts,
            )
        sources.append(opened)
    # Each stage draws its own order: two stages over one file do not see it alike.
    seed = recipe.seed * 1000 + [s.name for s in recipe.stages].index(stage.name)
    return Mixture(sources, [source.weight for source in stage.data], stage.steps, stage.batch, seed)


def build_data(source: Source, watch: Watch) -> None:
    """Make a source that is absent and says what makes it; a build that was stopped goes on."""
    place = Path(source.messages) if source.messages else Path(source.store or "") / "store.json"
    if source.build is None or place.exists():
        return
    config = Path(source.build)
    watch.note(f"{place} is not there: it is built by {config.name}.")
    if source.messages is not None:
        from longverse.data.long_sft.builder import build_sft
        from longverse.data.long_sft.plan import load_sft_config

        settings = load_sft_config(config)
        if settings.teacher is not None:
            raise UserError(
                f"{config} asks an endpoint, which may cost money: run `longverse data sft {config}` first."
            )

        def count(done: int, total: int) -> None:
            watch.progress("Building items", done, total)

        build_sft(settings, config.parent, on_progress=count, cancelled=watch.stop)
    else:
        from longverse.data.corpus import build_corpus, load_corpus_config

        build_corpus(load_corpus_config(config), config.parent, cancelled=watch.stop)
    if watch.stop():
        raise KeyboardInterrupt
    if not place.exists():
        raise UserError(f"{config} does not make {place}: the recipe and the configuration's 'out' must agree.")


def _examine(
    model: LossModel, mixture: Mixture, stage: Stage, before: RopePlan, loaded: Loaded, ranks: Ranks, watch: Watch
) -> None:
    findings = examine(model, mixture.step(0), before, loaded.tokenizer.eos_ids, ranks)
    watch.findings(stage, findings)
    for finding in findings:
        if not finding.passed:
            raise UserError(
                f"Stage {stage.name} was not begun, a check of it failed ({finding.name}: {finding.detail}): look at"
                " the data and the recipe's rope."
            )


# ---- after a stage, and after the last ------------------------------------------------------------------


def probe(recipe: Recipe, loaded: Loaded, path: Path) -> dict[str, Any]:
    """Needle figures of the network as it stands: share of facts found by language and length. A finished probe is read
    from its file."""
    if path.exists():
        return dict(read_json(path)["found"])
    from longverse.evaluation.engine_backend import EngineBackend
    from longverse.evaluation.needle import NeedleSettings, run_needle
    from longverse.inference.engine import Engine

    plan, network = recipe.probe, loaded.network
    training = network.training
    network.eval()
    try:
        with merged(network):
            engine = Engine(network, loaded.tokenizer, loaded.chat, loaded.name, loaded.config, window=1 << 24)
            languages = ("en", "zh") if plan.chinese else ("en",)
            each = max(1, plan.facts // len(languages))
            depths = tuple((n + 0.5) / each for n in range(each))
            settings = NeedleSettings(tuple(sorted(plan.lengths)), depths, languages, repeats=1)
            result = run_needle(EngineBackend(engine), settings)
    finally:
        network.train(training)
    found: dict[str, Any] = {}
    for language in languages:
        grid = result.grid(language)
        columns = [[row[n] for row in grid if row[n] is not None] for n in range(len(settings.lengths))]
        found[language] = {
            str(length): sum(column) / len(column) if column else None  # type: ignore[arg-type]
            for length, column in zip(settings.lengths, columns, strict=True)
        }
    write_json(path, {"found": found, "result": result.to_dict()})
    return found


def config_after(loaded: Loaded) -> dict[str, Any]:
    """The config.json of the trained model: the old one with the RoPE plan and the window spelt out."""
    shape = loaded.network.config
    config = {key: value for key, value in loaded.config.items() if key not in ("rope_theta", "rope_scaling")}
    return config | rope_entries(shape.rope, shape.window)


def rope_entries(plan: RopePlan, window: int) -> dict[str, Any]:
    """The entries of a config.json that a RoPE plan and a window need."""
    entries: dict[str, Any] = {"rope_parameters": plan.to_rope_parameters(), "max_position_embeddings": window}
    if plan.kind == "dynamic":
        entries |= {"max_position_embeddings": plan.original_window, "context_window": window}
    return entries


def write_results(
    recipe: Recipe,
    loaded: Loaded,
    out: Path,
    place: Path,
    ranks: Ranks,
    original: NetworkConfig,
    probes: dict[str, dict[str, Any]],
    write_merged: bool,
    watch: Watch,
) -> Outcome:
    """Write PLACE/adapter or PLACE/model, each with a model card. Sharded weights are gathered by every rank."""
    network = loaded.network
    outcome = Outcome(True, recipe.stages[-1].name, recipe.stages[-1].steps, probes=probes)
    shape = network.config
    if ranks.world > 1:
        network = _gathered(loaded, recipe)
        if ranks.rank:
            return outcome
    card: dict[str, Any] = {
        "recipe": recipe,
        "loaded": loaded,
        "out": out,
        "original": original,
        "shape": shape,
        "probes": probes,
    }
    if recipe.method == "lora":
        outcome.adapter = place / "adapter"
        settings = rope_entries(shape.rope, shape.window) if shape != original else None
        save_adapter(network, recipe.lora, outcome.adapter, base=recipe.model, settings=settings, dtype=torch.bfloat16)
        write_card(outcome.adapter, **card)
    if recipe.method == "full" or write_merged:
        outcome.model = place / "model"
        place.mkdir(parents=True, exist_ok=True)
        if outcome.model.exists():
            watch.note(f"{outcome.model} is there already and stays as it is.")
            return outcome
        if recipe.method == "lora":
            network = copy.deepcopy(network)
            merge(network)
        _write_model(recipe, loaded, network, outcome.model)
        write_card(outcome.model, **card)
    return outcome


def _gathered(loaded: Loaded, recipe: Recipe) -> Any:
    """A network on the CPU with whole weights, for writing."""
    from longverse.models.network import CausalLM

    with torch.device("meta"):
        network = CausalLM(loaded.network.config)
    if recipe.method == "lora":
        add_lora(network.to_empty(device="cpu"), recipe.lora)
    state = {name: parallel.whole(tensor).cpu() for name, tensor in loaded.network.state_dict().items()}
    network.load_state_dict(state, assign=True)
    for name, layer in lora_layers(network).items():
        assert layer.lora_A.shape[0] == recipe.lora.rank, name
    network.tie()
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(dict(loaded.network.named_parameters())[name].requires_grad)
    return network


def _write_model(recipe: Recipe, loaded: Loaded, network: Any, target: Path) -> None:
    from longverse.models.convert import SHARD_BYTES, write_folder
    from longverse.models.shards import TensorInfo

    opened = open_model(recipe.model)
    number = stored_dtype(opened.tensors.infos)
    if number == torch.float16:
        number = torch.bfloat16  # trained weights may lie outside of its range
    shapes = network.config.parameter_shapes()
    tensors = {name: tensor for name, tensor in network.state_dict().items() if name in shapes}
    infos = {name: TensorInfo(tuple(tensor.shape), number) for name, tensor in tensors.items()}
    config = config_after(loaded) | {"dtype": str(number).removeprefix("torch.")}
    write_folder(opened, target, config, network.config, infos, iter(tensors.items()), [], SHARD_BYTES, None, None)
