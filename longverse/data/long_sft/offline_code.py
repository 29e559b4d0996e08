"""Rules for Python source: definitions, defaults, constants, docstrings, read with `ast`."""

from __future__ import annotations

import ast
import re
from collections import Counter
from dataclasses import dataclass

from longverse.data.long_sft.found import Found
from longverse.data.text import squash


def parse(text: str) -> ast.Module | None:
    """The syntax tree, or None for what this Python cannot parse."""
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old files with odd escapes are still good files
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


class Lines:
    """Character offsets of `ast` positions (which count lines and UTF-8 bytes)."""

    def __init__(self, text: str) -> None:
        self.lines = text.split("\n")
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line) + 1)

    def at(self, line: int, column: int) -> int:
        """The character at a 1-based line and a byte column."""
        text = self.lines[line - 1]
        if not text.isascii():
            column = len(text.encode()[:column].decode(errors="ignore"))
        return self.starts[line - 1] + column

    def span(self, node: ast.stmt | ast.expr) -> tuple[int, int]:
        """Characters of a node."""
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self.at(node.lineno, node.col_offset), self.at(node.end_lineno, node.end_col_offset)


@dataclass(frozen=True)
class Definition:
    """A top-level function or class: its name and the span of its signature (of a class: up to that of its `__init__`,
    where that is near)."""

    name: str
    start: int
    end: int
    is_class: bool


def _signature_end(text: str, lines: Lines, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> int:
    """The character after the colon that ends a signature: the first one behind its last argument, base or result."""
    last: list[ast.expr] = []
    if isinstance(node, ast.ClassDef):
        last = [*node.bases, *(keyword.value for keyword in node.keywords)]
    else:
        a = node.args
        named = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
        last = [*filter(None, (*a.defaults, *a.kw_defaults, *(arg.annotation for arg in named), node.returns))]
        last += [
            ast.Name(
                arg.arg,
                lineno=arg.lineno,
                col_offset=arg.col_offset,
                end_lineno=arg.end_lineno,
                end_col_offset=arg.end_col_offset,
            )
            for arg in named
        ]
    behind = max([lines.at(node.lineno, node.col_offset), *(lines.span(part)[1] for part in last)])
    return text.find(":", behind) + 1


def definitions(text: str, tree: ast.Module) -> list[Definition]:
    """The top-level functions and classes of a module whose names are defined once."""
    lines = Lines(text)
    found = []
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            start = lines.at(node.lineno, node.col_offset)
            end = _signature_end(text, lines, node)
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(inner, ast.FunctionDef) and inner.name == "__init__":
                    made = _signature_end(text, lines, inner)
                    end = made if made - start < 1_500 else end
            if end > start:
                found.append(Definition(node.name, start, end, isinstance(node, ast.ClassDef)))
    names = Counter(d.name for d in found)
    return [d for d in found if names[d.name] == 1]


def find_code(text: str, title: str, language: str) -> list[Found]:
    """Questions in `language` about a Python file named `title`, by place."""
    tree = parse(text)
    if tree is None:
        return []
    zh = language == "zh"
    lines = Lines(text)
    found: list[Found] = []
    for definition in definitions(text, tree):
        if not definition.name.startswith("_") and len(definition.name) > 4:
            what = ("类" if zh else "class") if definition.is_class else ("函数" if zh else "function")
            question = (
                f"哪个文件定义了{what} {definition.name}？"
                if zh
                else f"Which file defines the {what} `{definition.name}`?"
            )
            reply = f"定义在 {title} 中。" if zh else f"It is defined in {title}."
            found.append(
                Found(
                    "defined_in",
                    definition.start,
                    definition.end,
                    question,
                    (title,),
                    reply,
                    # Methods and `async def` count too: the question asks for a name, not for its arguments.
                    once=f"class {definition.name}" if definition.is_class else f"def {definition.name}(",
                    title=title,
                )
            )
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    names = Counter(node.name for node in functions)
    for node in functions:
        if names[node.name] != 1 or node.name.startswith("__"):
            continue
        start = lines.at(node.lineno, node.col_offset)
        signature_end = _signature_end(text, lines, node)
        arguments = node.args.posonlyargs + node.args.args
        defaults = list(zip(arguments[len(arguments) - len(node.args.defaults) :], node.args.defaults, strict=True))
        defaults += [(a, d) for a, d in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True) if d is not None]
        for argument, default in defaults[:2]:
            if not isinstance(default, ast.Constant) or default.value is None or default.value is Ellipsis:
                continue
            a, b = lines.span(default)
            value = text[a:b]
            if len(value) > 60 or "\n" in value:
                continue
            question = (
                f"在 {title} 中，函数 {node.name} 的参数 {argument.arg} 的默认值是什么？"
                if zh
                else f"In {title}, what is the default of the parameter `{argument.arg}` of the function `{node.name}`?"
            )
            reply = f"默认值是 `{value}`。" if zh else f"The default is `{value}`."
            found.append(Found("default_value", start, signature_end, question, (value,), reply, title=title))
        document = ast.get_docstring(node)
        if document and isinstance(node.body[0], ast.Expr):
            first = squash(document.split("\n\n")[0])
            a, b = lines.span(node.body[0])
            if 25 <= len(first) <= 200 and first.endswith(".") and "\\" not in text[a:b]:
                question = (
                    f"{title} 中函数 {node.name} 的文档字符串的第一段写了什么？"
                    if zh
                    else f"What does the first paragraph of the docstring of `{node.name}` in {title} say?"
                )
                found.append(Found("docstring", start, b, question, (first,), first, title=title))
    assigned = Counter(
        target.id
        for n in ast.walk(tree)
        if isinstance(n, ast.Assign)
        for target in n.targets
        if isinstance(target, ast.Name)
    )
    for statement in tree.body:
        if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
            continue
        target = statement.targets[0]
        if (
            not isinstance(target, ast.Name)
            or not isinstance(statement.value, ast.Constant)
            or assigned[target.id] != 1
        ):
            continue
        a, b = lines.span(statement.value)
        value = text[a:b]
        if not re.fullmatch(r"_?[A-Z][A-Z0-9_]{3,}", target.id) or len(value) > 80 or "\n" in value or value == "None":
            continue
        question = (
            f"{title} 把常量 {target.id} 设为什么值？"
            if zh
            else f"Which value does {title} give to the constant `{target.id}`?"
        )
        start, end = lines.span(statement)
        reply = f"值是 `{value}`。" if zh else f"It is `{value}`."
        found.append(Found("constant", start, end, question, (value,), reply, title=title))
    return sorted(found, key=lambda f: (f.start, f.kind))
