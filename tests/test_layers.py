"""The house's rules, read from the imports: layers, no cycles, nothing heavy in the light client."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "runtime": {"ray", "starlette", "fastapi", "aiohttp", "httpx", "uvicorn", "pydantic", "typer", "transformers"},
    "clients": {"torch", "ray", "starlette", "pydantic", "safetensors", "tokenizers", "transformers", "typer"},
    "deployments": {"transformers", "fastapi"},
}
MAY_IMPORT = {"runtime": set(), "clients": set(), "deployments": {"runtime", "clients"}}
ANYWHERE_FORBIDDEN = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}


def _modules() -> dict[str, Path]:
    found = {}
    for package in MAY_IMPORT:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()


def _imports(module: str, path: Path) -> list[tuple[str, bool]]:
    """Absolute names that a module imports, ours without the `pimoe.`, and whether at import time."""
    tree = ast.parse(path.read_text())
    deferred = {
        id(node)
        for scope in ast.walk(tree)
        if isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(scope, ast.If) and "TYPE_CHECKING" in ast.dump(scope.test))
        for node in ast.walk(scope)
    }
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names: list[tuple[str, bool]] = []
    for node in ast.walk(tree):
        at_import = id(node) not in deferred
        if isinstance(node, ast.Import):
            names += [(alias.name, at_import) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            # `from package import module` names a module, `from module import name` does not.
            below = [f"{base}.{alias.name}" for alias in node.names if f"{base}.{alias.name}" in MODULES]
            names += [(name, at_import) for name in (below or [base])]
    return names


@pytest.mark.parametrize("package", list(MAY_IMPORT))
def test_a_layer_imports_only_what_it_may(package: str) -> None:
    for module, path in MODULES.items():
        if module.split(".")[0] != package:
            continue
        for name, _ in _imports(module, path):
            top = name.split(".")[0]
            assert top not in FORBIDDEN[package] | ANYWHERE_FORBIDDEN, f"{module} imports {name}"
            assert top != "pimoe", f"{module}: inside the packages imports are relative, not {name}"
            if top in MAY_IMPORT and top != package:
                assert top in MAY_IMPORT[package], f"{module} imports {name}"


def test_links_and_caches_know_no_torch() -> None:
    for module, path in MODULES.items():
        if module.startswith(("runtime.links", "runtime.batching", "runtime.caching")):
            assert not [name for name, _ in _imports(module, path) if name.split(".")[0] == "torch"], module


def test_no_import_cycles() -> None:
    graph = {
        module: {name for name, at_import in _imports(module, path) if at_import and name in MODULES}
        for module, path in MODULES.items()
    }
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"cycle: {' -> '.join((*way, module))}"
        if module not in done:
            for name in sorted(graph[module] - {module}):
                visit(name, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_every_file_is_one_screenful_of_ideas() -> None:
    long = {m: n for m, p in MODULES.items() if (n := len(p.read_text().splitlines())) > 400}
    assert not long, f"files over 400 lines: {long}"


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("pimoe.clients", {"torch", "ray", "pimoe.runtime", "pimoe.deployments"}),
        ("pimoe.runtime.links", {"torch", "ray"}),
        ("pimoe.runtime.caching", {"torch", "ray"}),
        ("pimoe.runtime.model.tokenizer", {"torch", "ray"}),
        ("pimoe.deployments.api.app", {"torch", "ray"}),
    ],
)
def test_light_modules_stay_light(module: str, heavy: set[str]) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not heavy & set(loaded)
