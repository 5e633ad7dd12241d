"""The rules of docs/architecture.md that a machine can check: who imports whom, broad excepts."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("node", "p2p", "routing", "models", "simnet")
DOCUMENT = ROOT / "docs" / "architecture.md"

# What each package must not import. petalnode.errors is a leaf that all may use.
FORBIDDEN = {
    "routing": ("torch", "trio", "libp2p", "msgpack", "petalnode."),
    "models": ("trio", "libp2p", "petalnode."),
    "p2p": ("petalnode.",),
    "node": ("libp2p", "multiaddr"),
    "simnet": ("libp2p",),
}
ALLOWED = {
    "routing": ("petalnode.errors", "petalnode.routing"),
    "models": ("petalnode.errors", "petalnode.models"),
    "p2p": ("petalnode.errors", "petalnode.p2p", "petalnode.routing"),
}


def modules(folder):
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_nothing_imports_upward(folder):
    allowed = ALLOWED.get(folder, ())
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules(folder)
        for name in imports(path)
        if (name + ".").startswith(tuple(f.rstrip(".") + "." for f in FORBIDDEN[folder]))
        and not (name + ".").startswith(tuple(a + "." for a in allowed))
    ]
    assert wrong == []


def is_broad(handler):
    names = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(
        name is None or (isinstance(name, ast.Name) and name.id in ("Exception", "BaseException"))
        for name in names
    )


def raises(handler):
    return any(isinstance(node, ast.Raise) for node in ast.walk(handler))


def broad_excepts(node, function):
    """Names of the innermost functions that catch everything and raise nothing."""
    for child in ast.iter_child_nodes(node):
        inner = (
            child.name if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else function
        )
        if isinstance(child, ast.ExceptHandler) and is_broad(child) and not raises(child):
            yield function
        yield from broad_excepts(child, inner)


def test_broad_excepts_that_raise_nothing_are_documented_supervision_points():
    found = {
        f"`{path.relative_to(ROOT)}::{function}`"
        for folder in FOLDERS
        for path in modules(folder)
        for function in broad_excepts(ast.parse(path.read_text()), "")
    }
    section = DOCUMENT.read_text().split("## Supervision points")[1].split("## ")[0]
    assert found == set(re.findall(r"`[^`]+::[^`]+`", section))


def test_every_module_is_in_the_document():
    document = DOCUMENT.read_text()
    missing = [
        str(path.relative_to(ROOT))
        for folder in FOLDERS
        for path in modules(folder)
        if path.name != "__init__.py" and f"{path.name}`" not in document
    ]
    assert missing == []


def test_no_asyncio_no_pickle_no_system_tasks_no_sleeping_threads():
    found = []
    for folder in FOLDERS:
        for path in modules(folder):
            found += [(path.name, name) for name in imports(path) if name in ("asyncio", "pickle")]
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute):
                    called = ast.unparse(node)
                    if called.endswith((".spawn_system_task", "time.sleep")):
                        found.append((path.name, called))
    assert found == []
