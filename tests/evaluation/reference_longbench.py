"""A second writing of the benchmark's metrics, on the packages it uses, run as a script of its own.

The packages' figures depend on how deep the caller stands (rouge recurses), so this file keeps the depth of the
official script: module, scorer, metric, package. Cases come as JSON lines on the standard input, scores go out.
With the argument `difflib`, python-Levenshtein is hidden from fuzzywuzzy.
"""

import json
import logging
import re
import string
import sys
import warnings
from collections import Counter

warnings.simplefilter("ignore")
if "difflib" in sys.argv:
    sys.modules["Levenshtein"] = None
import jieba  # noqa: E402
from fuzzywuzzy import fuzz  # noqa: E402
from rouge import Rouge  # noqa: E402

jieba.setLogLevel(logging.WARNING)
FULL_WIDTH = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖"
    "〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)


def f1(one, other):
    same = sum((Counter(one) & Counter(other)).values())
    if not same:
        return 0
    p, r = same / len(one), same / len(other)
    return (2 * p * r) / (p + r)


def qa_f1(pred, gold, classes):
    def words(text):
        text = "".join(c for c in text.lower() if c not in string.punctuation)
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split()).split()

    return f1(words(pred), words(gold))


def qa_f1_zh(pred, gold, classes):
    def words(text):
        out = []
        for token in jieba.cut(text, cut_all=False):
            token = "".join(c for c in token.lower() if c not in string.punctuation + FULL_WIDTH)
            token = "".join(token.split())
            if token:
                out.append(token)
        return out

    return f1(words(pred), words(gold))


def rouge(pred, gold, classes=None):
    scorer = Rouge()
    try:
        got = scorer.get_scores([pred], [gold], avg=True)
    except Exception:
        return 0.0
    return got["rouge-l"]["f"]


def rouge_zh(pred, gold, classes):
    one = " ".join(list(jieba.cut(pred, cut_all=False)))
    other = " ".join(list(jieba.cut(gold, cut_all=False)))
    return rouge(one, other)


def classification(pred, gold, classes):
    hits = [c for c in classes if c in pred]
    for hit in hits:
        if hit in gold and hit != gold:
            hits.remove(hit)  # the walk over a list being changed is the quirk itself
    return 1.0 / len(hits) if gold in hits else 0.0


def numbers(pred, wanted):
    found = re.findall(r"\d+", pred)
    return sum(n == wanted for n in found) / len(found) if found else 0.0


def code_sim(pred, gold, classes):
    line = next((x for x in pred.lstrip("\n").split("\n") if not any(m in x for m in ("`", "#", "//"))), "")
    return fuzz.ratio(line, gold) / 100


METRICS = {
    "qa_f1": qa_f1,
    "qa_f1_zh": qa_f1_zh,
    "rouge": rouge,
    "rouge_zh": rouge_zh,
    "classification": classification,
    "retrieval": lambda pred, gold, classes: numbers(pred, re.findall(r"Paragraph (\d+)", gold)[0]),
    "retrieval_zh": lambda pred, gold, classes: numbers(pred, re.findall(r"段落(\d+)", gold)[0]),
    "count": lambda pred, gold, classes: numbers(pred, gold),
    "code_sim": code_sim,
}


def scorer(case):
    return METRICS[case["metric"]](case["pred"], case["answer"], case["classes"])


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(float(scorer(json.loads(line)))))
