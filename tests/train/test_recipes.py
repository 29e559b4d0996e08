"""The shipped recipes say what they mean: they load, and the data they name is made by the configurations they name."""

from pathlib import Path

import pytest

from longverse.data.config import load_yaml, resolve
from longverse.train.config import Recipe

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = [path for path in sorted(FOLDER.glob("*.yaml")) if "stages" in load_yaml(path)]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipe(path: Path) -> None:
    recipe = Recipe.load(path)
    for stage in recipe.stages:
        reach = []
        for source in stage.data:
            if source.build is None:
                continue
            config = load_yaml(source.build)
            made = resolve(config["out"], Path(source.build).parent).resolve()
            wanted = Path(source.messages).parent if source.messages else Path(str(source.store))
            assert wanted.resolve() == made
            buckets = config.get("lengths", [{"high": stage.max_tokens}])
            reach += [resolve_length(bucket["high"]) for bucket in buckets]
        assert not reach or stage.max_tokens <= max(reach), f"no source of {stage.name} is as long as its max_tokens"


def resolve_length(value: int | str) -> int:
    return int(value.rstrip("K")) * 1024 if isinstance(value, str) else value


def test_there_are_recipes() -> None:
    assert {"smol_cpu.yaml", "smol_gpu.yaml", "abf_cpt_32k.yaml", "ntk_sft_256k.yaml"} <= {p.name for p in RECIPES}
