"""Reads single definitions of a module from its source, without importing the module and all that it needs.

The config class of a plug-in is a few lines of a module that imports torch, which takes seconds; help texts need the
class alone. Of the module, only the statements that define the class and the names in it are executed.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

_FUTURE = ast.ImportFrom("__future__", [ast.alias("annotations")], level=0)


def definition(module: str, name: str, partly: Callable[[str], bool]) -> Any:
    """Returns what `name` is in a module, which is not imported.

    A class is another object than that of the imported module: it has the same fields, and is for reading them. Its
    methods may lack names that they use.

    Args:
        module: dotted name of the module; if it has been imported, its own object is returned.
        name: a name that a statement at the module's top level defines or imports.
        partly: whether a module, of which a needed name is imported, is also read in this way; others are imported.

    Raises:
        ImportError: there is no such module.
        AttributeError: the module does not define the name.
    """
    if module in sys.modules:
        return getattr(sys.modules[module], name)
    space = _space(module)
    _define(space, name, partly)
    return getattr(space, name)


def _space(module: str) -> ModuleType:
    """Returns the namespace for the definitions of a module; annotations are resolved in it."""
    alias = f"{module}!definitions"
    if alias not in sys.modules:
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise ImportError(f"there is no module {module}")
        space = ModuleType(alias)
        space.__file__ = spec.origin
        sys.modules[alias] = space
    return sys.modules[alias]


def _define(space: ModuleType, name: str, partly: Callable[[str], bool]) -> None:
    """Defines a name and all names that it needs."""
    namespace = space.__dict__
    statement = _statements(space).pop(name, None)  # once, also where two definitions name each other
    if statement is None:  # a builtin, or defined before
        return
    if isinstance(statement, ast.Import | ast.ImportFrom):
        if isinstance(statement, ast.ImportFrom) and statement.module and partly(statement.module):
            namespace[name] = definition(statement.module, statement.names[0].name, partly)
            return
    else:
        for needed in _names(statement):
            _define(space, needed, partly)
    tree = ast.fix_missing_locations(ast.Module([_FUTURE, statement], type_ignores=[]))
    exec(compile(tree, str(space.__file__), "exec"), namespace)


def _statements(space: ModuleType) -> dict[str, ast.stmt]:
    """Returns the top-level statement that defines each name of the module."""
    known: dict[str, ast.stmt] | None = space.__dict__.get("__statements__")
    if known is not None:
        return known
    found: dict[str, ast.stmt] = {}
    for statement in ast.parse(Path(str(space.__file__)).read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            for alias in statement.names:
                found[alias.asname or alias.name.partition(".")[0]] = (
                    ast.ImportFrom(statement.module, [alias], statement.level)
                    if isinstance(statement, ast.ImportFrom)
                    else ast.Import([alias])
                )
        elif isinstance(statement, ast.ClassDef | ast.FunctionDef):
            found[statement.name] = statement
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            found |= {target.id: statement for target in targets if isinstance(target, ast.Name)}
    space.__dict__["__statements__"] = found
    return found


def _names(node: ast.AST) -> Iterator[str]:
    """Yields the names in a statement, but not those in methods, which run later if at all."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Name):
            yield child.id
        elif isinstance(node, ast.ClassDef) and isinstance(child, ast.FunctionDef):
            for decorator in child.decorator_list:
                yield from _names(ast.Expr(decorator))
        else:
            yield from _names(child)
