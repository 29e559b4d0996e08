"""Grammars over tokens: which tokens of a vocabulary may come next, always leaving room to end the text in time.

For every state of the grammar the cost of each token is kept: how many tokens an ending takes after it. A token is
allowed while that many remain, so the text is whole even where max_new_tokens ends it early. Inside a JSON text almost
every token is allowed and changes nothing: those are known beforehand, and only the others are tried.
"""

from bisect import bisect_left
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..models.tokenizer import Tokenizer
from .grammar import Grammar
from .schema import SchemaGrammar

NEVER = 2**15 - 1
KEPT = 128  # states whose costs are kept
COUNTED, COUNTED_BYTES = 20_000, 400  # texts whose count is remembered, and the longest of them


class Vocabulary:
    """The bytes of every token, sorted, once for a tokenizer. UserError where they are not known."""

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        """size: rows of the embedding; ids past the tokenizer's own are never allowed."""
        self.size = size
        self.end_ids = sorted(tokenizer.eos_ids)
        if not self.end_ids:
            raise UserError("This tokenizer names no end token, which JSON mode and forced tool calls need.")
        spelled = []
        for token in range(size):
            text = tokenizer.token_bytes(token)
            if text and token not in tokenizer.eos_ids:
                spelled.append((text, token))
        spelled.sort()
        self.texts = [text for text, _ in spelled]
        self.ids = [token for _, token in spelled]
        single = {text[0] for text in self.texts if len(text) == 1}
        if not single >= set(b'{}[]":,\\/0123456789-+.eEtrufalsn \n') | set(range(0x80, 0xC0)) - _unused(self.texts):
            raise UserError("This tokenizer cannot spell every character of JSON: JSON mode needs one that can.")
        self._bytes = dict(zip(self.ids, self.texts, strict=True))
        self._known = frozenset(self.texts)
        self._longest = max(map(len, self.texts))
        self._counts: dict[bytes, int] = {}
        safe = [_plain(text) for text in self.texts]
        self.safe = torch.zeros(size, dtype=torch.bool)  # [V]: allowed everywhere inside a JSON text
        self.safe[[token for token, ok in zip(self.ids, safe, strict=True) if ok]] = True
        self.unsafe_texts = [text for text, ok in zip(self.texts, safe, strict=True) if not ok]
        self.unsafe_ids = [token for token, ok in zip(self.ids, safe, strict=True) if not ok]

    def count(self, text: bytes) -> int:
        """Tokens that spell `text`, the longest first, and at most NEVER. What they spell so can also be written so:
        after the first of them the rest takes one less."""
        known = self._counts.get(text)
        if known is not None:
            return known
        count = place = 0
        while place < len(text) and count < NEVER:
            longest = min(self._longest, len(text) - place)
            place += next(n for n in range(longest, 0, -1) if text[place : place + n] in self._known)
            count += 1
        if len(text) <= COUNTED_BYTES:
            if len(self._counts) >= COUNTED:
                self._counts.clear()
            self._counts[text] = count
        return count

    def bytes_of(self, token: int) -> bytes:
        """What the token adds to the text; nothing for special tokens."""
        return self._bytes.get(token, b"")


def _unused(texts: list[bytes]) -> set[int]:
    """Continuation bytes that no token can make necessary: all of them where every token is whole characters."""
    return set() if any(_broken(text) for text in texts) else set(range(0x80, 0xC0))


def _broken(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return True
    return False


def _plain(text: bytes) -> bool:
    return not _broken(text) and not any(byte < 0x20 or byte in b'"\\' for byte in text)


class Costs:
    """Costs of a grammar's states over a vocabulary; shared by all answers of that grammar."""

    def __init__(self, grammar: Grammar | SchemaGrammar, vocabulary: Vocabulary) -> None:
        self.grammar: Any = grammar  # its states are its own affair
        self.vocabulary = vocabulary
        self._kept: OrderedDict[Any, Tensor] = OrderedDict()

    def of(self, state: Any) -> Tensor:
        """int16 [V]: tokens that an ending takes after each token; NEVER where it cannot follow."""
        found = self._kept.get(state)
        if found is None:
            found = self._kept[state] = self._computed(state)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(state)
        return found

    def _computed(self, state: Any) -> Tensor:
        grammar, words = self.grammar, self.vocabulary
        costs = torch.full((words.size,), NEVER, dtype=torch.int16)
        texts, ids = words.texts, words.ids
        if grammar.in_text(state):
            costs[words.safe] = words.count(grammar.closing(state))
            texts, ids = words.unsafe_texts, words.unsafe_ids
        found_ids, found_costs = [], []
        states = [state]  # states[n]: after the first n bytes of `walked`
        walked = b""
        place = 0
        while place < len(texts):
            text = texts[place]
            same = 0
            limit = min(len(text), len(walked))
            while same < limit and text[same] == walked[same]:
                same += 1
            del states[same + 1 :]
            while same < len(text):
                following = grammar.step(states[-1], text[same])
                if following is None:
                    break
                states.append(following)
                same += 1
            walked = text[:same]
            if same < len(text):  # nothing that begins so can follow
                place = _past(texts, text[: same + 1], place + 1)
                continue
            found_ids.append(ids[place])
            found_costs.append(words.count(grammar.closing(states[-1])))
            place += 1
        costs[found_ids] = torch.tensor(found_costs, dtype=torch.int16)
        return costs


def _past(texts: list[bytes], prefix: bytes, place: int) -> int:
    """The first place from `place` on whose text does not begin with `prefix`, in a sorted list."""
    above = prefix.rstrip(b"\xff")
    return bisect_left(texts, above[:-1] + bytes([above[-1] + 1]), lo=place) if above else len(texts)


class Forced:
    """A Constraint: the whole answer is a text of the grammar, and then the end token."""

    def __init__(self, costs: Costs, max_new_tokens: int) -> None:
        self.costs, self.left = costs, max_new_tokens
        self.state = costs.grammar.start
        shortest = costs.vocabulary.count(costs.grammar.closing(self.state))
        if shortest > max_new_tokens:
            raise UserError(
                f"The answer may have {max_new_tokens:,} tokens and its form alone takes {shortest:,}: allow more."
            )

    @property
    def complete(self) -> bool:
        return self.costs.grammar.complete(self.state)

    def allowed(self, size: int) -> Tensor:
        if self.complete:
            mask = torch.zeros(size, dtype=torch.bool)
            mask[self.costs.vocabulary.end_ids] = True
            return mask
        return self.costs.of(self.state) < min(self.left, NEVER)  # after this token left - 1 remain

    def accept(self, token: int) -> None:
        self.left -= 1
        if self.complete:
            return
        for byte in self.costs.vocabulary.bytes_of(token):
            following = self.costs.grammar.step(self.state, byte)
            assert following is not None
            self.state = following


class AfterTag:
    """A Constraint: free text, and after `tag` a text of the grammar; as often as the answer likes, or with `once` one
    time, and then the end token."""

    def __init__(self, costs: Costs, tag: bytes, max_new_tokens: int, once: bool = False) -> None:
        self.costs, self.tag, self.max_new_tokens, self.left = costs, tag, max_new_tokens, max_new_tokens
        self.once = once
        self.tail = b""
        self.forced: Forced | None = None

    def allowed(self, size: int) -> Tensor | None:
        return self.forced.allowed(size) if self.forced is not None else None

    def accept(self, token: int) -> None:
        self.left -= 1
        if self.forced is not None:
            self.forced.accept(token)
            if self.forced.complete and not self.once:
                self.forced, self.tail = None, b""
            return
        text = self.tail + self.costs.vocabulary.bytes_of(token)
        at = text.find(self.tag)
        if at < 0:
            self.tail = text[-len(self.tag) + 1 :]
            return
        self.tail = b""
        grammar = self.costs.grammar
        state: Any = grammar.start
        for byte in text[at + len(self.tag) :]:
            state = grammar.step(state, byte)
            if state is None:  # the tag's last token went on in another way: a text about the tag, and no call
                return
        if self.costs.vocabulary.count(grammar.closing(state)) <= self.left:
            self.forced = Forced(self.costs, self.max_new_tokens)
            self.forced.state, self.forced.left = state, self.left
