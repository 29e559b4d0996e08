"""A JSON schema as an automaton over bytes, like those of `grammar.py`: every answer is a value that the schema allows.

Taken are the types, properties, required, additionalProperties: false, items with minItems and maxItems, enum, const,
anyOf, $ref and $defs; what a schema says besides of meaning (title, description, default, examples) is passed over, and
any other word is refused, because an answer that ignored it could be taken for one that fits. Values are written as
`json.dumps` writes them, properties in the schema's order, numbers without an exponent: one text for each value leaves
the model nothing to lose its way in.

Where a schema leaves a choice (anyOf, properties that may be left out, a number's end) several readings go side by
side: a state is the set of them. A reading is a stack of frames, the innermost last:

    ("lit", bytes left)          text that must come
    ("text", JSON state)         a string after its opening quote, or any object (grammar.step)
    ("num", mode, count, whole)  a number (modes of grammar.py; "" before its first character)
    ("node", n)                  a value of node n, not begun
    ("more", n, place, first)    inside object n, before property `place`, or inside list n after `place` items
"""

from __future__ import annotations

import json
from typing import Any

from ..errors import UserError
from .grammar import DIGITS, DONE, START, closing, number_step, step, whole_number

Frame = tuple[Any, ...]
Stack = tuple[Frame, ...]
Readings = frozenset[Stack]

MOST_NODES = 2_000
MOST_CHOICES = 64  # alternatives at one place
MOST_READINGS = 64  # side by side; of more, some are given up, which narrows the answer and keeps it valid
LONGEST = 20_000  # bytes of the shortest value a schema may ask for
KEPT = 20_000  # states whose following ones are remembered
ITEMS = 1_000  # of a list without maxItems
_SAID = {"title", "description", "default", "examples", "$schema", "$id", "$comment", "deprecated", "readOnly"}
_WORDS = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "minItems", "maxItems"},
}  # fmt: skip
_TEXT: Frame = ("text", ("s", "", 0))


class SchemaGrammar:
    """The automaton of one schema. UserError where the schema is wrong, or asks for what is not taken."""

    def __init__(self, schema: dict[str, Any]) -> None:
        self.root = schema
        self.nodes: list[tuple[Any, ...]] = []
        self._places: dict[str, int] = {}  # of what a $ref names
        first = self._node(schema, "the schema")
        self.choices = [self._choices(place) for place in range(len(self.nodes))]
        outermost = [self.nodes[place] for place in self.choices[first]]
        if not all(node[0] == "object" or node == ("frames", (("text", START),)) for node in outermost):
            raise UserError("The schema's outermost type must be object.")
        self.shortest = self._shortest()
        if self.shortest[first] is None:
            raise UserError(
                f"The schema asks for a value that never ends, or of over {LONGEST:,} bytes: it must hold itself, or"
                " very many things."
            )
        self.start: Readings = self._expanded((("node", first),))
        self._following: dict[tuple[Readings, int], Readings | None] = {}

    # ---- reading the schema --------------------------------------------------------------------------------

    def _node(self, schema: Any, where: str) -> int:
        """The number of a node that stands for `schema`."""
        place = len(self.nodes)
        if place >= MOST_NODES:
            raise UserError(f"The schema has more than {MOST_NODES:,} parts.")
        if not isinstance(schema, dict):
            raise UserError(f"{where} must be an object.")
        self.nodes.append(())  # it may be named from within
        self.nodes[place] = self._read(schema, where)
        return place

    def _read(self, schema: dict[str, Any], where: str) -> tuple[Any, ...]:
        words = set(schema) - _SAID - {"$defs", "definitions"}
        for alone in ("$ref", "const", "enum", "anyOf"):
            if alone in words:
                kept = {alone, "type"} if alone in ("const", "enum") else {alone}
                if others := words - kept:
                    raise UserError(f"{where} has {alone} and {min(others)}: only one of them is taken.")
                return self._alone(alone, schema[alone], where, schema.get("type"))
        kind = schema.get("type", "object" if "properties" in schema else None)
        if isinstance(kind, list):
            if not kind or not all(isinstance(one, str) for one in kind):
                raise UserError(f"{where} has the type {kind!r}: a list of types names at least one.")
            taken = {word for one in kind for word in _WORDS.get(one, set())}
            if others := words - {"type"} - taken:
                raise UserError(f"{where} asks for {min(others)!r}, which is not supported.")
            own = [{"type": one} | {w: schema[w] for w in _WORDS.get(one, set()) if w in schema} for one in kind]
            return ("any", tuple(self._node(one, where) for one in own))
        if others := words - {"type"} - _WORDS.get(str(kind), set()):
            raise UserError(f"{where} asks for {min(others)!r}, which is not supported.")
        if kind == "object":
            return self._object(schema, where)
        if kind == "array":
            return self._array(schema, where)
        if kind == "string":
            return ("frames", (_TEXT, ("lit", b'"')))
        if kind in ("number", "integer"):
            return ("frames", (("num", "", 0, kind == "integer"),))
        if kind in ("boolean", "null"):
            return ("words", (b"true", b"false") if kind == "boolean" else (b"null",))
        raise UserError(f"{where} has the type {kind!r}: use one of JSON's, or enum, const or anyOf.")

    def _alone(self, word: str, value: Any, where: str, kind: Any) -> tuple[Any, ...]:
        if word == "$ref" and not isinstance(value, str):
            raise UserError(f"$ref {value!r} is not supported: name a part of the schema itself, like #/$defs/Name.")
        if word == "$ref":
            if value not in self._places:
                self._places[value] = -1 - len(self.nodes)  # found again while it is being read
                self._places[value] = self._node(self._named(value), str(value))
            place = self._places[value]
            return ("any", (place if place >= 0 else -place - 1,))
        if word == "const":
            value = [value]
        if not isinstance(value, list) or not value:
            raise UserError(f"{where} has {word} {value!r}: it must be a list of at least one.")
        if word in ("const", "enum"):
            fitting = [one for one in value if kind is None or _is_of(one, kind)]
            if not fitting:
                raise UserError(f"{where} has the type {kind!r}, which no value of its {word} is of.")
            return ("words", tuple(dict.fromkeys(map(_dumped, fitting))))
        return ("any", tuple(self._node(one, f"{where}, anyOf") for one in value))

    def _named(self, ref: Any) -> Any:
        if not isinstance(ref, str) or not ref.startswith("#"):
            raise UserError(f"$ref {ref!r} is not supported: name a part of the schema itself, like #/$defs/Name.")
        part: Any = self.root
        for key in ref[1:].split("/")[1:]:
            key = key.replace("~1", "/").replace("~0", "~")
            if not isinstance(part, dict) or key not in part:
                raise UserError(f"$ref {ref!r} names nothing in the schema.")
            part = part[key]
        return part

    def _object(self, schema: dict[str, Any], where: str) -> tuple[Any, ...]:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        free = schema.get("additionalProperties", not properties)
        named = isinstance(required, list) and all(isinstance(name, str) for name in required)
        if not isinstance(properties, dict) or not named:
            raise UserError(f"{where}: properties must be an object and required a list of names.")
        if not isinstance(free, bool):
            raise UserError(f"{where}: additionalProperties can be true or false.")
        if missing := [name for name in required if name not in properties]:
            raise UserError(f"{where} requires {missing[0]!r} and does not say what it is.")
        if not properties and free:
            return ("frames", (("text", START),))
        rows = tuple(
            (_dumped(name) + b": ", self._node(inner, f"{where}.{name}"), name in required)
            for name, inner in properties.items()
        )
        return ("object", rows)

    def _array(self, schema: dict[str, Any], where: str) -> tuple[Any, ...]:
        least, most = schema.get("minItems", 0), schema.get("maxItems", ITEMS)
        if not all(isinstance(number, int) and not isinstance(number, bool) for number in (least, most)):
            raise UserError(f"{where}: minItems and maxItems must be whole numbers.")
        if not 0 <= least <= most or most > ITEMS:
            raise UserError(f"{where}: minItems {least} and maxItems {most} must be 0 to {ITEMS:,}, in that order.")
        if "items" not in schema:
            raise UserError(f"{where} is a list and does not say of what: add items.")
        return ("array", self._node(schema["items"], f"{where}, items"), least, most)

    def _choices(self, place: int) -> tuple[int, ...]:
        """The nodes that a node stands for: itself, or what its anyOf and $ref lead to, each once."""
        found, seen, waiting = [], {place}, [place]
        while waiting:
            node = self.nodes[one := waiting.pop()]
            if node[0] != "any":
                found.append(one)
                continue
            waiting += [part for part in node[1] if part not in seen]
            seen.update(node[1])
        if len(found) > MOST_CHOICES:
            raise UserError(f"The schema leaves a choice of {len(found)} at one place: {MOST_CHOICES} are taken.")
        return tuple(sorted(found))

    def _shortest(self) -> list[bytes | None]:
        """A shortest text of each node; None for one that can never end."""
        found: list[bytes | None] = [None] * len(self.nodes)
        changed = True
        while changed:
            changed = False
            for place in reversed(range(len(self.nodes))):  # what is named stands behind what names it
                text = self._shortest_of(self.nodes[place], found)
                if text is not None and (found[place] is None or len(text) < len(found[place] or b"")):
                    found[place], changed = text, True
        return found

    @staticmethod
    def _shortest_of(node: tuple[Any, ...], found: list[bytes | None]) -> bytes | None:
        kind, parts = node[0], node[1]
        if kind == "words":
            word: bytes = min(parts, key=len)
            return word if len(word) <= LONGEST else None
        if kind == "any":
            texts = [text for text in (found[part] for part in parts) if text is not None]
            return min(texts, key=len) if texts else None
        if kind == "array":
            inner = found[parts]
            if node[2] and (inner is None or node[2] * (len(inner) + 2) > LONGEST):
                return None
            return b"[" + b", ".join([inner or b""] * node[2]) + b"]"
        if kind == "object":
            needed = [(key, found[part]) for key, part, required in parts if required]
            if any(text is None for _, text in needed):
                return None
            if sum(len(key) + len(text or b"") + 2 for key, text in needed) > LONGEST:
                return None
            return b"{" + b", ".join(key + (text or b"") for key, text in needed) + b"}"
        return b"".join(map(_frame_ends, reversed(parts)))

    # ---- the automaton -------------------------------------------------------------------------------------

    def step(self, state: Readings, byte: int) -> Readings | None:
        """The state after one more byte; None when it cannot follow."""
        key = (state, byte)
        if key not in self._following:
            if len(self._following) >= KEPT:
                self._following.clear()
            readings = frozenset(reading for stack in state for reading in self._after(stack, byte))
            if len(readings) > MOST_READINGS:
                readings = frozenset(sorted(readings, key=repr)[:MOST_READINGS])
            self._following[key] = readings or None
        return self._following[key]

    def _after(self, stack: Stack, byte: int) -> Readings:
        if not stack:
            return frozenset()
        *rest, frame = stack
        below = tuple(rest)
        if frame[0] == "lit":
            if frame[1][0] != byte:
                return frozenset()
            return frozenset([(*below, ("lit", frame[1][1:]))]) if len(frame[1]) > 1 else self._expanded(below)
        if frame[0] == "text":
            following = step(frame[1], byte)
            if following is None:
                return frozenset()
            return self._expanded(below) if following == DONE else frozenset([(*below, ("text", following))])
        _, mode, count, whole = frame
        found: Readings = frozenset()
        further = number_step(mode, byte)
        # Past the limit a number may only be finished: its point wants a digit.
        room = count < DIGITS or not whole_number(mode)
        if further is not None and room and further in ("-01" if whole else "-01.f"):
            found |= {(*below, ("num", further, count + 1, whole))}
        if whole_number(mode):  # or it ended before this byte
            for reading in self._expanded(below):
                found |= self._after(reading, byte)
        return found

    def _expanded(self, stack: Stack) -> Readings:
        """The readings of a stack in which the innermost frame takes a byte; the empty stack is the end."""
        if not stack or stack[-1][0] not in ("node", "more"):
            return frozenset([stack])
        below, frame = stack[:-1], stack[-1]
        node = self.nodes[frame[1]]
        if frame[0] == "more":
            return self._more(below, frame, node)
        if node[0] == "words":
            return frozenset((*below, ("lit", word)) for word in node[1])
        if node[0] == "any":
            parts = self.choices[frame[1]]
            return frozenset(reading for part in parts for reading in self._expanded((*below, ("node", part))))
        if node[0] == "frames":
            return frozenset([(*below, *node[1])])
        opening = b"{" if node[0] == "object" else b"["
        return frozenset([(*below, ("more", frame[1], 0, True), ("lit", opening))])

    def _more(self, below: Stack, frame: Frame, node: tuple[Any, ...]) -> Readings:
        _, number, place, first = frame
        comma = b"" if first else b", "
        found: set[Stack] = set()
        if node[0] == "array":
            _, item, least, most = node
            if place >= least:
                found.add((*below, ("lit", b"]")))
            if place < most:
                inside = (*below, ("more", number, place + 1, False), ("node", item))
                found |= {(*inside, ("lit", comma))} if comma else self._expanded(inside)
            return frozenset(found)
        for next_place in range(place, len(node[1])):
            key, value, required = node[1][next_place]
            found.add((*below, ("more", number, next_place + 1, False), ("node", value), ("lit", comma + key)))
            if required:
                return frozenset(found)
        found.add((*below, ("lit", b"}")))
        return frozenset(found)

    def complete(self, state: Readings) -> bool:
        return () in state

    def in_text(self, state: Readings) -> bool:
        """Whether every reading is inside a string, where plain characters change nothing."""
        return all(stack and stack[-1][0] == "text" and stack[-1][1][0] in ("s", "S") for stack in state)

    def closing(self, state: Readings) -> bytes:
        """A short text that completes the value."""
        return min((self._ending(stack) for stack in state), key=len)

    def _ending(self, stack: Stack) -> bytes:
        text = b""
        for frame in reversed(stack):
            if frame[0] == "node":
                text += self.shortest[frame[1]] or b""
            elif frame[0] == "more":
                node, place, comma = self.nodes[frame[1]], frame[2], b"" if frame[3] else b", "
                if node[0] == "array":
                    for _ in range(place, node[2]):
                        text, comma = text + comma + (self.shortest[node[1]] or b""), b", "
                    text += b"]"
                    continue
                for key, value, required in node[1][place:]:
                    if required:
                        text, comma = text + comma + key + (self.shortest[value] or b""), b", "
                text += b"}"
            else:
                text += _frame_ends(frame)
        return text


def _frame_ends(frame: Frame) -> bytes:
    """The shortest rest of a frame that was begun."""
    if frame[0] == "lit":
        return bytes(frame[1])
    if frame[0] == "text":
        return closing(frame[1])
    return b"" if whole_number(frame[1]) else b"0"


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value is of a JSON type, or of one of a list of them."""
    if isinstance(kind, list):
        return any(_is_of(value, one) for one in kind)
    if isinstance(value, bool) or value is None:
        return bool(kind == ("boolean" if isinstance(value, bool) else "null"))
    if isinstance(value, (int, float)):
        return kind == "number" or (kind == "integer" and float(value).is_integer())
    return isinstance(value, {"string": str, "array": list, "object": dict}.get(str(kind), ()))


def _dumped(value: Any) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, UnicodeEncodeError):
        raise UserError("The schema holds a number or a text that JSON cannot say.") from None
