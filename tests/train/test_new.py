"""A model from nothing: its tokenizer, its tasks, and a recipe that begins with it."""

import json
from pathlib import Path

import pytest
import torch

from longverse.data.config import build
from longverse.errors import UserError
from longverse.models.checkpoint import load, open_model
from longverse.models.tokenizer import Tokenizer
from longverse.train.config import Recipe, Source
from longverse.train.made import Made
from longverse.train.new import NewModel, make_model, train_tokenizer
from longverse.train.run import run_recipe
from longverse.train.trainer import read_log

ENGLISH = "The old miller walked along the river in the evening. He had 27 sacks, and nobody asked him why. " * 400
CHINESE = "从前有一个老人住在河边。他每天早上去市场，买了许多东西。后来天下大雨，路上没有一个人。" * 400


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "en.txt").write_text(ENGLISH)
    (folder / "zh.jsonl").write_text(json.dumps({"text": CHINESE}) + "\n")
    return str(folder / "en.txt"), str(folder / "zh.jsonl")


@pytest.fixture(scope="module")
def model(texts: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("new") / "base"
    make_model(small(texts), folder, seed=1)
    return folder


def small(texts: tuple[str, str]) -> NewModel:
    return NewModel(texts, vocabulary=700, characters=50_000, hidden=32, layers=1, heads=2, mlp=48, window=256)


def test_tokenizer_is_of_xverses_construction(model: Path) -> None:
    tokenizer = Tokenizer.from_folder(model)
    for text in (
        "The old miller, 27 sacks.",
        " two  spaces",
        "他每天早上去市场。",
        "emoji 👍 and žluťoučký",
        "<0x41> <s>",
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    pieces = [tokenizer.backend.id_to_token(n) for n in tokenizer.encode("had 27 sacks, 👍")]
    assert "2" in pieces
    assert "7" in pieces
    assert "<0xF0>" in pieces
    assert any(piece.startswith("▁") for piece in pieces)
    assert tokenizer.backend.get_vocab_size() <= 700
    assert open_model(str(model)).chat().kind == "xverse"


def test_the_same_seed_makes_the_same_model(model: Path, texts: tuple[str, str], tmp_path: Path) -> None:
    make_model(small(texts), tmp_path, seed=1)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / name).read_bytes() == (model / name).read_bytes()


def test_letters_that_are_equally_frequent_are_chosen_alike(tmp_path: Path) -> None:
    # 900 characters, each as often as any other, and room for 222: which ones must not be chance.
    every = "".join(chr(0x4E00 + n) for n in range(900))
    (tmp_path / "zh.txt").write_text(every * 3)
    made = [train_tokenizer(small((str(tmp_path / "zh.txt"),))).to_str() for _ in range(4)]
    assert len(set(made)) == 1
    vocabulary = json.loads(made[0])["model"]["vocab"]
    assert {chr(0x4E00 + n) for n in range(222)} <= set(vocabulary)
    assert chr(0x4E00 + 222) not in vocabulary


def test_copies(model: Path, texts: tuple[str, str]) -> None:
    opened = open_model(str(model))
    made = Made("copy", opened.tokenizer, opened.chat(), 10, 50, seed=1)
    for index in range(20):
        example = made.get(index)
        [(first, end, _)] = example.spans
        run = first - 2
        assert 4 <= run <= (len(example) - 1) // 2
        assert (example.ids[first:end] == example.ids[first - run : end - run]).all()
        assert end == len(example) == made.length(index)
        assert (made.get(index).ids == example.ids).all()


def test_facts(model: Path, texts: tuple[str, str]) -> None:
    opened = open_model(str(model))
    tokenizer = opened.tokenizer
    made = Made("facts", tokenizer, opened.chat(), 200, 400, seed=1, texts=texts)
    for index in range(20):
        example = made.get(index)
        assert 0.7 * made.length(index) <= len(example) <= 400
        for first, end, _ in example.spans:
            answer = tokenizer.decode(example.ids[first : end - 1].tolist())
            assert answer.lower() in tokenizer.decode(example.ids[:first].tolist()).lower()
    counts = {}
    for most in (6, 12):
        many = Made("facts", tokenizer, opened.chat(), 1500, 1600, seed=1, texts=texts, facts=most)
        counts[most] = {len(many.get(index).spans) for index in range(24)}
        assert max(len(many.get(index)) for index in range(24)) <= 1600
    assert max(counts[6]) == 6
    assert 9 <= max(counts[12]) <= 12
    with pytest.raises(UserError, match="texts"):
        Made("facts", tokenizer, opened.chat(), 200, 400, seed=1)
    for source in ({"made": "facts", "texts": texts, "facts": 0}, {"made": "copy", "facts": 12}):
        with pytest.raises(UserError, match="facts"):
            Source(**source)


def test_a_story_is_what_an_example_is_made_of(model: Path, texts: tuple[str, str]) -> None:
    """Its first question, asked alone, is what the example begins with; its answers are the example's, in order."""
    opened = open_model(str(model))
    made = Made("facts", opened.tokenizer, opened.chat(), 300, 400, seed=3, texts=texts)
    for index in range(12):
        example, story = made.get(index), made.story(index)
        asked = [{"role": "user", "content": story.prompt(story.asked[0][0])}]
        assert opened.chat().encode(asked) == example.ids[: example.spans[0][0]].tolist()
        answers = [opened.tokenizer.decode(example.ids[begin : end - 1].tolist()) for begin, end, _ in example.spans]
        assert [answer.strip() for answer in answers] == [answer for _, answer in story.asked]


def test_a_recipe_from_nothing(texts: tuple[str, str], tmp_path: Path) -> None:
    shape = {"texts": list(texts), "vocabulary": 700, "characters": 50_000, "hidden": 32, "layers": 1, "heads": 2}
    stage = {
        "name": "copy", "data": [{"made": "copy"}, {"made": "facts", "texts": list(texts)}], "steps": 3, "batch": 4,
        "max_tokens": 128, "warmup": 1, "learning_rate": 1e-3,
    }  # fmt: skip
    plan = build(
        Recipe,
        {
            "model": str(tmp_path / "base"),
            "new": {**shape, "mlp": 48, "window": 256},
            "method": "full",
            "stages": [stage],
        },
    )
    outcome = run_recipe(plan, tmp_path / "out")
    assert len(read_log(tmp_path / "out" / "log.jsonl")) == 3
    before = load(str(tmp_path / "base"), dtype="float32").network
    after = load(str(outcome.model), dtype="float32").network
    assert after.config == before.config
    assert not torch.equal(after.lm_head.weight, before.lm_head.weight)


def test_refuses(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="above 0"):
        NewModel(("a",), deviation=0)
    with pytest.raises(UserError, match="600"):
        NewModel(("a",), vocabulary=300)
    with pytest.raises(UserError, match="even"):
        NewModel(("a",), hidden=30, heads=4)
    with pytest.raises(UserError, match="does not exist"):
        make_model(NewModel((str(tmp_path / "none.txt"),)), tmp_path / "x")
