"""What a run's folder belongs to, and finished stages taken over from another run.

A folder in which something was trained belongs to one recipe and one model (OUT/run.json). When only later stages of a
recipe change, the first ones need not be trained again: a run with `keep_stages` holds the trained weights with which
each of its stages ended, and a new run begins there. As every stage begins with a fresh optimizer and draws its own
order of examples, the new run is, bit for bit, the one that would have trained them itself.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from longverse.data.config import build
from longverse.data.vocabulary import fingerprint
from longverse.errors import UserError
from longverse.models.checkpoint import Loaded
from longverse.models.shards import read_json, replacing, write_json
from longverse.train.config import Recipe
from longverse.train.parallel import Ranks
from longverse.train.state import checkpoints
from longverse.train.trainer import lines_before


def describe_run(recipe: Recipe, loaded: Loaded) -> dict[str, Any]:
    """What OUT/run.json says."""
    from longverse.evaluation.engine_backend import fingerprint as weights_of

    return {
        "fingerprint": recipe.fingerprint(),
        "model": loaded.name,
        "weights": weights_of(loaded.network),
        "tokenizer": fingerprint(loaded.tokenizer),
        "shape": {key: value for key, value in asdict(loaded.network.config).items() if key not in ("rope", "window")},
        "recipe": recipe.to_dict(),
    }


def check_run(recipe: Recipe, out: Path, loaded: Loaded, ranks: Ranks) -> None:
    """Write OUT/run.json, or compare with the one there (UserError)."""
    mine, path = describe_run(recipe, loaded), out / "run.json"
    if path.exists() and checkpoints(out / "checkpoints"):
        remedy = f"give another --out, or delete {out} to begin anew"
        theirs = read_json(path)
        _check_model(mine, theirs, out, remedy)
        if theirs.get("fingerprint") != mine["fingerprint"]:
            change = first_change(theirs.get("recipe", {}), json.loads(json.dumps(mine["recipe"])))
            raise UserError(
                f"{out} holds a run of another recipe ({change}): {remedy}; --stages-from {out} takes over the stages"
                " before the first change."
            )
    if ranks.rank == 0:
        write_json(path, mine)


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


def take_stages(recipe: Recipe, loaded: Loaded, out: Path, old: Path) -> str | None:
    """Put into OUT what the run in `old` ended those first stages with that both recipes share; returns a sentence.

    Does nothing (None) where OUT has a checkpoint: then it was done before. What the stages were trained on is not
    compared again. Raises UserError where nothing can be taken.
    """
    if checkpoints(out / "checkpoints"):
        return None
    if not (old / "run.json").exists():
        raise UserError(f"{old} is no folder of a run: --stages-from takes the --out of another one.")
    theirs = read_json(old / "run.json")
    _check_model(describe_run(recipe, loaded), theirs, old, "leave out --stages-from")
    shared = shared_stages(build(Recipe, theirs["recipe"], str(old / "run.json")), recipe)
    names = [f"{n:02d}-{stage.name}" for n, stage in enumerate(recipe.stages[:shared])]
    kept = [name for name in names if checkpoints(old / "stages" / name)]
    if not kept:
        change = first_change(theirs["recipe"], json.loads(json.dumps(recipe.to_dict())))
        why = "its recipe had no keep_stages" if names else f"its recipe differs from the beginning on ({change})"
        raise UserError(f"No stage of {old} can be taken over, {why}: leave out --stages-from.")
    count = names.index(kept[-1]) + 1
    for name in names[:count]:
        if (old / "stages" / name).exists():
            _copy(old / "stages" / name, out / "stages" / name)
        if (probe := old / f"probe-{name}.json").exists():
            with replacing(out / probe.name) as aside:
                shutil.copyfile(probe, aside)
    with replacing(out / "log.jsonl") as aside:
        aside.write_text("".join(json.dumps(line) + "\n" for line in lines_before(old / "log.jsonl", count)))
    end = checkpoints(old / "stages" / kept[-1])[-1]
    _copy(end, out / "checkpoints" / end.name)  # last: with it the run has begun
    stages = ", ".join(stage.name for stage in recipe.stages[:count])
    return f"Taken over from {old}: {stages}."


def shared_stages(old: Recipe, new: Recipe) -> int:
    """How many first stages two recipes train alike."""
    count = 0
    for n in range(1, 1 + min(len(old.stages), len(new.stages))):
        one, other = (replace(recipe, stages=recipe.stages[:n]).fingerprint() for recipe in (old, new))
        if one != other:
            break
        count = n
    return count


def _copy(source: Path, target: Path) -> None:
    """A folder, whole or not at all."""
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(source, aside)
    aside.rename(target)
