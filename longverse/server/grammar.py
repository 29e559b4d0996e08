"""JSON (RFC 8259) and calls of functions as automata over bytes: what may follow, and the shortest way to an end.

A state is a hashable tuple, so that what may follow it is computed once. Narrower than the standard, to keep an answer
finite and readable everywhere: runs of white space, nesting and numbers have a limit, and an escape writes no half of
a surrogate pair (such characters are written as themselves, in UTF-8).
"""

from collections.abc import Iterable
from functools import lru_cache

State = tuple  # (part, ...) of a grammar; the JSON states are (mode, stack, count)

SPACES = 24  # characters of white space in a row
DEPTH = 32  # objects and lists inside one another
DIGITS = 24  # characters of a number

# The second byte of a UTF-8 character and how many more follow, by its first byte (Unicode 15, table 3-7).
_UTF8 = {
    **dict.fromkeys(range(194, 224), (128, 191, 0)),
    0xE0: (0xA0, 0xBF, 1), **dict.fromkeys(range(225, 240), (128, 191, 1)), 0xED: (0x80, 0x9F, 1),
    0xF0: (0x90, 0xBF, 2), **dict.fromkeys(range(241, 244), (128, 191, 2)), 0xF4: (0x80, 0x8F, 2),
}  # fmt: skip
_HEX = frozenset(b"0123456789abcdefABCDEF")
# Numbers: what may follow in each of their modes.
_NUMBER = {
    "-": {**dict.fromkeys(b"123456789", "1"), ord("0"): "0"},
    "0": {ord("."): ".", ord("e"): "e", ord("E"): "e"},
    "1": {**dict.fromkeys(b"0123456789", "1"), ord("."): ".", ord("e"): "e", ord("E"): "e"},
    ".": dict.fromkeys(b"0123456789", "f"),
    "f": {**dict.fromkeys(b"0123456789", "f"), ord("e"): "e", ord("E"): "e"},
    "e": {**dict.fromkeys(b"0123456789", "x"), ord("+"): "+", ord("-"): "+"},
    "+": dict.fromkeys(b"0123456789", "x"),
    "x": dict.fromkeys(b"0123456789", "x"),
}
_WHOLE = frozenset("01fx")  # modes in which a number may end

# Modes besides the numbers': "{" only an object may come; "v" a value; "[" a value or ]; "k" a key or }; "K" a key;
# "s" inside a text, "S" inside a key; "\\" and "u…" inside an escape; "8" inside a character; ":" before the colon;
# "t" inside true, false or null; "a" after a value; "d" done. `stack` holds "o" and "l" for open objects and lists.
START: State = ("{", "", 0)
DONE: State = ("d", "", 0)


@lru_cache(maxsize=2**16)
def step(state: State, byte: int) -> State | None:
    """The state after one more byte; None when it cannot follow."""
    mode, stack, count = state
    if mode in ("s", "S"):
        return _in_text(mode, stack, byte)
    if mode[0] in "\\u8":
        return _in_escape(mode, stack, count, byte)
    if mode in _NUMBER:
        following = _NUMBER[mode].get(byte)
        if following is not None:
            # Past the limit a number may only be finished: its point or its e wants a digit.
            return (following, stack, count + 1) if count < DIGITS or mode not in _WHOLE else None
        return step(("a", stack, 0), byte) if mode in _WHOLE else None
    if mode[0] == "t":
        if mode[1] != chr(byte):
            return None
        return (f"t{mode[2:]}", stack, 0) if len(mode) > 2 else _value_done(stack)
    if byte in b" \t\n\r":
        return (mode, stack, count + 1) if mode != "d" and count < SPACES else None
    if mode == "a":
        return _after_value(stack, byte)
    if mode == ":":
        return ("v", stack, 0) if byte == ord(":") else None
    if mode in ("k", "K"):
        if byte == ord('"'):
            return ("S", stack, 0)
        return _value_done(stack[:-1]) if byte == ord("}") and mode == "k" else None
    return _begin_value(mode, stack, byte)


def number_step(mode: str, byte: int) -> str | None:
    """The mode of a number after one more character; mode "" before its first. None when it cannot follow."""
    if not mode:
        return "-" if byte == ord("-") else {ord("0"): "0"}.get(byte, "1" if byte in b"123456789" else None)
    return _NUMBER[mode].get(byte)


def whole_number(mode: str) -> bool:
    """Whether a number may end in a mode."""
    return mode in _WHOLE


def _begin_value(mode: str, stack: str, byte: int) -> State | None:
    character = chr(byte)
    if mode == "d" or (mode == "{" and character != "{"):
        return None
    if character in "{[":
        if len(stack) == DEPTH:
            return None
        return ("k", stack + "o", 0) if character == "{" else ("[", stack + "l", 0)
    if character == "]":
        return _value_done(stack[:-1]) if mode == "[" else None
    if character == '"':
        return ("s", stack, 0)
    if character in "tfn":
        return ("t" + {"t": "rue", "f": "alse", "n": "ull"}[character], stack, 0)
    if character == "-":
        return ("-", stack, 1)
    if character in "0123456789":
        return ("0" if character == "0" else "1", stack, 1)
    return None


def _value_done(stack: str) -> State:
    return ("a", stack, 0) if stack else DONE


def _after_value(stack: str, byte: int) -> State | None:
    inside = stack[-1]
    if byte == ord(","):
        return ("K", stack, 0) if inside == "o" else ("v", stack, 0)
    if byte == ord("}" if inside == "o" else "]"):
        return _value_done(stack[:-1])
    return None


def _in_text(mode: str, stack: str, byte: int) -> State | None:
    if byte == ord('"'):
        return _value_done(stack) if mode == "s" else (":", stack, 0)
    if byte == ord("\\"):
        return ("\\" + mode, stack, 0)
    if byte < 0x20:
        return None
    if byte < 0x80:
        return (mode, stack, 0)
    return (f"8{mode}", stack, byte << 8) if byte in _UTF8 else None


def _in_escape(mode: str, stack: str, count: int, byte: int) -> State | None:
    kind, text = mode[0], mode[-1]
    if kind == "\\":
        if byte == ord("u"):
            return ("u" + text, stack, 0)
        return (text, stack, 0) if byte in b'"\\/bfnrt' else None
    if kind == "u":  # count: digits read, and 16 more where the first was d
        if byte not in _HEX or (count == 17 and byte not in b"01234567"):
            return None
        count = count + 1 + (16 if count == 0 and byte in b"dD" else 0)
        return (text, stack, 0) if count & 15 == 4 else (mode, stack, count)
    first, left = count >> 8, count & 255  # of a character: its first byte, or how many plain bytes are left
    low, high, more = _UTF8[first] if first else (0x80, 0xBF, left - 1)
    if not low <= byte <= high:
        return None
    return (mode, stack, more) if more else (text, stack, 0)


@lru_cache(maxsize=2**14)
def closing(state: State) -> bytes:
    """The shortest text that ends the JSON from here (nearly: a started word or number is finished as it began)."""
    mode, stack, count = state
    ends = "".join({"o": "}", "l": "]"}[open_] for open_ in reversed(stack)).encode()
    if mode == "d":
        return b""
    if mode == "{":
        return b"{}"
    if mode == "s":
        return b'"' + ends
    if mode == "S":
        return b'":null' + ends
    if mode[0] in "\\u8":
        rest = closing((mode[-1], stack, 0))
        if mode[0] == "\\":
            return b"n" + rest
        if mode[0] == "u":
            return b"0" * (4 - (count & 15)) + rest
        low, _, more = _UTF8[count >> 8] if count >> 8 else (0x80, 0, (count & 255) - 1)
        return bytes([low]) + b"\x80" * more + rest
    if mode in _NUMBER:
        return (b"" if mode in _WHOLE else b"0") + ends
    if mode[0] == "t":
        return mode[1:].encode() + ends
    if mode in ("k", "[", "a"):
        return ends
    return {"v": b"null", ":": b":null", "K": b'"":null'}[mode] + ends


class Grammar:
    """A sequence of parts, each either one of several words or a JSON object. A state is (part, inner state).

    The words of one part must not begin one another.
    """

    def __init__(self, parts: Iterable[frozenset[bytes] | None]) -> None:
        self.parts = tuple(parts)  # None: a JSON object
        self.start: State = self._enter(0)

    def step(self, state: State, byte: int) -> State | None:
        """The state after one more byte; None when it cannot follow."""
        place, inner = state
        if place == len(self.parts):
            return None
        words = self.parts[place]
        if words is None:
            following = step(inner, byte)
            if following is None:
                return None
            return self._enter(place + 1) if following == DONE else (place, following)
        begun = inner + bytes([byte])
        if begun in words:
            return self._enter(place + 1)
        return (place, begun) if any(word.startswith(begun) for word in words) else None

    def complete(self, state: State) -> bool:
        return state[0] == len(self.parts)

    def in_text(self, state: State) -> bool:
        """Whether the state is inside a JSON text, where plain characters change nothing."""
        place, inner = state
        return place < len(self.parts) and self.parts[place] is None and inner[0] in ("s", "S")

    def closing(self, state: State) -> bytes:
        """A short text that completes the grammar."""
        place, inner = state
        if place == len(self.parts):
            return b""
        words = self.parts[place]
        if words is None:
            return closing(inner) + self.closing(self._enter(place + 1))
        best = min((word[len(inner) :] for word in words if word.startswith(inner)), key=len)
        return best + self.closing(self._enter(place + 1))

    def _enter(self, place: int) -> State:
        return (place, START if place < len(self.parts) and self.parts[place] is None else b"")


JSON_OBJECT = Grammar([None])
