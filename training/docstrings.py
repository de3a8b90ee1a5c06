"""The standard library's docstrings, read from its source without importing it."""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

from training.pages import Described, Page

SKIPPED_PARTS = frozenset(
    {"__pycache__", "encodings", "idlelib", "lib2to3", "pydoc_data", "test", "tests", "turtledemo"}
)
MIN_DOCSTRING_CHARS = 30
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def read_docstrings(root: Path) -> Iterator[Page]:
    """One page per module below `root` (for example /usr/lib/python3.11)."""
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not SKIPPED_PARTS.isdisjoint(relative.parts) or "dist-packages" in relative.parts:
            continue
        name = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        page = _module_page(name, path)
        if len(page.blocks) > 1:
            yield page


def _module_page(name: str, path: Path) -> Page:
    tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
    blocks = [f"# {name}", *paragraphs(ast.get_docstring(tree) or "")]
    objects = []
    for definition, qualified in _definitions(tree, name):
        doc = ast.get_docstring(definition) or ""
        if len(doc) < MIN_DOCSTRING_CHARS:
            continue
        blocks += [_signature(definition, qualified), *paragraphs(doc)]
        objects.append(Described(qualified, _kind(definition), paragraphs(doc)[0]))
    return Page(_unit(name), tuple(blocks), tuple(objects))


def _unit(name: str) -> str:
    """`_pydecimal` documents what `decimal` does, so the two are held out together."""
    unit = name.split(".", maxsplit=1)[0]
    return unit.lstrip("_").removeprefix("py") if unit.startswith("_py") else unit


def _definitions(scope: ast.AST, prefix: str) -> Iterator[tuple[Definition, str]]:
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, Definition) and not node.name.startswith("_"):
            qualified = f"{prefix}.{node.name}"
            yield node, qualified
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node, qualified)


def _kind(definition: Definition) -> str:
    return "class" if isinstance(definition, ast.ClassDef) else "function"


def _signature(definition: Definition, qualified: str) -> str:
    if isinstance(definition, ast.ClassDef):
        return f"class {qualified}"
    return f"{qualified}({ast.unparse(definition.args)})"


def paragraphs(doc: str) -> list[str]:
    """A docstring's paragraphs; prose is unwrapped, examples and tables keep their lines."""
    parts = re.split(r"\n\s*\n", inspect.cleandoc(doc))
    return [_unwrap(part) for part in parts if part.strip()]


def _unwrap(paragraph: str) -> str:
    lines = paragraph.splitlines()
    is_prose = not any(line.startswith((" ", ">>>", "-", "*", "+", "|")) for line in lines)
    return " ".join(line.strip() for line in lines) if is_prose else paragraph
