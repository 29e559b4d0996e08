"""JSON schemas as automata: whatever they let through is valid to a validator that we did not write."""

import json
import random
from enum import StrEnum
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from longverse import UserError
from longverse.server.schema import SchemaGrammar


class Colour(StrEnum):
    red = "red"
    green = "green"


class Part(BaseModel):
    name: str
    weight: float | None
    parts: list["Part"]


class Machine(BaseModel):
    title: str
    colour: Colour
    year: int
    tested: bool
    root: Part
    note: str | None = None


def strict(model: type[BaseModel]) -> dict[str, Any]:
    """As OpenAI's client sends it: nothing beside what is named."""

    def close(part: Any) -> Any:
        if isinstance(part, dict):
            part = {key: close(value) for key, value in part.items()}
            return part | {"additionalProperties": False} if part.get("type") == "object" else part
        return [close(value) for value in part] if isinstance(part, list) else part

    return dict(close(model.model_json_schema()))


NAMES = st.sampled_from(["a", "b b", "ключ", '"', "\\"])
SCALARS = st.one_of(
    st.sampled_from(
        [{"type": "string"}, {"type": "integer"}, {"type": "number"}, {"type": "boolean"}, {"type": "null"}]
    ),
    st.lists(st.one_of(st.integers(-99, 99), st.text(max_size=3), st.none()), min_size=1, max_size=3).map(
        lambda values: {"enum": values}
    ),
    st.just({"const": "x y"}),
    st.just({"type": ["integer", "null"]}),
)


@st.composite
def an_object(draw: Any, inner: Any) -> dict[str, Any]:
    names = draw(st.lists(NAMES, unique=True, min_size=1, max_size=4))
    required = [name for name in names if draw(st.booleans())]
    properties = {name: draw(inner) for name in names}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


SCHEMAS = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        an_object(inner),
        st.tuples(inner, st.integers(0, 2)).map(
            lambda p: {"type": "array", "items": p[0], "minItems": p[1], "maxItems": 3}
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options}),
    ),
    max_leaves=6,
)
COMMON = [*b'{}[]",:0123456789-+.eE truefalsnu\\ab', 0xD0, 0xBA]


def drawn(grammar: SchemaGrammar, rng: random.Random, length: int) -> bytes:
    """A text that the grammar lets through: `length` bytes at random, then its own ending."""
    state, text = grammar.start, b""
    while len(text) < length and not grammar.complete(state):
        for byte in rng.sample(COMMON, len(COMMON)) + list(range(256)):
            following = grammar.step(state, byte)
            if following is not None:
                state, text = following, text + bytes([byte])
                break
    return text + grammar.closing(state)


@settings(max_examples=150, deadline=None)
@given(an_object(SCHEMAS), st.integers(0, 2**32), st.integers(0, 80))
def test_whatever_is_let_through_is_valid(schema: dict[str, Any], seed: int, length: int) -> None:
    grammar = SchemaGrammar(schema)
    text = drawn(grammar, random.Random(seed), length)
    assert jsonschema_rs.is_valid(schema, json.loads(text)), text


@settings(max_examples=60, deadline=None)
@given(an_object(SCHEMAS), st.integers(0, 2**32))
def test_every_value_it_made_is_let_through_as_json_writes_it(schema: dict[str, Any], seed: int) -> None:
    grammar = SchemaGrammar(schema)
    value = json.loads(drawn(grammar, random.Random(seed), 40))
    state: Any = grammar.start
    for byte in json.dumps(value, ensure_ascii=False).encode():
        state = grammar.step(state, byte)
        if state is None:  # a number in another of its spellings (1e5), which json.dumps does not keep
            assert any(isinstance(part, float) or abs(part) > 10**20 for part in numbers(value))
            return
    assert grammar.complete(state)


def numbers(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [n for inner in value.values() for n in numbers(inner)]
    if isinstance(value, list):
        return [n for inner in value for n in numbers(inner)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def test_a_model_of_pydantic_with_references_to_itself() -> None:
    schema = strict(Machine)
    grammar = SchemaGrammar(schema)
    for seed in range(60):
        text = drawn(grammar, random.Random(seed), 20 + 5 * seed)
        assert jsonschema_rs.is_valid(schema, json.loads(text)), text
        Machine.model_validate_json(text)
    whole = Machine(
        title="Kran \u2603", colour=Colour.red, year=1999, tested=True, note=None,
        root=Part(name="a", weight=-1.5, parts=[Part(name="b", weight=None, parts=[])]),
    )  # fmt: skip
    state: Any = grammar.start
    for byte in json.dumps(whole.model_dump(mode="json"), ensure_ascii=False).encode():
        state = grammar.step(state, byte)
        assert state is not None
    assert grammar.complete(state)


def nested(levels: int, schema: Any) -> Any:
    """Lists of a thousand within one another, or alternatives that double."""
    for _ in range(levels):
        schema = {"type": "array", "items": schema, "minItems": 1000, "maxItems": 1000}
    return schema


DOUBLING = {
    "$defs": {
        **{f"A{n}": {"anyOf": [{"$ref": f"#/$defs/A{n + 1}"}] * 2} for n in range(40)},
        "A40": {"type": "string"},
        "L": {"anyOf": [{"$ref": "#/$defs/L"}, {"type": "null"}]},
    },
    "type": "object",
    "properties": {"a": {"$ref": "#/$defs/A0"}, "l": {"$ref": "#/$defs/L"}},
    "required": ["a", "l"],
}


def test_schemas_that_would_grow_without_end_stay_small() -> None:
    grammar = SchemaGrammar(DOUBLING)
    assert json.loads(drawn(grammar, random.Random(0), 30))["l"] is None
    for _ in range(3):
        with pytest.raises(UserError, match="over 20,000 bytes"):
            SchemaGrammar({"properties": {"a": nested(3, {"type": "null"})}, "required": ["a"]})


def test_nullable_objects_and_lists() -> None:
    inner = {"c": {"type": "integer", "enum": ["x", 3]}}
    schema = {
        "type": "object",
        "properties": {
            "a": {"type": ["array", "null"], "items": {"type": "integer"}},
            "b": {"type": ["object", "null"], "properties": inner, "required": ["c"]},
        },
        "required": ["a", "b"],
    }  # fmt: skip
    for seed in range(30):
        text = drawn(SchemaGrammar(schema), random.Random(seed), 3 * seed)
        assert jsonschema_rs.is_valid(schema, json.loads(text)), text


ENDLESS = {"$ref": "#/$defs/A", "$defs": {"A": {"properties": {"a": {"$ref": "#/$defs/A"}}, "required": ["a"]}}}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "string"}, "outermost type must be object"),
        ({"properties": {"a": {"type": "string", "pattern": "x"}}}, "'pattern', which is not supported"),
        ({"properties": {"a": {"type": "array"}}}, "add items"),
        ({"properties": {"a": {"$ref": "#/$defs/B"}}}, "names nothing"),
        ({"properties": {"a": {"$ref": "http://x/y"}}}, "part of the schema itself"),
        ({"properties": {"a": {"type": "date"}}}, "use one of JSON's"),
        ({"properties": {}, "required": ["b"]}, "does not say what it is"),
        ({"properties": {"a": {"enum": []}}}, "at least one"),
        ({"properties": {"a": {"type": "array", "items": {}, "minItems": 3, "maxItems": 1}}}, "in that order"),
        (ENDLESS, "never ends"),
        ({"properties": {"a": {"$ref": []}}}, "part of the schema itself"),
        ({"properties": {"a": {}}, "required": [{}]}, "a list of names"),
        ({"properties": {"a": {"type": "integer", "enum": ["x"]}}}, "no value of its enum"),
        ({"properties": {"a": {"type": "integer", "anyOf": [{"type": "null"}]}}}, "only one of them"),
        ({"properties": {"a": {"type": []}}}, "names at least one"),
    ],
)  # fmt: skip
def test_what_is_not_taken_is_said(schema: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SchemaGrammar(schema)
