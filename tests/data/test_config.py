"""Configurations: variables of the environment in YAML texts, and the recipes that stand in the repository."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longverse.data.config import fill_variables, load_yaml, resolve
from longverse.data.corpus import CorpusConfig, load_corpus_config
from longverse.data.long_sft.plan import SftConfig, load_sft_config
from longverse.errors import UserError

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize(
    ("written", "set_to", "read"),
    [
        ("${PLACE:-../here}/a.txt", None, "../here/a.txt"),
        ("${PLACE:-../here}/a.txt", "", "../here/a.txt"),
        ("${PLACE:-../here}/a.txt", "/there", "/there/a.txt"),
        ("${PLACE:-../here}/a.txt", "~/there", "~/there/a.txt"),
        ("${PLACE:-../here}/a.txt", "there", "CWD/there/a.txt"),  # as a shell would read it
        ("${PLACE:-x} and ${PLACE}", "there", "there and there"),
        ("${PLACE:-}", None, ""),
        ("$${PLACE} $PLACE {PLACE}", "there", "${PLACE} $PLACE {PLACE}"),
        ("${PLACE:-a}", "${PLACE:-b}", "${PLACE:-b}"),  # filled in once
    ],
)
def test_variables_of_the_environment(written, set_to, read, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PLACE", raising=False)
    if set_to is not None:
        monkeypatch.setenv("PLACE", set_to)
    (tmp_path / "c.yaml").write_text(f'a: [{{b: "{written}"}}]\n"${{PLACE}}": 1\n')
    values = load_yaml(tmp_path / "c.yaml")
    assert values == {"a": [{"b": read.replace("CWD", str(tmp_path))}], "${PLACE}": 1}


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("${PLACE}/a", r"c.yaml: a needs the environment variable PLACE"),
        ("${1:-x}", "no \\$.NAME"),
        ("${A", "plain one"),
    ],
)
def test_variables_that_cannot_be_filled_in(written, message, monkeypatch, tmp_path):
    monkeypatch.delenv("PLACE", raising=False)
    (tmp_path / "c.yaml").write_text(f'a: "{written}"\n')
    with pytest.raises(UserError, match=message):
        load_yaml(tmp_path / "c.yaml")


@given(st.text().filter(lambda text: "${" not in text))
def test_other_texts_stay(text):
    assert fill_variables({"a": [text, 1, None]}, "f") == {"a": [text, 1, None]}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_recipes_reach_shared_texts_by_a_variable(path, monkeypatch, tmp_path):
    """What a recipe reads outside the repository starts at LONGVERSE_SHARED, or beside the repository."""
    monkeypatch.delenv("LONGVERSE_SHARED", raising=False)
    usual = load_yaml(path)
    monkeypatch.setenv("LONGVERSE_SHARED", str(tmp_path))
    other = load_yaml(path)
    if "sources" in usual:
        load = load_sft_config if "items" in usual else load_corpus_config
        config = load(path)
        assert isinstance(config, SftConfig | CorpusConfig)
        for before, after in zip(usual["sources"], config.sources, strict=True):
            place = resolve(before["path"], path.parent).resolve()
            if not place.is_relative_to(RECIPES.parent):
                shared = RECIPES.parent.parent / "shared"
                assert resolve(after.path, path.parent) == tmp_path / place.relative_to(shared)
    else:
        assert ("LONGVERSE_SHARED" in path.read_text()) == (usual != other)
