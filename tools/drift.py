"""Changes in another vLLM release that affect this plugin, found in vLLM's sources.

``python -m tools.drift 0.33.0`` compares the release with ``tools/drift.lock``. The lock describes
the parts of the installed vLLM that our code depends on:

- ``import``: a name that our code imports, and its parameters if it is a function;
- ``override``: a vLLM method that our code overrides, its parameters and a hash of its body;
- ``call``: a vLLM method that our classes call on ``self``, with the same details;
- ``name``: an attribute or string in our code that also occurs in vLLM's sources.

GONE: our code fails, or is never called. CHANGED: a developer must read the new code. ``--write``
rewrites the lock for the installed vLLM. The exit status is 1 if a dependency is gone.
"""

import argparse
import ast
import hashlib
import importlib
import inspect
import json
import pkgutil
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

from tools.vllm_sources import unpack

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "tools" / "drift.lock"
PACKAGES = ("vitcop_vllm", "vitcop_server")

Function = ast.FunctionDef | ast.AsyncFunctionDef
Lock = dict[str, dict[str, str]]

_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]{3,}")


class Sources:
    """Parses the package ``vllm`` in a folder, without importing it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tree = cache(self._tree)

    def _tree(self, module: str) -> ast.Module | None:
        path = self.folder.joinpath(*module.split("."))
        for file in (path / "__init__.py", path.with_suffix(".py")):
            if file.is_file():
                return ast.parse(file.read_text())
        return None

    def find(self, module: str, name: str) -> ast.AST | None:
        """The definition of a module's ``name``, also through imports; ``None`` if absent."""
        tree = self.tree(module)
        if tree is None:
            return None
        for node in _statements(tree):
            if isinstance(node, _DEFINITIONS) and node.name == name:
                return node
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        source = self._absolute(module, node)
                        if not source.startswith("vllm"):
                            return node
                        return self.find(source, alias.name) or self.tree(f"{source}.{name}")
            elif name in _bound(node):
                return node
        # A submodule, or a name in the table of the package's __getattr__.
        return self.tree(f"{module}.{name}") or _mention(tree, name)

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = module.split(".")
        if not self.folder.joinpath(*parts).is_dir():
            parts.pop()
        parts = parts[: len(parts) - node.level + 1]
        return ".".join([*parts, *([node.module] if node.module else [])])

    def find_method(self, module: str, class_name: str, name: str) -> Function | None:
        """A method of a class, also if inherited inside vLLM."""
        found = self.find(module, class_name)
        if not isinstance(found, ast.ClassDef):
            return None
        for node in _statements(found):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
                return node
        home = self._home(module, class_name)
        for base in found.bases:
            named = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(named, ast.Name) and (method := self.find_method(home, named.id, name)):
                return method
        return None

    def _home(self, module: str, name: str) -> str:
        """The module that defines ``name``; ``module`` may only import it."""
        tree = self.tree(module)
        for node in _statements(tree) if tree else ():
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self._home(self._absolute(module, node), alias.name)
        return module

    def words(self) -> set[str]:
        """All identifiers in the files, also in strings and comments."""
        files = sorted((self.folder / "vllm").rglob("*.py"))
        return set().union(*(_WORD.findall(file.read_text()) for file in files))


def _statements(scope: ast.AST) -> Iterator[ast.AST]:
    """Statements of a module or class, also under ``if``, ``try`` and ``with``."""
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, ast.stmt):
            yield node
        if isinstance(node, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            yield from _statements(node)


def _bound(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    return set()


def _mention(tree: ast.Module, name: str) -> ast.AST | None:
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return next((node for node in constants if node.value == name), None)


class _WithoutHints(ast.NodeTransformer):
    """Removes docstrings and annotations."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self.generic_visit(node)
        node.returns = None
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        return node

    visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]  # noqa: N815


def _parameters(node: ast.AST) -> str:
    """Parameters of a function or of a class's ``__init__``; empty for other nodes."""
    if isinstance(node, ast.ClassDef):
        methods = (n for n in _statements(node) if isinstance(n, ast.FunctionDef))
        node = next((method for method in methods if method.name == "__init__"), node)
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return ""
    return ast.unparse(_WithoutHints().visit(node.args))


def _digest(node: ast.AST) -> str:
    return hashlib.sha256(repr(_form(_WithoutHints().visit(node))).encode()).hexdigest()[:12]


def _form(node: object) -> object:
    """A syntax tree as tuples. Unlike ``ast.dump``, it is equal in all versions of Python."""
    if isinstance(node, ast.AST):
        fields = [(name, value) for name, value in ast.iter_fields(node) if value not in (None, [])]
        return type(node).__name__, [(name, _form(value)) for name, value in fields]
    return [_form(one) for one in node] if isinstance(node, list) else repr(node)


# Our code's dependencies on vLLM.


def _files() -> dict[str, Path]:
    """Our modules and their files."""
    found = {}
    for package in PACKAGES:
        folder = Path(str(importlib.import_module(package).__file__)).parent
        modules = pkgutil.walk_packages([str(folder)], f"{package}.")
        for name in (package, *(module.name for module in modules)):
            path = folder.parent.joinpath(*name.split("."))
            file = path.with_suffix(".py")
            found[name] = file if file.is_file() else path / "__init__.py"
    return found


def _imports(tree: ast.Module) -> Iterator[tuple[str, ...]]:
    """For each name that a file imports from vLLM: its places, alternatives included."""
    sources: dict[str, list[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm":
            for alias in node.names:
                source = f"{node.module}:{alias.name}"
                sources.setdefault(alias.asname or alias.name, []).append(source)
    for places in sources.values():
        yield tuple(dict.fromkeys(places))


def _classes() -> Iterator[type]:
    """Our classes, including the classes made for each attention backend."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from vitcop_vllm.engine.attention import create_staged_attention_backend
    from vitcop_vllm.engine.backends import BACKENDS

    for name in _files():
        if name.endswith("__main__"):
            continue
        for value in vars(importlib.import_module(name)).values():
            if inspect.isclass(value) and value.__module__ == name:
                yield value
    for backend in BACKENDS:
        staged = create_staged_attention_backend(AttentionBackendEnum[backend].get_class())
        yield from (staged.get_builder_cls(), staged.get_impl_cls())


def _overrides(cls: type) -> Iterator[tuple[str, str]]:
    """Pairs of our methods in a class and the vLLM methods that they override."""
    methods = (FunctionType, classmethod, staticmethod, property)
    for number, ours in enumerate(cls.__mro__):
        if ours.__module__.partition(".")[0] not in PACKAGES:
            continue
        for name, value in vars(ours).items():
            if not isinstance(value, methods):
                continue
            for base in cls.__mro__[number + 1 :]:
                if base.__module__.startswith("vllm.") and name in vars(base):
                    here = f"{ours.__module__}.{ours.__qualname__.rpartition('.')[2]}.{name}"
                    yield here, f"{base.__module__}:{base.__qualname__}.{name}"
                    break


def _calls(cls: type, trees: Mapping[str, ast.Module]) -> Iterator[tuple[str, str]]:
    """Pairs of our class and a vLLM method that an object of ``cls`` calls there on itself."""
    for ours in cls.__mro__:
        if (tree := trees.get(ours.__module__)) is None:
            continue
        for name in _names_called_on_itself(tree, ours.__name__):
            owner = next((base for base in cls.__mro__ if name in vars(base)), object)
            if owner.__module__.startswith("vllm."):
                here = f"{ours.__module__}.{ours.__name__}"
                yield here, f"{owner.__module__}:{owner.__qualname__}.{name}"


def _names_called_on_itself(tree: ast.Module, cls: str) -> Iterator[str]:
    """Methods that a class calls on ``self``, on ``cls``, or on ``this``, an untyped ``self``."""
    body = next(n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == cls)
    for node in ast.walk(body):
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="self" | "cls" | "this"), attr=name)
            ):
                yield name


def _names(trees: Mapping[str, ast.Module]) -> set[str]:
    """Attributes and strings in our code, without names that it defines itself."""
    used: set[str] = set()
    defined: set[str] = set()
    for node in (node for tree in trees.values() for node in ast.walk(tree)):
        match node:
            case ast.Attribute(attr=name):
                (used if isinstance(node.ctx, ast.Load) else defined).add(name)
            case ast.Constant(value=str(name)):
                used.add(name)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                defined.add(name)
            case ast.ClassDef(name=name) | ast.arg(arg=name):
                defined.add(name)
            case ast.Name(id=name) if isinstance(node.ctx, ast.Store):
                defined.add(name)
    return {name for name in used - defined if _WORD.fullmatch(name)}


def dependencies() -> dict[str, Any]:
    """Our code's dependencies: imports, (ours, vLLM's) pairs of overrides and calls, and names."""
    trees = {name: ast.parse(path.read_text()) for name, path in _files().items()}
    classes = [*_classes()]
    return {
        "imports": sorted({places for tree in trees.values() for places in _imports(tree)}),
        "overrides": sorted({pair for cls in classes for pair in _overrides(cls)}),
        "calls": sorted({pair for cls in classes for pair in _calls(cls, trees)}),
        "names": sorted(_names(trees)),
    }


def describe(depends: Mapping[str, Any], vllm: Sources) -> Lock:
    """The lock of a release, without the dependencies that its sources lack."""
    lock: Lock = {"imports": {}, "overrides": {}, "calls": {}, "names": {}}
    for places in depends["imports"]:
        found = (vllm.find(*place.split(":")) for place in places)
        if (node := next(filter(None, found), None)) is not None:
            lock["imports"][" or ".join(places)] = _parameters(node)
    for kind in ("overrides", "calls"):
        for ours, theirs in depends[kind]:
            module, _, qualified = theirs.partition(":")
            if (method := vllm.find_method(module, *qualified.split("."))) is not None:
                parameters = _parameters(method)
                lock[kind][f"{ours} of {theirs}"] = f"({parameters}) {_digest(method)}"
    words = vllm.words()
    lock["names"] = {name: "" for name in depends["names"] if name in words}
    return lock


def compare(old: Lock, new: Lock) -> tuple[list[str], list[str]]:
    """Lines about dependencies that are gone, and that have changed."""
    gone, changed = [], []
    for kind, things in old.items():
        for thing, was in things.items():
            now = new[kind].get(thing)
            if now is None:
                gone.append(f"{kind[:-1]:9} {thing}")
            elif now != was:
                was_for, now_for = was.rpartition(" ")[0], now.rpartition(" ")[0]
                what = "body" if was_for == now_for != "" else f"{was} -> {now}"
                changed.append(f"{kind[:-1]:9} {thing}: {what}")
    return gone, changed


def installed() -> Sources:
    """The installed vLLM's sources."""
    import vllm

    return Sources(Path(str(vllm.__file__)).parents[1])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("version", nargs="?", help="a vLLM release, such as 0.33.0")
    parser.add_argument("--write", action="store_true", help="write the lock file")
    arguments = parser.parse_args()
    depends = dependencies()
    if arguments.write:
        LOCK.write_text(json.dumps(describe(depends, installed()), indent=1) + "\n")
    if arguments.version is None:
        return 0
    old: Lock = json.loads(LOCK.read_text())
    gone, changed = compare(old, describe(depends, Sources(unpack(arguments.version))))
    for title, lines in (("GONE", gone), ("CHANGED", changed)):
        print(f"{title}: {len(lines)}", *lines, "", sep="\n  ")
    return 1 if gone else 0


if __name__ == "__main__":
    sys.exit(main())
