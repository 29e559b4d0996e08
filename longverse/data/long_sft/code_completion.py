"""Code completion across a repository: the next lines use a definition that stands in another file.

The file with the definition (a much imported one is more likely) stands among the others at the wanted depth; the
file to be continued breaks off before the first line that uses the definition.
"""

from __future__ import annotations

import ast
import random
import re
from dataclasses import dataclass
from functools import lru_cache

from longverse.data.long_sft.context import Context, Spec
from longverse.data.long_sft.draft import Draft, Reject
from longverse.data.long_sft.multi_doc import Question, Stand, collection, gather
from longverse.data.long_sft.offline_code import Definition, Lines, definitions, parse
from longverse.data.long_sft.pool import PoolDocument
from longverse.data.long_sft.prompts import prompt

_IMPORT = re.compile(r"^\s*(?:from\s+([\w.]+)\s+import|import\s+([\w.]+))", re.MULTILINE)


@dataclass(frozen=True)
class _Use:
    """Line `line` (0-based) of a file is the first to use `definition` of the file `index`; the statement ends at
    `last`."""

    line: int
    last: int
    definition: Definition
    index: int


def code_completion(context: Context, spec: Spec) -> Draft:
    """Continue a file by 1 to 6 lines that call what another file defines."""
    rng = spec.rng
    graph = _graph(context)
    for _ in range(60):
        module = rng.choices(graph.modules, graph.weights)[0]
        user = rng.choice(graph.importers[module])
        uses = _uses(context, user, module)
        if uses:
            return _draft(context, spec, rng, user, rng.choice(uses))
    raise Reject("no call across files found")


@dataclass(frozen=True)
class _Graph:
    """importers: for a document, the documents of its source that import it; weights: how often, damped."""

    modules: list[int]
    weights: list[float]
    importers: dict[int, list[int]]


@lru_cache(maxsize=1)
def _graph(context: Context) -> _Graph:
    names: dict[tuple[str, str], int] = {}
    documents = [d for d in context.documents("code") if d.title.endswith(".py") and d.characters < 300_000]
    for document in documents:
        module = document.title.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        names[document.source, module] = document.index
    importers: dict[int, list[int]] = {}
    for document in documents:
        package = document.title.rpartition("/")[0].replace("/", ".")
        seen = set()
        for match in _IMPORT.finditer(context.pool.text(document.index)):
            name = match[1] or match[2]
            if name.startswith("."):
                name = f"{package}.{name[1:]}".strip(".") if not name.startswith("..") else ""
            target = names.get((document.source, name))
            if target is not None and target != document.index and target not in seen:
                seen.add(target)
                importers.setdefault(target, []).append(document.index)
    if not importers:
        raise Reject("no call across files found")
    modules = sorted(importers)
    return _Graph(modules, [len(importers[m]) ** 0.5 for m in modules], importers)


@lru_cache(maxsize=256)
def _uses(context: Context, user: int, module: int) -> tuple[_Use, ...]:
    """First uses in `user` of names that `module` defines, in statements of 1 to 6 lines, early enough to be shown."""
    text, other = context.pool.text(user), context.pool.text(module)
    tree, other_tree = parse(text), parse(other)
    if tree is None or other_tree is None:
        return ()
    title = context.pool.documents[module].title.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    # A name that the file defines as well leaves open which definition is meant.
    own = {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    defined = {d.name: d for d in definitions(other, other_tree) if d.name not in own}
    aliases: dict[str, str] = {}  # how the module's names appear in the user's code
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[-1] == title.split(".")[-1]:
            aliases.update({a.asname or a.name: a.name for a in node.names if a.name in defined})
        elif isinstance(node, ast.Import):
            aliases.update(
                {f"{a.asname or a.name}.{name}": name for a in node.names if a.name == title for name in defined}
            )
    lines = Lines(text)
    uses, seen = [], set()
    statements = [n for n in ast.walk(tree) if isinstance(n, (ast.Assign, ast.Expr, ast.Return, ast.AugAssign))]
    for statement in sorted(statements, key=lambda n: n.lineno):
        for node in ast.walk(statement):
            if not isinstance(node, ast.Call):
                continue
            name = aliases.get(ast.unparse(node.func)) if isinstance(node.func, (ast.Name, ast.Attribute)) else None
            if name is None or name in seen:
                continue
            seen.add(name)
            first, last = statement.lineno - 1, (statement.end_lineno or statement.lineno) - 1
            answer = "\n".join(lines.lines[first : last + 1])
            before = text[: lines.starts[first]]
            if last - first < 6 and 15 <= len(answer) <= 500 and len(before) <= 14_000 and name in answer:
                call = re.compile(rf"\b{re.escape(name)}\s*\(")
                if not call.search(before) and answer.strip() not in before:
                    uses.append(_Use(first, last, defined[name], module))
    return tuple(uses)


def _draft(context: Context, spec: Spec, rng: random.Random, user: int, use: _Use) -> Draft:
    text = context.pool.text(user)
    lines = text.split("\n")
    prefix = f"# {context.pool.documents[user].title}\n" + "\n".join(lines[: use.line]) + "\n"
    answer = "\n".join(lines[use.line : use.last + 1])
    count = use.last - use.line + 1
    amount = f"{count}行" if spec.language == "zh" else ("line" if count == 1 else f"{count} lines")
    template = prompt("code_completion", spec.language, rng, prefix=prefix, lines=amount)
    room = spec.target - context.counter.count(template) - context.counter.count(answer) - 30
    opened = context.pool.open(use.index)
    if opened.end_for(0, room // 2) == len(opened.text):
        holder = Stand(opened, 0, len(opened.text))
    else:  # a stretch that ends a while after the definition
        end = opened.end_for(use.definition.end, room // 6)
        start = opened.start_for(end, room // 2)
        start = opened.text.find("\n", start) + 1 if start else 0
        holder = Stand(opened, start, end)
    if not holder.start <= use.definition.start < use.definition.end <= holder.end:
        raise Reject("evidence past the end")
    source = context.pool.documents[user].source
    others: list[PoolDocument] = [
        d for d in context.documents("code") if d.source == source and d.index not in (user, use.index)
    ]
    stands = [holder, *gather(context, rng, others, room - opened.tokens_between(holder.start, holder.end))]
    question = Question(
        "next_lines", "", answer, (answer.strip(),), [(0, use.definition.start, use.definition.end)], complete=False,
    )  # fmt: skip
    draft = collection(context, spec, rng, stands, question, template)
    draft.turns[0].reply = answer  # code is never preceded by a recital
    draft.recite = False
    draft.notes = {"symbol": use.definition.name, "file": context.pool.documents[user].title}
    return draft


def calls_across_files(context: Context) -> bool:
    """Whether any file can be continued by a call of what another file defines."""
    try:
        graph = _graph(context)
    except Reject:
        return False
    return any(_uses(context, user, module) for module in graph.modules for user in graph.importers[module])
