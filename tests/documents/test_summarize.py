"""Parts cover the document, keep to the budget and to sections; a summary says what it is of."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longverse import cli
from longverse.documents.reader import decode
from longverse.documents.summarize import parts_of, summarize
from longverse.errors import UserError
from longverse.inference.engine import Engine
from longverse.inference.sampling import Sampling
from tests.helpers import tiny_config
from tests.models.folders import save_folder

block = st.sampled_from(["# One", "## Two", "word " * 3, "word " * 9, "词" * 7, "a", "## 三"])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("model") / "tiny"
    save_folder(folder, tiny_config(max_position_embeddings=1024))
    return str(folder)


@settings(max_examples=100)
@given(st.lists(block, min_size=1, max_size=25), st.integers(12, 60), st.booleans())
def test_parts_cover_every_paragraph_once_within_the_budget(blocks: list[str], budget: int, join: bool) -> None:
    document = decode("\n\n".join(blocks).encode(), "a.md")

    def count(text: str) -> int:
        return len(text.split()) if " " in text else len(text)

    parts = parts_of(document, budget, count, join=join)
    covered = []
    for part in parts:
        inside = [p for p in document.paragraphs if part.start <= p.start < part.end]
        assert inside[0].start == part.start
        assert inside[-1].end == part.end
        assert sum(count(p.text) + 2 for p in inside) <= budget
        covered += inside
    assert covered == list(document.paragraphs)


def test_parts_are_sections_and_say_where_they_stand() -> None:
    text = "# Year\n\nintro\n\n## Sales\n\none\n\ntwo\n\n## Costs\n\nthree"
    document = decode(text.encode(), "a.md")
    parts = parts_of(document, 1000, len, join=False)
    assert [(part.title, part.place) for part in parts] == [
        ("Year", "paragraphs 1-2"), ("Sales", "paragraphs 3-5"), ("Costs", "paragraphs 6-7"),
    ]  # fmt: skip
    assert len(parts_of(document, 1000, len)) == 1
    with pytest.raises(UserError, match=r"Paragraph 1 of a\.md alone takes 8 tokens"):
        parts_of(document, 6, len)


def test_what_fits_is_read_whole_and_the_rest_in_parts(tiny: str) -> None:
    engine = Engine.load(tiny, dtype="float32", device="cpu")
    few = Sampling(max_new_tokens=4)
    (whole,) = summarize(engine, decode(b"The mill stands in a town.", "a.txt"), few)
    assert (whole.of, whole.part.place) == ("document", "")
    book = decode("\n\n".join(f"## Part {n}\n\n" + "the mill " * 40 for n in range(6)).encode(), "a.md")
    seen: list[tuple[int, int]] = []
    made = list(summarize(engine, book, few, on_part=lambda number, count, part: seen.append((number, count))))
    assert [summary.of for summary in made] == ["part"] * (len(made) - 1) + ["parts"]
    assert len(seen) == len(made) > 2
    assert all(summary.tokens + 4 <= engine.window for summary in made)
    assert made[0].part.start == 0
    assert made[-2].part.end == len(book.text.rstrip())


def test_the_command(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.md").write_text("# One\n\nthe mill\n\n# Two\n\nthe town")
    assert cli.main(["summarize", str(tmp_path / "a.md"), "--model", tiny, "-n", "4", "--sections", "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "One (paragraphs 1-2)" in out
    assert "Two (paragraphs 3-4)" in out
    assert "All parts" in out
    assert cli.main(["summarize", str(tmp_path / "a.md"), "--model", tiny, "-n", "4", "--json", "--quiet"]) == 0
    assert '"of": "document"' in capsys.readouterr().out


def test_a_summary_that_was_cut_says_so(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.md").write_text("the mill")
    line = ["summarize", str(tmp_path / "a.md"), "--model", tiny, "-n", "1"]
    assert cli.main(line) == 0
    assert "cut at --max-new-tokens" in capsys.readouterr().err
    assert cli.main([*line, "--json"]) == 0
    assert '"finish_reason": "length"' in capsys.readouterr().out
