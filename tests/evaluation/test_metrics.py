"""The metrics: cases computed by hand, properties, and equality with the packages the benchmark uses."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longverse.errors import UserError
from longverse.evaluation.longbench import metrics
from longverse.evaluation.longbench.metrics import METRICS

pytest.importorskip("jieba", reason="the Chinese metrics need the extra `eval`")
CLASSES = ["Food", "Food and drink", "Drink", "Sport", "Sports car", "car", "体育", "体育新闻", "新闻"]
HOSTILE = [
    "", " ", "\n", ".", "...", ". . .", "\n\n\n", "the", "a an the", "\u3000", "。", "`code`", "# x", "//", "\t",
    "\n`\n#\nreal line", "   \nreturn x", "\x00\ufeff", "😀 😀.😀", "Ünïcödé ſ İ ß", "A.B.C.D", "end-to-end", "1234",
    "段落", "段落12 段落13", "Paragraph 3, 3 and 4", "٣ 3", "体育新闻", "x" * 300, "ab " * 150, "<|im_end|>",
    "return self.f(x)\nmore", "答案是：段落7。", "\u202eright to left", "a\u00a0b", "Food and drink or car",
]  # fmt: skip


def score(name: str, prediction: str, answer: str) -> float:
    return METRICS[name].official(prediction, answer, CLASSES)


@pytest.mark.parametrize(
    ("name", "prediction", "answer", "expected"),
    [
        ("qa_f1", "The cat, sat.", "a cat sat down", 2 * (1.0 * 2 / 3) / (1.0 + 2 / 3)),
        ("qa_f1", "red red blue", "red", 2 * (1 / 3 * 1.0) / (1 / 3 + 1.0)),
        ("qa_f1", "the", "the", 0.0),  # articles go, and two empty answers share no word
        ("qa_f1", "", "x", 0.0),
        ("qa_f1_zh", "北京。", "北京", 1.0),
        ("rouge", "", "a b", 0.0),
        ("rouge", "...", "a b", 0.0),  # no sentence is left
        ("rouge", "a b c", "a b c", 2.0 * (1.0 / (2.0 + 1e-8))),
        ("rouge", "a a a", "a b", 2.0 * (0.5 / (1.5 + 1e-8))),  # sets: p = 1/1, r = 1/2
        ("classification", "Food and drink", "Food and drink", 1.0),  # "Food" is a part of the answer and goes
        ("classification", "Food or Sport", "Food", 0.5),
        ("classification", "nothing", "Food", 0.0),
        ("retrieval", "Paragraph 3 or 4", "Paragraph 3", 0.5),
        ("retrieval", "none", "Paragraph 3", 0.0),
        ("retrieval_zh", "段落27", "段落27", 1.0),
        ("count", "7 7 8", "7", 2 / 3),
        ("code_sim", "\n\n# a comment\nreturn x\nmore", "return x", 1.0),
        ("code_sim", "# only\n`this`", "return x", 0.0),
        ("code_sim", "abcd", "abxd", 0.75),
    ],
)
def test_by_hand(name: str, prediction: str, answer: str, expected: float) -> None:
    assert score(name, prediction, answer) == expected


def test_classes_removed_while_the_list_is_walked() -> None:
    # "car" follows "Sport" in the list of hits; removing "Sport" steps over "car".
    classes = ["Sport", "car", "Sports car"]
    assert metrics.classification("Sports car", "Sports car", classes) == 0.5
    assert metrics.classification_corrected("Sports car", "Sports car", classes) == 1.0


def test_a_long_alignment_scores_nothing_officially() -> None:
    text = " ".join(f"w{i}" for i in range(1200))
    assert metrics.rouge(text, text) == 0.0
    assert metrics.rouge_unlimited(text, text) == pytest.approx(1.0)


def test_levenshtein_stands_beside_difflib() -> None:
    assert metrics.code_sim("abcabba", "cbabac") != metrics.code_sim_levenshtein("abcabba", "cbabac")


def test_an_answer_of_another_task_is_named() -> None:
    with pytest.raises(UserError, match="names no Paragraph"):
        score("retrieval", "1", "段落1")


def _cases(count: int) -> list[dict[str, object]]:
    rng = random.Random(7)
    english = ["the", "a", "cat", "Cat", "sat,", "mat.", "on", "end-to-end", "3", "it's", "U.S.", "(dogs)", "run"]
    chinese = [*"北京大学的学生在图书馆看书。他们，都很高兴！段落12 ", "体育新闻", "A股", "iPhone"]
    code = ["self.", "x", " = ", "(", ")", "return ", "\n", "#", "//", "`", "foo", "[i]", " ", "é"]
    answers = {
        "retrieval": lambda: f"Paragraph {rng.randint(1, 4)}",
        "retrieval_zh": lambda: f"段落{rng.randint(1, 4)}",
        "count": lambda: str(rng.randint(1, 4)),
        "classification": lambda: rng.choice(CLASSES),
    }

    def text(metric: str) -> str:
        if rng.random() < 0.2:
            return rng.choice(HOSTILE)
        size = rng.choice([1, 3, 10, 40])
        if metric == "classification":
            return " ".join(rng.choice([*CLASSES, "or"]) for _ in range(rng.randint(1, 5)))
        if metric in answers:
            return " ".join(rng.choice(["1", "2", "3", "Paragraph", "段落2", "12", "."]) for _ in range(size))
        if metric.endswith("zh"):
            return "".join(rng.choice(chinese) for _ in range(size))
        if metric == "code_sim":
            return "".join(rng.choice(code) for _ in range(size))
        return " ".join(rng.choice(english) for _ in range(size))

    return [
        {"metric": m, "pred": text(m), "answer": answers.get(m, lambda m=m: text(m))(), "classes": CLASSES}
        for m in METRICS
        for _ in range(count)
    ]


def _long_alignments() -> list[dict[str, object]]:
    """Around the recursion limit, where one frame decides between a score and 0.

    The one common word stands first in both texts, so the reading walks back over every other word.
    """
    return [
        {"metric": metric, "pred": "b" + " x" * length, "answer": "b y z", "classes": None}
        for length in range(978, 998)
        for metric in ("rouge", "rouge_zh")
    ]


@pytest.mark.parametrize("back_end", ["difflib", "levenshtein"])
def test_equal_to_the_packages_to_the_last_digit(back_end: str) -> None:
    for package in ("rouge", "fuzzywuzzy", "Levenshtein"):
        pytest.importorskip(package, reason="the packages the benchmark uses are needed to compare with them")
    cases = _cases(60)
    if back_end == "difflib":
        cases += _long_alignments()
    script = Path(__file__).with_name("reference_longbench.py")
    done = subprocess.run(
        [sys.executable, str(script), back_end],
        input="".join(json.dumps(case) + "\n" for case in cases),
        capture_output=True,
        text=True,
        check=True,
    )
    expected = [json.loads(line) for line in done.stdout.split()]
    assert len(expected) == len(cases)
    if back_end == "difflib":
        for metric in (expected[-40::2], expected[-39::2]):
            assert metric[0] > 0  # the limit lies inside the range
            assert metric[-1] == 0
    for case, value in zip(cases, expected, strict=True):
        metric = METRICS[case["metric"]]  # type: ignore[index]
        function = metric.beside.get(metrics.LEVENSHTEIN) if back_end == "levenshtein" else None
        got = (function or metric.official)(case["pred"], case["answer"], case["classes"])  # type: ignore[arg-type]
        assert got == value, (case, got, value)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60), st.text(max_size=60))
def test_code_similarity_equals_fuzzywuzzy(first: str, second: str) -> None:
    matcher = pytest.importorskip("fuzzywuzzy.StringMatcher").StringMatcher
    expected = (
        100 if first == second else 0 if not first or not second else round(100 * matcher(None, first, second).ratio())
    )
    assert metrics._percent(first, second, metrics._levenshtein_ratio) == expected / 100


@settings(max_examples=200, deadline=None)
@given(st.text("ab. \n", max_size=30), st.text("abc. ", max_size=30))
def test_rouge_equals_the_package(prediction: str, answer: str) -> None:
    package = pytest.importorskip("rouge").Rouge(["rouge-l"])
    try:
        expected = package.get_scores([prediction], [answer])[0]["rouge-l"]["f"]
    except ValueError:
        expected = 0.0
    assert metrics.rouge(prediction, answer) == expected


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(sorted(METRICS)),
    st.text(max_size=80),
    st.sampled_from(["Paragraph 3", "段落3", "3", "Food", "x y"]),
)
def test_scores_lie_between_0_and_1(name: str, prediction: str, answer: str) -> None:
    if name == "retrieval":
        answer = "Paragraph 3"
    if name == "retrieval_zh":
        answer = "段落3"
    metric = METRICS[name]
    for function in (metric.official, *metric.beside.values()):
        assert 0.0 <= function(prediction, answer, CLASSES) <= 1.0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["cat", "dog", "sun", "3"]), min_size=1, max_size=8))
def test_word_overlap_does_not_know_order(words: list[str]) -> None:
    text, turned = " ".join(words), " ".join(reversed(words))
    assert metrics.qa_f1(text, turned) == 1.0
