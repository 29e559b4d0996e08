"""The needle test, on a back end that echoes the end of its prompt and on a tiny engine."""

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from longverse.errors import UserError
from longverse.evaluation.backends import Request
from longverse.evaluation.engine_backend import EngineBackend
from longverse.evaluation.fitting import ENGLISH_PAD
from longverse.evaluation.needle import MODES, NeedleResult, NeedleSettings, _fit_all, default_lengths, run_needle
from longverse.inference.engine import Engine

from .conftest import Echo

QUICK = NeedleSettings(lengths=(600, 1100), depths=(0.0, 0.5, 1.0), repeats=1, max_new_tokens=8)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("apart", [False, True])
def test_everything_is_found_by_whoever_sees_everything(echo: Echo, mode: str, apart: bool) -> None:
    settings = replace(QUICK, mode=mode, one_per_document=apart, languages=("en", "zh"))
    result = run_needle(echo, settings)
    assert result.found() == 1.0
    assert len(result.trials) == 2 * 2 * 3
    for trial in result.trials:
        # Half-way places of the short documents lie at the nearest sentence end.
        assert abs(trial.measured_depth - trial.depth) < 0.2
        assert trial.prompt_tokens == trial.length


def test_the_prompt_has_exactly_the_stated_tokens(echo: Echo, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, Request]] = []
    real = echo.answer
    monkeypatch.setattr(
        Echo, "answer", lambda self, request: (seen.append((self.count(request), request)), real(request))[1]
    )
    run_needle(echo, replace(QUICK, lengths=(517, 640, 933), languages=("en", "zh"), repeats=2))
    assert {n for n, _ in seen} == {517, 640, 933}


def test_a_gap_below_the_shortest_pad_text_costs_a_sentence() -> None:
    """Found at 131,072 tokens of novels: the longest question fitted without a pad text, another lacked one token."""

    def count(sentences: int, question: str, padding: str) -> int:
        return 10 * sentences + len(question) + len(padding.split())

    number, paddings = _fit_all(count, ["five5", "four"], 6, 65, ENGLISH_PAD)
    assert number == 5
    assert [count(number, question, text) for question, text in zip(["five5", "four"], paddings, strict=True)] == [
        65,
        65,
    ]
    with pytest.raises(UserError, match="exactly 3 tokens"):
        _fit_all(count, ["five5", "four"], 6, 3, ENGLISH_PAD)


def test_depth_shows_where_the_model_stops_seeing(echo: Echo) -> None:
    echo.sees = 250
    grid = run_needle(echo, QUICK).grid("en")
    assert [row[1] for row in grid] == [0.0, 0.0, 1.0]


def test_one_document_is_read_once(engine: Engine) -> None:
    result = run_needle(EngineBackend(engine), replace(QUICK, lengths=(900,)))
    first, *others = result.trials
    assert first.prompt_tokens == 900
    assert all(trial.reused_tokens > 600 for trial in others)


def test_results_go_through_json(echo: Echo, tmp_path: Path) -> None:
    result = run_needle(echo, QUICK)
    paths = result.save(tmp_path)
    again = NeedleResult.from_dict(json.loads((tmp_path / "needle.json").read_text()))
    assert again.grid("en") == result.grid("en")
    assert "| 100 % | 100 | 100 |" in (tmp_path / "needle.md").read_text()
    pytest.importorskip("matplotlib")
    assert paths[-1].read_bytes().startswith(b"\x89PNG")


def test_a_stopped_run_goes_on(echo: Echo, tmp_path: Path) -> None:
    whole = run_needle(echo, QUICK)
    echo.calls = 0
    journal = tmp_path / "needle.jsonl"
    run_needle(echo, QUICK, journal=journal, cancelled=lambda: echo.calls >= 4)
    assert echo.calls == 4
    with journal.open("a") as handle:
        handle.write('{"key": "en 1100 0", "tri')  # a kill in the middle of a line
    resumed = run_needle(echo, QUICK, journal=journal)
    assert resumed.trials == whole.trials
    assert echo.calls == 4 + 3  # the document that was broken off is asked anew, the finished one is not


def test_other_settings_do_not_continue_a_run(echo: Echo, tmp_path: Path) -> None:
    run_needle(echo, QUICK, journal=tmp_path / "n.jsonl")
    with pytest.raises(UserError, match=r"other settings \(seed\)"):
        run_needle(echo, replace(QUICK, seed=1), journal=tmp_path / "n.jsonl")


def test_failures_are_counted_and_not_scored(echo: Echo, tmp_path: Path) -> None:
    echo.fail = (1,)
    result = run_needle(echo, QUICK, journal=tmp_path / "n.jsonl")
    assert result.failures == 1
    assert result.found() == 1.0
    assert result.grid("en")[1][0] is None
    assert "1 of 6 trials got no answer" in result.markdown()
    assert run_needle(echo, QUICK, journal=tmp_path / "n.jsonl").failures == 0  # a failed document is tried again


def test_the_users_own_haystack(echo: Echo) -> None:
    text = "".join(f"Chapter {i} was read aloud. Nobody minded. " for i in range(40))
    result = run_needle(echo, replace(QUICK, haystack=text, haystack_name="book.txt"))
    assert result.found() == 1.0
    assert result.settings["haystack_name"] == "book.txt"
    assert "haystack" not in result.settings
    assert result.settings["haystack_sha256"]


def test_past_the_window_is_refused_before_any_work(echo: Echo) -> None:
    echo.window = 1000
    with pytest.raises(UserError, match="exceed echo's window of 1,000"):
        run_needle(echo, QUICK)
    assert echo.calls == 0


def test_a_length_without_room_for_the_question_is_refused(echo: Echo) -> None:
    with pytest.raises(UserError, match="question and template alone take"):
        run_needle(echo, replace(QUICK, lengths=(40,)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": ()}, "lengths"),
        ({"lengths": (2000, 1000)}, "rising order"),
        ({"depths": (0.0, 2.0)}, "depths"),
        ({"languages": ("fr",)}, "not 'fr'"),
        ({"mode": "magic"}, "No mode is called 'magic'"),
        ({"kinds": ("colour", "smell")}, "'smell'"),
        ({"repeats": 0}, "--repeats"),
        ({"mode": "paraphrase", "kinds": ("safe",)}, "--one-per-document"),
    ],
)
def test_settings_that_make_no_sense(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(QUICK, **change)  # type: ignore[arg-type]


def test_default_lengths_fill_the_window() -> None:
    assert default_lengths(8192, 24) == (1000, 2000, 3000, 4000, 5000, 6000, 7000, 8000)
    assert default_lengths(4096, 24)[-1] == 4000
    assert default_lengths(2048, 24)[-1] == 2000
    assert default_lengths(262144, 24) == default_lengths(8192, 24)  # what takes minutes
    with pytest.raises(UserError, match="--lengths"):
        default_lengths(None, 24)


def test_every_kind_meets_every_depth(echo: Echo) -> None:
    settings = NeedleSettings(lengths=(700,), depths=(0.0, 1.0), repeats=8, max_new_tokens=8)
    result = run_needle(echo, settings)
    kinds = {depth: {t.kind for t in result.trials if t.depth == depth} for depth in (0.0, 1.0)}
    assert len(kinds[0.0]) >= 4
    assert len(kinds[0.0] | kinds[1.0]) == 8
    assert len(list(islice(kinds, 2))) == 2
