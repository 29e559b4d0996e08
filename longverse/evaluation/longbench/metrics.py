"""The metrics of LongBench, to the last digit, quirks included; each quirk has a corrected variant beside it.

`METRICS[name]` holds the official function (prediction, answer, classes) -> 0..1 and its variants by name. What
the benchmark's scripts do that one would not expect, and what is computed beside it:

- rouge: the `rouge` 1.0.1 package recurses once per step of the alignment, and Python allows 1,000 frames; a
  longer alignment raises RecursionError, which the script turns into a score of 0. Variant `rouge without its
  recursion limit`.
- rouge works on sets of words (a word counts once), splits sentences at every ".", and joins all alignments.
- code_sim: `fuzzywuzzy` takes difflib, or python-Levenshtein where that is installed; the figures differ. The
  benchmark's requirements name only fuzzywuzzy, so difflib is the official figure here. Variant `Levenshtein`.
- classification: classes come from the last row of the file; and while classes that are a part of the answer are
  removed from a list, that list is being walked, so the one after each removed class is skipped. Variant `row's
  own classes, all parts removed`.

Sources: THUDM/LongBench metrics.py and eval.py; pltrdy/rouge 1.0.1; Lin 2004 (ROUGE); seatgeek/fuzzywuzzy
0.18.0; Hyyrö 2004 (bit-parallel longest common subsequence). All code here is our own.
"""

from __future__ import annotations

import functools
import logging
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any

from longverse.errors import UserError

Score = Callable[[str, str, Sequence[str] | None], float]

_ASCII = frozenset(string.punctuation)
_CHINESE = _ASCII | frozenset(
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)

RECURSION_LIMIT = 1000  # CPython's default, which the official script runs under
# Frames of the official script below the first step of the recursion: the module, scorer, rouge_score,
# get_scores, _get_avg_scores, the metric's lambda, rouge_l_summary_level, _union_lcs, _recon_lcs.
FRAMES = 9
FRAMES_ZH = FRAMES + 1  # rouge_zh_score calls rouge_score


@functools.cache
def _jieba() -> Any:
    try:
        import jieba
    except ImportError:
        raise UserError(
            "The Chinese tasks are scored on the words jieba cuts; install it with: pip install 'longverse[eval]'"
        ) from None
    jieba.setLogLevel(logging.WARNING)
    return jieba


def cut_chinese(text: str) -> list[str]:
    """Words of a text by jieba's precise mode, white space included; jieba itself, since its dictionary decides."""
    return list(_jieba().cut(text, cut_all=False))


def f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of two multisets of words; 0 when they share none."""
    same = sum((Counter(prediction) & Counter(answer)).values())
    if same == 0:
        return 0.0
    precision = same / len(prediction)
    recall = same / len(answer)
    return (2 * precision * recall) / (precision + recall)


def english_words(text: str) -> list[str]:
    """Lower-cased words without ASCII punctuation (deleted, so "end-to-end" is one word) and a, an, the."""
    kept = "".join(c for c in text.lower() if c not in _ASCII)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def chinese_words(text: str) -> list[str]:
    """jieba's words, each lower-cased and freed of white space and punctuation; what becomes empty is dropped."""
    words = ("".join("".join(c for c in word.lower() if c not in _CHINESE).split()) for word in cut_chinese(text))
    return [word for word in words if word]


def qa_f1(prediction: str, answer: str, classes: Sequence[str] | None = None) -> float:
    return f1(english_words(prediction), english_words(answer))


def qa_f1_zh(prediction: str, answer: str, classes: Sequence[str] | None = None) -> float:
    return f1(chinese_words(prediction), chinese_words(answer))


def _sentences(text: str) -> list[list[str]]:
    # A sentence of white space alone stays, as one empty word: "".split(" ") is [""].
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _aligned(reference: list[str], hypothesis: list[str]) -> tuple[set[str], int]:
    """Words of one longest common subsequence, and the steps (frames) the recursive reading of it takes.

    Of several longest ones the package takes the one found by going left on a tie.
    """
    rows, columns = len(reference), len(hypothesis)
    table = [[0] * (columns + 1)]
    for word in reference:
        above, row, left = table[-1], [0], 0
        for column, other in enumerate(hypothesis, 1):
            left = above[column - 1] + 1 if word == other else max(above[column], left)
            row.append(left)
        table.append(row)
    words: set[str] = set()
    i, j, steps = rows, columns, 1
    while i and j:
        if reference[i - 1] == hypothesis[j - 1]:
            words.add(reference[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
        steps += 1
    return words, steps


def rouge_l(prediction: str, answer: str, frames: int | None) -> float:
    """Rouge-L F of the `rouge` 1.0.1 package: summary level, on sets of words.

    frames: Python frames in use where the package's recursion begins; an alignment that would pass
    RECURSION_LIMIT gives 0. None knows no limit. An empty side gives 0.
    """
    hypothesis, reference = _sentences(prediction), _sentences(answer)
    if not hypothesis or not reference:
        return 0.0
    union: set[str] = set()
    for sentence in reference:
        for other in hypothesis:
            words, steps = _aligned(sentence, other)
            if frames is not None and frames + steps > RECURSION_LIMIT:
                return 0.0
            union |= words
    recall = len(union) / len({word for sentence in reference for word in sentence})
    precision = len(union) / len({word for sentence in hypothesis for word in sentence})
    return 2.0 * ((precision * recall) / (precision + recall + 1e-8))


def rouge(prediction: str, answer: str, classes: Sequence[str] | None = None) -> float:
    return rouge_l(prediction, answer, FRAMES)


def rouge_unlimited(prediction: str, answer: str, classes: Sequence[str] | None = None) -> float:
    return rouge_l(prediction, answer, None)


def rouge_zh(prediction: str, answer: str, classes: Sequence[str] | None = None) -> float:
    return rouge_l(" ".join(cut_chinese(prediction)), " ".join(cut_chinese(answer)), FRAMES_ZH)


def rouge_zh_unlimited(prediction: str, answer: str, classes: Sequence[str] | None = None) -> float:
    return rouge_l(" ".join(cut_chinese(prediction)), " ".join(cut_chinese(answer)), None)


def classification(prediction: str, answer: str, classes: Sequence[str] | None) -> float:
    """1 / (class names found in the prediction) if the answer is among them, else 0; see the module's quirks."""
    found = [name for name in classes or () if name in prediction]
    index = 0
    while index < len(found):
        if found[index] in answer and found[index] != answer:
            # list.remove takes the first equal element, and the walk then steps over the next one.
            found.remove(found[index])
        index += 1
    return 1.0 / len(found) if answer in found else 0.0


def classification_corrected(prediction: str, answer: str, classes: Sequence[str] | None) -> float:
    found = [name for name in classes or () if name in prediction and not (name in answer and name != answer)]
    return 1.0 / len(found) if answer in found else 0.0


def _share_of_numbers(prediction: str, wanted: str) -> float:
    numbers = re.findall(r"\d+", prediction)
    return sum(number == wanted for number in numbers) / len(numbers) if numbers else 0.0


def _retrieval(label: str) -> Score:
    def score(prediction: str, answer: str, classes: Sequence[str] | None = None) -> float:
        named = re.search(rf"{label}(\d+)", answer)
        if named is None:
            raise UserError(f"The answer {answer!r} names no {label.strip()}: the row is not of this task.")
        return _share_of_numbers(prediction, named[1])

    return score


retrieval = _retrieval("Paragraph ")
retrieval_zh = _retrieval("段落")


def count(prediction: str, answer: str, classes: Sequence[str] | None = None) -> float:
    return _share_of_numbers(prediction, answer)


def first_code_line(prediction: str) -> str:
    """The first line without a backtick, "#" or "//"; "" if there is none. A line of white space counts."""
    for line in prediction.lstrip("\n").split("\n"):
        if "`" not in line and "#" not in line and "//" not in line:
            return line
    return ""


def _percent(first: str, second: str, ratio: Callable[[str, str], float]) -> float:
    if first == second:
        return 1.0
    if not first or not second:
        return 0.0
    return round(100 * ratio(first, second)) / 100


def _difflib_ratio(first: str, second: str) -> float:
    return SequenceMatcher(None, first, second).ratio()


def _levenshtein_ratio(first: str, second: str) -> float:
    """1 - insertions and deletions / both lengths: 2 * longest common subsequence / both lengths."""
    ones = (1 << len(first)) - 1
    places: dict[str, int] = {}
    for index, character in enumerate(first):
        places[character] = places.get(character, 0) | 1 << index
    state = ones  # a zero bit marks a character of `first` that the subsequence has gained
    for character in second:
        here = state & places.get(character, 0)
        state = ((state + here) | (state - here)) & ones
    common = len(first) - state.bit_count()
    total = len(first) + len(second)
    return 1.0 - (total - 2 * common) / total


def code_sim(prediction: str, answer: str, classes: Sequence[str] | None = None) -> float:
    return _percent(first_code_line(prediction), answer, _difflib_ratio)


def code_sim_levenshtein(prediction: str, answer: str, classes: Sequence[str] | None = None) -> float:
    return _percent(first_code_line(prediction), answer, _levenshtein_ratio)


@dataclass(frozen=True)
class Metric:
    """official: what the benchmark computes; beside: variants by name, reported next to it and never instead.

    own_classes: the variants that get the row's own classes instead of those of the file's last row.
    """

    official: Score
    beside: dict[str, Score] = field(default_factory=dict)
    own_classes: frozenset[str] = frozenset()


NO_LIMIT = "rouge without its recursion limit"
OWN_CLASSES = "row's own classes, all parts removed"
LEVENSHTEIN = "edit distance by Levenshtein"

METRICS: dict[str, Metric] = {
    "qa_f1": Metric(qa_f1),
    "qa_f1_zh": Metric(qa_f1_zh),
    "rouge": Metric(rouge, {NO_LIMIT: rouge_unlimited}),
    "rouge_zh": Metric(rouge_zh, {NO_LIMIT: rouge_zh_unlimited}),
    "classification": Metric(classification, {OWN_CLASSES: classification_corrected}, frozenset({OWN_CLASSES})),
    "retrieval": Metric(retrieval),
    "retrieval_zh": Metric(retrieval_zh),
    "count": Metric(count),
    "code_sim": Metric(code_sim, {LEVENSHTEIN: code_sim_levenshtein}),
}
