"""The prompts of the builder, read from `en.md` and `zh.md` beside this file."""

from __future__ import annotations

import random
import re
from functools import lru_cache
from pathlib import Path


@lru_cache
def _all(language: str) -> dict[str, list[str]]:
    text = (Path(__file__).parent / f"{language}.md").read_text(encoding="utf-8")
    sections: dict[str, list[str]] = {}
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        name, _, body = section.partition("\n")
        sections[name.strip()] = [variant.strip("\n") for variant in re.split(r"^---$", body, flags=re.MULTILINE)]
    return sections


def variants(name: str, language: str) -> list[str]:
    """All variants of a prompt in a language (anything but Chinese is asked in English)."""
    return _all("zh" if language == "zh" else "en")[name]


def prompt(name: str, language: str, rng: random.Random, **values: object) -> str:
    """One variant, its `{name}` places filled; places without a value stay (the builder fills {documents} last)."""
    return fill(rng.choice(variants(name, language)), **values)


def fill(template: str, **values: object) -> str:
    """Replace `{name}` by a value, in one pass: braces inside values (documents, code) are left alone."""
    return re.sub(r"\{(\w+)\}", lambda m: str(values.get(m[1], m[0])), template)
