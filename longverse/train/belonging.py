"""What a run's folder belongs to, and finished stages taken over from another run.

A folder in which something was trained belongs to one recipe and one model (OUT/run.json). When only later stages of a
recipe change, the first ones need not be trained again: a run with `keep_stages` holds the trained weights with which
each of its stages ended, and a new run begins there. As every stage begins with a fresh optimizer and draws its own
order of examples, the new run is, bit for bit on one CPU, the one that would have trained them itself.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longverse.data.config import build
from longverse.data.vocabulary import fingerprint
from longverse.errors import UserError
from longverse.models.checkpoint import Loaded
from longverse.models.shards import read_json, replacing, write_json
from longverse.train.config import Recipe
from longverse.train.state import checkpoints
from longverse.train.trainer import lines_before

ASIDE = ".taken"  # in OUT, while stages are being copied


def describe_run(recipe: Recipe, loaded: Loaded) -> dict[str, Any]:
    """What OUT/run.json says; `taken` is added where stages were taken over."""
    from longverse.evaluation.engine_backend import fingerprint as weights_of

    return {
        "fingerprint": recipe.fingerprint(),
        "model": loaded.name,
        "weights": weights_of(loaded.network),
        "tokenizer": fingerprint(loaded.tokenizer),
        "shape": {key: value for key, value in asdict(loaded.network.config).items() if key not in ("rope", "window")},
        "recipe": recipe.to_dict(),
    }


def check_run(recipe: Recipe, out: Path, loaded: Loaded, write: bool) -> None:
    """Compare with the OUT/run.json of what was trained there (UserError), or write it where asked."""
    mine, path = describe_run(recipe, loaded), out / "run.json"
    if path.exists() and checkpoints(out / "checkpoints"):
        remedy = f"give another --out, or delete {out} to begin anew"
        theirs = read_json(path)
        _check_model(mine, theirs, out, remedy)
        if theirs.get("fingerprint") != mine["fingerprint"] and (change := _difference(theirs, recipe)):
            raise UserError(
                f"{out} holds a run of another recipe ({change}): {remedy}; another --out with --stages-from {out}"
                " takes over the stages before the first change."
            )
        mine |= {"taken": theirs["taken"]} if "taken" in theirs else {}
    if write:
        write_json(path, mine)


def _difference(theirs: dict[str, Any], recipe: Recipe) -> str:
    """Where the recipe of a run.json trains otherwise than `recipe`; empty where only keys are new since, and are as
    they were before."""
    new = json.loads(json.dumps(recipe.what_counts()))
    old = {key: value for key, value in theirs.get("recipe", {}).items() if key in new}
    with suppress(UserError):
        old = json.loads(json.dumps(build(Recipe, theirs.get("recipe", {}), "run.json").what_counts()))
        if old == new:
            return ""
    return first_change(old, new)


def _check_model(mine: dict[str, Any], theirs: dict[str, Any], place: Path, remedy: str) -> None:
    if (theirs.get("tokenizer"), theirs.get("shape")) != (mine["tokenizer"], mine["shape"]):
        raise UserError(f"{place} holds a run of another model ({theirs.get('model')}): {remedy}.")
    if theirs.get("weights", mine["weights"]) != mine["weights"]:
        raise UserError(f"{place} holds a run that began with other weights of {theirs.get('model')}: {remedy}.")


def first_change(old: Any, new: Any, where: str = "") -> str:
    """Where two recipes, as plain values, differ first, and how."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in new:
            if old.get(key) != new[key]:
                return first_change(old.get(key), new[key], f"{where}.{key}" if where else str(key))
    if isinstance(old, list) and isinstance(new, list):
        for n, (a, b) in enumerate(zip(old, new, strict=False)):
            if a != b:
                return first_change(a, b, f"{where}[{n}]")
        if len(old) != len(new):
            return f"{where}: {len(old)} then, {len(new)} now"
    return f"{where}: {old} then, {new} now"


# ---- stages of another run ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Taken:
    """The first stages of the run in `old` that a recipe shares with it, as folder names (00-cpt), and the checkpoint
    with which the last of them ended."""

    old: Path
    names: tuple[str, ...]
    end: Path

    def __str__(self) -> str:
        return f"{', '.join(name.split('-', 1)[1] for name in self.names)} from {self.old}"


def find_stages(recipe: Recipe, loaded: Loaded, out: Path, old: Path) -> Taken | None:
    """What can be taken over, up to the last shared stage whose end was kept. None where OUT is a run that took stages
    over already. What they were trained on is not compared again. Raises UserError where nothing can be taken."""
    leave = "leave out --stages-from"
    if checkpoints(out / "checkpoints"):
        if (out / "run.json").exists() and "taken" in read_json(out / "run.json"):
            return None
        raise UserError(
            f"{out} holds a run of its own, into which no stages can be taken: give another --out, or {leave}."
        )
    if not (old / "run.json").exists():
        raise UserError(f"{old} is no folder of a run: --stages-from takes the --out of another one.")
    if out.exists() and out.samefile(old):
        raise UserError(f"{out} cannot take stages over from itself: give another --out.")
    if (out / "stages").exists():
        raise UserError(f"{out} holds stages of a run whose checkpoints are gone: give another --out, or delete it.")
    theirs = read_json(old / "run.json")
    _check_model(describe_run(recipe, loaded), theirs, old, leave)
    other = build(Recipe, theirs.get("recipe", {}), str(old / "run.json"))
    shared = shared_stages(other, recipe)
    if not shared:
        one, two = (json.loads(json.dumps(each.first_stages(1).what_counts())) for each in (other, recipe))
        change = first_change(one, two, "") if one != two else "stages[0].window"
        raise UserError(f"No stage of {old} can be taken over, its recipe begins otherwise ({change}): {leave}.")
    names = [f"{n:02d}-{stage.name}" for n, stage in enumerate(recipe.stages[:shared])]
    kept = [n for n, name in enumerate(names) if checkpoints(old / "stages" / name)]
    if not kept:
        why = "it has finished none" if other.keep_stages else "its recipe had no keep_stages"
        raise UserError(f"{old} holds the trained weights of no stage ({why}): {leave}.")
    last = names[kept[-1]]
    return Taken(old, tuple(names[: kept[-1] + 1]), checkpoints(old / "stages" / last)[-1])


def take_stages(taken: Taken, recipe: Recipe, loaded: Loaded, out: Path) -> None:
    """Copy the stages, their probes and their part of the log into OUT, and begin its run with the end of the last."""
    aside, old, count = out / ASIDE, taken.old, len(taken.names)
    shutil.rmtree(aside, ignore_errors=True)
    (aside / "stages").mkdir(parents=True)
    for name in taken.names:
        if (old / "stages" / name).exists():
            shutil.copytree(old / "stages" / name, aside / "stages" / name)
    shutil.copytree(taken.end, aside / "checkpoints" / taken.end.name)
    for name in taken.names:
        if (probe := old / f"probe-{name}.json").exists():
            with replacing(out / probe.name) as copy:
                shutil.copyfile(probe, copy)
    with replacing(out / "log.jsonl") as copy:
        copy.write_text("".join(json.dumps(line) + "\n" for line in lines_before(old / "log.jsonl", count)))
    write_json(out / "run.json", describe_run(recipe, loaded) | {"taken": {"from": str(old), "stages": count}})
    shutil.rmtree(out / "checkpoints", ignore_errors=True)  # it holds none
    os.replace(aside / "stages", out / "stages")
    os.replace(aside / "checkpoints", out / "checkpoints")
    aside.rmdir()


def shared_stages(old: Recipe, new: Recipe) -> int:
    """How many first stages two recipes train alike. The windows they state count too: a later stage's plan may start
    from them."""
    count = 0
    for n in range(1, 1 + min(len(old.stages), len(new.stages))):
        one, other = (recipe.first_stages(n) for recipe in (old, new))
        windows = [[stage.window for stage in recipe.stages] for recipe in (one, other)]
        if one.fingerprint() != other.fingerprint() or windows[0] != windows[1]:
            break
        count = n
    return count
