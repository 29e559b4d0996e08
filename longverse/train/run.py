"""A recipe from beginning to end: load, and for each stage change the RoPE plan, verify it, examine, forecast, train,
probe; then write what came of it.

    OUT/run.json           the recipe as it ran, and what it ran on
    OUT/log.jsonl          a line a step, and a line a probe on the way
    OUT/tensorboard/       the same, where TensorBoard is installed
    OUT/checkpoints/       state to go on from
    OUT/probe-NN-STAGE.json   facts found and loss by position after each stage
    OUT/stages/NN-STAGE/   (keep_stages) what each stage ended with, and its trained weights as they were
    OUT/adapter/           (lora) PEFT's format, our RoPE plan and window, a model card
    OUT/model/             (full, or merged on request) a checkpoint folder

Running the same command again goes on from the newest checkpoint, or does nothing when all is done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longverse.data.lock import FolderLock, disk_errors
from longverse.errors import UserError, expand
from longverse.models.adapters import adapter_chat, read_adapter
from longverse.models.chat import ChatFormat
from longverse.models.checkpoint import (
    Loaded,
    build,
    choose_device,
    choose_dtype,
    open_model,
    stored_dtype,
)
from longverse.models.network import NetworkConfig
from longverse.models.rope import RopePlan
from longverse.train import parallel
from longverse.train.belonging import check_run, find_stages, first_change, take_stages
from longverse.train.board import Board
from longverse.train.config import Recipe, Source, Stage
from longverse.train.doctor import Finding, examine
from longverse.train.examples import Conversations, Examples, Mixture, Texts
from longverse.train.forecast import Forecast, forecast, peak_flops
from longverse.train.forward import LossModel
from longverse.train.lora import add_lora, begin_with
from longverse.train.new import make_model
from longverse.train.parallel import Ranks
from longverse.train.probe import Figures, Prober, has_stopped_growing
from longverse.train.results import write_results
from longverse.train.state import checkpoints, latest, load_state, remove_remnants, save_state
from longverse.train.trainer import Log, StageEnd, StepReport, make_optimizer, read_probes, train_stage


def _ignore(*values: Any) -> None:
    return


@dataclass
class Watch:
    """What a run tells while it runs; every callback may be left out.

    note(text); progress(title, done, total, unit) of loading, tokenising and building; findings(stage, list);
    planned(stage, forecast); step(report); probed(stage, steps, figures), steps being those done of the stage;
    stop() -> True asks for an end with a checkpoint.
    """

    note: Callable[[str], None] = _ignore
    progress: Callable[[str, int, int, str], None] = _ignore
    findings: Callable[[Stage, list[Finding]], None] = _ignore
    planned: Callable[[Stage, Forecast], None] = _ignore
    step: Callable[[StepReport], None] = _ignore
    probed: Callable[[Stage, int, Figures], None] = _ignore
    stop: Callable[[], bool] = lambda: False

    def until_stopped(self, title: str, unit: str) -> Callable[[int, int], None]:
        """An on_progress(done, total) for work that has no other way of being stopped."""

        def tell(done: int, total: int) -> None:
            if self.stop():
                raise KeyboardInterrupt
            self.progress(title, done, total, unit)

        return tell


@dataclass
class Outcome:
    """finished: all stages are done and the result is written. interrupted: a signal ended the run. Neither: only some
    stages were asked for. adapter, model: what was written. probes: figures after each stage by its name."""

    finished: bool
    stage: str
    step: int
    interrupted: bool = False
    adapter: Path | None = None
    model: Path | None = None
    probes: dict[str, Figures] = field(default_factory=dict)


def run_recipe(
    recipe: Recipe,
    out: str | Path,
    *,
    device: str = "auto",
    write_merged: bool = False,
    stages: int | None = None,
    dry: bool = False,
    watch: Watch | None = None,
    stages_from: str | Path | None = None,
) -> Outcome:
    """Run a recipe, or go on with it.

    write_merged  also write OUT/model for a LoRA run
    stages        stop after so many stages
    stages_from   the folder of another run, whose first stages are taken over where the recipes begin alike
    dry           load, examine and forecast the first stage only
    Raises UserError for whatever the user can mend.
    """
    out, watch = expand(out), watch or Watch()
    if recipe.lora.bits and parallel.world_size() > 1:
        raise UserError("LoRA over 4 bits runs in one process: start it without torchrun, or leave lora.bits out.")
    if recipe.new is not None and not (Path(recipe.model) / "config.json").exists():
        watch.note(f"{recipe.model} is not there: it is made, tokenizer and random weights.")
        make_model(recipe.new, Path(recipe.model), recipe.seed)
    loaded = load_for_training(recipe, device, watch.until_stopped("Loading", "bytes"))
    ranks = parallel.start(loaded.network.config, recipe.sequence, loaded.network.device)
    for text in loaded.notes:
        watch.note(text)
    parallel.check_shared(out, ranks)
    run = _Run(recipe, out, loaded, ranks, watch, write_merged, expand(stages_from) if stages_from else None)
    if ranks.rank:
        return run.all_stages(stages, dry)
    with FolderLock(out), disk_errors(out):
        return run.all_stages(stages, dry)


@dataclass
class _Run:
    """One run of a recipe in this process."""

    recipe: Recipe
    out: Path
    loaded: Loaded
    ranks: Ranks
    watch: Watch
    write_merged: bool
    stages_from: Path | None
    probes: dict[str, Figures] = field(default_factory=dict)

    def all_stages(self, stages: int | None, dry: bool) -> Outcome:
        recipe, loaded, ranks, watch, out = self.recipe, self.loaded, self.ranks, self.watch, self.out
        network = loaded.network
        self.original = network.config
        with ranks.leader_first():
            if self.stages_from is not None and ranks.rank == 0:
                taken = find_stages(recipe, loaded, out, self.stages_from)
                if taken is not None:
                    watch.note(f"{'To be taken' if dry else 'Taken'} over: {taken}.")
                    if not dry:
                        take_stages(taken, recipe, loaded, out)
            check_run(recipe, out, loaded, write=ranks.rank == 0 and not dry)
            if recipe.lora.start is not None:  # what is not there is said before data is built
                read_adapter(Path(recipe.lora.start))
            found = latest(out / "checkpoints")
            state: dict[str, Any] = found[1] if found is not None else {"stage": [0, ""], "step": 0}
            at_stage, at_step = state["stage"][0], state["step"]
            for stage in recipe.stages[at_stage:]:  # what cannot be built is said before hours of training, not after
                for source in stage.data:
                    build_data(source, watch)
        prepare(network, recipe)
        # Frozen bfloat16 weights under LoRA need no autocast; float32 weights that are trained in bfloat16 do.
        products = precision(recipe, network.device)
        whole = recipe.method == "full" or bool(recipe.lora.also)
        self.model = LossModel(network, autocast=whole and products == torch.bfloat16)
        self.peak = peak_flops(network.device, products)
        parallel.shard(self.model, network, ranks, self.model.autocast)
        if found is not None:
            watch.note(f"Going on after step {at_step} of stage {state['stage'][1]}.")
        self.log = Log(out / "log.jsonl")
        if ranks.rank == 0 and not dry:
            remove_remnants(out / "checkpoints")
            self.log.forget((at_stage, at_step))
        self.board = Board(out / "tensorboard", recipe, (at_stage, at_step)) if not (ranks.rank or dry) else None
        self.prober = Prober(recipe.probe, loaded, watch.stop) if recipe.probe and not dry else None
        if self.prober is not None and ranks.world > 1:
            watch.note("Probes need the whole network on one rank: with several there are none.")
            self.prober = None
        last = len(recipe.stages) if stages is None else min(stages, len(recipe.stages))
        step = 0
        for number, stage in enumerate(recipe.stages[:last]):
            change_rope(loaded, stage)
            step = at_step if number == at_stage else stage.steps if number < at_stage else 0
            early = number == at_stage and bool(state.get("early"))
            resumed = found is not None and number == at_stage
            if resumed or number == 0 or number > at_stage:
                optimizer = make_optimizer(self.model, recipe)
            if resumed:
                assert found is not None
                load_state(found[0], network, optimizer, step)
            if step < stage.steps and not early:
                end = self._train(number, stage, optimizer, step, state.get("data") if resumed else None, dry)
                if dry or end.interrupted:
                    return self._end(Outcome(False, stage.name, end.steps, not dry, probes=self.probes))
                step, early = end.steps, end.early
            state_window(loaded, stage, self.original)
            if not self._probe_after(number, stage, step, trained_here=number >= at_stage):
                return self._end(Outcome(False, stage.name, step, interrupted=True, probes=self.probes))
            here = out / "stages" / f"{number:02d}-{stage.name}"
            if recipe.keep_stages and not dry and number >= at_stage and not checkpoints(here):
                self._write(here, number + 1, write_merged=False)
                ended = {"step": step, "fingerprint": recipe.fingerprint(), "early": early}
                save_state(here, (number, stage.name), network, None, ended, rank=ranks.rank)
        outcome = Outcome(last == len(recipe.stages), recipe.stages[last - 1].name, step, probes=self.probes)
        if outcome.finished and not dry:
            outcome.adapter, outcome.model = self._write(out, last, self.write_merged)
        return self._end(outcome)

    def _train(
        self,
        number: int,
        stage: Stage,
        optimizer: torch.optim.Optimizer,
        first: int,
        data: list[str] | None,
        dry: bool,
    ) -> StageEnd:
        """Examine, forecast and train a stage from step `first` on. data: what it was trained on so far."""
        recipe, ranks, watch = self.recipe, self.ranks, self.watch
        with ranks.leader_first():
            mixture = open_mixture(recipe, stage, self.loaded, self.out, watch)
        if data is not None and data != mixture.identities():
            raise UserError(
                f"The data of stage {stage.name} is not what this run was trained on up to step {first}"
                f" ({first_change(data, mixture.identities())}): put it back, or give another --out."
            )
        self._examine(mixture, stage)
        watch.planned(stage, forecast(self.model, mixture, stage, recipe, ranks))
        if dry:
            return StageEnd(first, False, None)
        end = train_stage(
            self.model,
            optimizer,
            mixture,
            stage,
            recipe,
            self.out,
            number=number,
            first_step=first,
            ranks=ranks,
            on_step=lambda report: self._step(number, report),
            follow=self._follower(number, stage),
            stop=watch.stop,
            state={"data": mixture.identities()},
            peak_flops=self.peak,
        )
        if end.early:
            watch.note(f"Stage {stage.name} ends after step {end.steps}: its window has stopped growing.")
        return end

    def _probe_after(self, number: int, stage: Stage, step: int, trained_here: bool) -> bool:
        """Measure a finished stage. Of one before the checkpoint's (not trained_here) the weights are gone: its figures
        are those of the file, or none. False when a signal cut it off."""
        place = self.out / f"probe-{number:02d}-{stage.name}.json"
        new = not place.exists()
        if self.prober is None or (new and not trained_here):
            return True
        figures = self.prober.after_stage(place)
        if figures is None:
            return False
        self.probes[stage.name] = figures
        if new:
            self.watch.probed(stage, step, figures)
            if self.board is not None:
                self.board.probe(number, step, figures)
        return True

    def _end(self, outcome: Outcome) -> Outcome:
        if self.board is not None:
            self.board.close()
        return outcome

    def _step(self, number: int, report: StepReport) -> None:
        if self.board is not None:
            self.board.step(number, report)
        self.watch.step(report)

    def _follower(self, number: int, stage: Stage) -> Callable[[int], bool] | None:
        """What the trainer asks before each step: measures when a probe is due, says whether the stage is to end. What
        was measured is in the log, so that a run that goes on decides as one that was never stopped."""
        plan, prober = self.recipe.probe, self.prober
        if prober is None or not plan.every:
            return None
        lines = [line for line in read_probes(self.log.path) if line["number"] == number]
        windows = {int(line["step"]): int(line["probe"]["window"]) for line in lines}

        def follow(step: int) -> bool:
            if step == 0 or step % plan.every:
                return False
            if step not in windows:
                if (measured := prober.measure()) is None:
                    return False  # stopped meanwhile: it is made up for when the run goes on
                figures = measured[0]
                windows[step] = figures.window
                self.log.write({"number": number, "stage": stage.name, "step": step, "probe": asdict(figures)})
                if self.board is not None:
                    self.board.probe(number, step, figures)
                self.watch.probed(stage, step, figures)
            past = [windows[at] for at in sorted(windows) if at <= step]
            return has_stopped_growing(past, plan.patience)

        return follow

    def _examine(self, mixture: Mixture, stage: Stage) -> None:
        findings = examine(self.model, mixture.step(0), self.original.rope, self.loaded.tokenizer.eos_ids, self.ranks)
        self.watch.findings(stage, findings)
        for finding in findings:
            if not finding.passed:
                raise UserError(
                    f"Stage {stage.name} was not begun, a check of it failed ({finding.name}: {finding.detail}): look"
                    " at the data and the recipe's rope."
                )

    def _write(self, place: Path, stages: int, write_merged: bool) -> tuple[Path | None, Path | None]:
        """The result of the first `stages` stages."""
        taught = self.loaded.chat.kind == "xverse" and (
            self.recipe.has_conversations(stages) or _starts_as_chat(self.recipe)
        )
        if write_merged and (place / "model").exists():
            self.watch.note(f"{place / 'model'} is there already and stays as it is.")
        return write_results(
            self.recipe,
            self.loaded,
            self.out,
            place,
            self.ranks,
            self.original,
            self.probes,
            write_merged=write_merged,
            taught=taught,
        )


# ---- before the first step ----------------------------------------------------------------------------


def precision(recipe: Recipe, device: torch.device) -> torch.dtype:
    """The number type of products."""
    if recipe.precision == "auto":
        return choose_dtype("auto", device, torch.bfloat16)[0]
    return torch.bfloat16 if recipe.precision == "bf16" else torch.float32


def load_for_training(recipe: Recipe, device: str, on_progress: Callable[[int, int], None] | None = None) -> Loaded:
    """The model with weights in the type they are kept in while training: float32 where they are trained, else that of
    the products. Quantised weights stay as they are, and only LoRA can train on them (UserError otherwise)."""
    place = parallel.own_device(choose_device(device))
    number = torch.float32 if recipe.method == "full" else precision(recipe, place)
    opened = open_model(recipe.model, on_progress)
    if opened.form is not None and recipe.method == "full":
        raise UserError(
            f"{opened.name} is quantised, and only a model in bf16 or float32 can be trained in full: take that one, or"
            " write method: lora."
        )
    if opened.form is not None and parallel.world_size() > 1:
        raise UserError(f"{opened.name} is quantised, which is trained in one process: start it without torchrun.")
    shape = NetworkConfig.from_dict(opened.config)
    network = build(shape, opened.tensors, number, place, opened.form, on_progress)
    notes = list(opened.notes)
    if (stored := stored_dtype(opened.tensors.infos)) != number:
        notes.append(f"The file's {stored} weights are held as {number}.".replace("torch.", ""))
    chat = opened.chat()
    if opened.continues_text and (recipe.has_conversations(len(recipe.stages)) or _starts_as_chat(recipe)):
        chat = ChatFormat("xverse", opened.tokenizer)
        notes.append(f"{opened.name} is a base model: it learns conversations in the format of XVERSE's chat models.")
    return Loaded(opened.name, network, opened.tokenizer, chat, opened.config, opened.path, notes)


def _starts_as_chat(recipe: Recipe) -> bool:
    return recipe.lora.start is not None and adapter_chat(Path(recipe.lora.start)) == "xverse"


def prepare(network: nn.Module, recipe: Recipe) -> None:
    """Make the weights that a recipe trains trainable; weights mapped from a file are copied first."""
    if recipe.method == "lora":
        add_lora(network, recipe.lora, recipe.seed)  # type: ignore[arg-type]
        if recipe.lora.start is not None:
            begin_with(network, Path(recipe.lora.start))  # type: ignore[arg-type]
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
            opened: Any = Conversations.open(
                source.messages,
                loaded.tokenizer,
                loaded.chat,
                min_tokens=stage.min_tokens,
                max_tokens=stage.max_tokens,
                first=source.first,
                cache=out / "tokens",
                on_progress=watch.until_stopped(f"Tokenising {Path(source.messages).name}", "bytes"),
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
                source.facts,
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
            watch.progress("Building", done, total, "items")

        build_sft(settings, config.parent, on_progress=count, cancelled=watch.stop)
    else:
        from longverse.data.corpus import build_corpus, load_corpus_config

        build_corpus(load_corpus_config(config), config.parent, cancelled=watch.stop)
    if watch.stop():
        raise KeyboardInterrupt
    if not place.exists():
        raise UserError(f"{config} does not make {place}: the recipe and the configuration's 'out' must agree.")
