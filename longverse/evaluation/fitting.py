"""Texts of an exact number of tokens.

A claim about "8,000 tokens" is only worth something when the prompt the model sees, chat template included,
has 8,000 tokens. Token counts of pieces do not add up (merges cross their borders), so the whole prompt is
counted: whole sentences are added up to the last that fits, then a sentence of pad words closes the gap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from longverse.errors import UserError


@dataclass(frozen=True)
class PadWords:
    """How a language pads: `opening` + `word` as often as needed + some of `fine` + `closing`."""

    opening: str
    word: str
    fine: tuple[str, ...]  # words of other token costs, to hit the number where `word` steps over it
    closing: str

    def sentence(self, words: int, extra: tuple[str, ...] = ()) -> str:
        return self.opening + self.word * words + "".join(extra) + self.closing


ENGLISH_PAD = PadWords("So it went on", " and on", (" so", " ah", " then", " oh", " well", ".", ";", "-"), ". ")
CHINESE_PAD = PadWords("就这样", "过去", ("了", "吧", "呢", "啊", "的", ".", ";", "-"), "。")
PADS = {"en": ENGLISH_PAD, "zh": CHINESE_PAD}


ROOM = 40  # tokens: more than the shortest pad text and its finest steps take


def largest_that_fits(fits: Callable[[int], bool], guess: int, limit: int) -> int:
    """The largest n in [0, limit] for which `fits(n)` holds, for a monotone `fits`; -1 if not even 0 does.

    The search gallops out from `guess`, so a good guess costs a handful of calls.
    """
    guess = max(0, min(guess, limit))
    step = 1
    if fits(guess):
        low, high = guess, limit + 1
        while low + step <= limit:
            if fits(low + step):
                low += step
                step *= 2
            else:
                high = low + step
                break
    else:
        low, high = -1, guess
        while high - step >= 0:
            if fits(high - step):
                low = high - step
                break
            high -= step
            step *= 2
        else:
            if high > 0 and fits(0):
                low = 0
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def padding_for(count: Callable[[str], int], target: int, pad: PadWords) -> str | None:
    """A pad text with `count(text) == target`, or None where no combination of pad words hits the number.

    count: tokens of the whole prompt with the given pad text put in; count("") <= target.
    """
    missing = target - count("")
    if missing == 0:
        return ""
    if missing < 0:
        return None
    words = 0
    have = count(pad.sentence(0))
    # One word of padding may cost several tokens: step by what is missing at the measured price of a word.
    if have < target:
        price = max(1, count(pad.sentence(2)) - count(pad.sentence(1)))
        for _ in range(8):
            step = (target - have) // price
            if step == 0:
                break
            words = max(0, words + step)
            have = count(pad.sentence(words))
            if have > target:
                words = max(0, words - -(-(have - target) // price))
                have = count(pad.sentence(words))
    if have == target:
        return pad.sentence(words)
    for fewer in range(min(words, 3) + 1):
        found = _finish(count, target, pad, words - fewer)
        if found is not None:
            return found
    return None


def _finish(count: Callable[[str], int], target: int, pad: PadWords, words: int) -> str | None:
    extra: tuple[str, ...] = ()
    have = count(pad.sentence(words))
    while have < target and len(extra) < 12:
        step = None
        for fine in pad.fine:
            tokens = count(pad.sentence(words, (*extra, fine)))
            if have < tokens <= target and (step is None or tokens > step[0]):
                step = (tokens, fine)
                if tokens == target:
                    break
        if step is None:
            return None
        have, extra = step[0], (*extra, step[1])
    return pad.sentence(words, extra) if have == target else None


def fit(
    count: Callable[[int, str], int], target: int, prices: Sequence[int], overhead: int, pad: PadWords
) -> tuple[int, str]:
    """How many whole sentences, and which pad text, give a prompt of exactly `target` tokens.

    count(n, padding): tokens of the whole prompt with the first n sentences; prices: tokens of each sentence
    alone (an estimate that starts the search); overhead: tokens of the prompt without any sentence.
    Raises UserError when the frame alone is longer than the target, or no pad hits it exactly.
    """
    if overhead > target:
        raise UserError(
            f"A prompt of {target:,} tokens was asked for, but question and template alone take {overhead:,}; "
            "ask for a longer one."
        )
    guess, total = 0, overhead
    while guess < len(prices) and total + prices[guess] <= target:
        total += prices[guess]
        guess += 1
    most = largest_that_fits(lambda n: count(n, "") <= target, guess, len(prices))
    # Six of them leave room for the shortest pad text where they are sentences; where they are words it takes more.
    for sentences in range(most, max(-1, most - 60), -1):
        if sentences <= most - 6 and target - count(sentences, "") > ROOM:
            break
        padding = padding_for(lambda text, n=sentences: count(n, text), target, pad)  # type: ignore[misc]
        if padding is not None:
            return sentences, padding
    raise UserError(f"No text of exactly {target:,} tokens could be built with this tokenizer; ask for another length.")
