"""The direction of imports, read from the source: models <- inference <- documents <- server, cli; data <- train."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "longverse"

# What each room may import from the others. The command files (cli, console, commands_*) may import everything.
MAY_IMPORT = {
    "errors": set(),
    "plan": {"errors"},
    "textfiles": {"errors"},
    "web": set(),
    "wording": set(),
    "models": {"errors"},
    "inference": {"errors", "plan", "models"},
    "documents": {"errors", "textfiles", "wording", "models", "inference"},
    "data": {"errors", "web", "wording", "models"},
    "train": {"errors", "models", "data", "inference", "evaluation"},  # extend measures what it trained
    "evaluation": {"errors", "textfiles", "web", "models", "inference"},
    "api": {"errors", "models", "inference", "documents"},
    "server": {"errors", "models", "inference", "documents"},
}
KERNELS = {"numba", "llvmlite", "triton"}
OPTIONAL = {"triton", "numba", "fastapi", "matplotlib", "pyarrow", "datasets", "peft", "jieba", "rouge"}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms of longverse that a file imports anywhere in it, also inside functions."""
    found = set()
    package = ("longverse", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = [*base, *(node.module.split(".") if node.module else [])]
            names = [[*module, alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        else:
            continue
        found |= {name[1] for name in names if name[0] == "longverse" and len(name) > 1}
    return found - {"__version__", "UserError", room(path)}


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    here = room(path)
    if here in ("cli", "console", "__init__") or here.startswith("commands_"):
        return
    assert here in MAY_IMPORT, f"{here} has no place in MAY_IMPORT: give it one"
    assert imported_rooms(path) <= MAY_IMPORT[here]


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_commands_print(path: Path) -> None:
    here = room(path)
    if here in ("cli", "console", "server") or here.startswith("commands_"):
        return
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not [c.lineno for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_optional_packages_are_imported_where_they_are_used(path: Path) -> None:
    top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {a.name.split(".")[0] for node in top if isinstance(node, ast.Import) for a in node.names}
    names |= {(node.module or "").split(".")[0] for node in top if isinstance(node, ast.ImportFrom) and not node.level}
    # `serve` alone imports its room, and the kernels' files are imported where a kernel is first used.
    used = {"fastapi"} if room(path) == "server" else KERNELS if path.parent.name == "kernels" else set()
    assert not names & OPTIONAL - used


def loaded_after(code: str, environment: dict[str, str]) -> set[str]:
    """Top-level modules loaded in a fresh interpreter after running `code`."""
    script = f"{code}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment, cwd=ROOT
    )
    return set(out.stdout.split())


def test_help_imports_no_torch_and_the_engine_no_transformers() -> None:
    command = {**os.environ, "LONGVERSE_COMMAND": "1"}
    assert not loaded_after("import longverse.cli", command) & {"torch", "transformers", "numpy"}
    assert not loaded_after("import longverse.inference.engine", command) & {"transformers", "gguf"}
    library = {k: v for k, v in os.environ.items() if k != "LONGVERSE_COMMAND"}
    ours = OPTIONAL - {"triton"}  # transformers loads it where it is installed
    assert not loaded_after("import longverse", library) & (ours | {"scipy", "pandas"})
