"""Conversations about invented annual reports, as `longverse ask` holds them: what smol's recipe learns reports from.

    python recipes/smol_reports.py build/smol-reports.jsonl

The reports are those of `longverse demo`, from seeds that neither it nor any benchmark uses (5,000 and up): names and
facts are others, the templates are the same. So reports measure what smol does in a field it knows; kinds of fact that
it never saw are measured by benchmarks/smol_facts.py.
"""

import json
import random
import sys
from pathlib import Path

from longverse.data.long_sft.prompts import variants
from longverse.documents.prompts import asked, messages
from longverse.documents.report import generate_report, unanswerable
from longverse.models.shards import replacing

FIRST_SEED = 5_000
WORDS = {"en": ((500, 1_200, 90), (1_200, 2_700, 70), (2_700, 5_400, 45), (5_400, 10_500, 35))}  # from, to, reports
WORDS["zh"] = tuple((low * 10 // 11, high * 10 // 11, count * 4 // 5) for low, high, count in WORDS["en"])


def conversation(seed: int, words: int, language: str) -> list[dict[str, str]]:
    """One report, a question for every 130 words and as many as 36; one in five has no answer there."""
    rng = random.Random(seed)
    wanted = min(36, max(4, words // 130))
    absent = unanswerable(generate_report(seed, target_words=words, questions=1, language=language), wanted // 5, seed)
    report = generate_report(seed, target_words=words, questions=wanted - len(absent), language=language)
    turns = [(fact.question, fact.sentence) for fact in report.facts]
    turns += [(question, variants("not_stated", language)[0]) for question in absent]
    rng.shuffle(turns)
    talk = messages(report.text, turns[0][0])
    for number, (question, answer) in enumerate(turns):
        if number:
            talk.append({"role": "user", "content": asked(question)})
        talk.append({"role": "assistant", "content": answer})
    return talk


def main(target: Path) -> None:
    rng = random.Random(7)
    seed = FIRST_SEED
    lines = []
    for language, buckets in WORDS.items():
        for low, high, count in buckets:
            for _ in range(count):
                talk = conversation(seed, rng.randint(low, high), language)
                lines.append(json.dumps({"messages": talk}, ensure_ascii=False))
                seed += 1
    rng.shuffle(lines)
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as beside:
        beside.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
