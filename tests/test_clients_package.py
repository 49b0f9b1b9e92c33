"""The package as people import it."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pimoe.clients
from pimoe.clients import AsyncClient, Client


def modules() -> list[ModuleType]:
    names = [name for _, name, _ in pkgutil.iter_modules(pimoe.clients.__path__, "pimoe.clients.")]
    return [importlib.import_module(name) for name in names]


def test_all_is_complete_and_sorted() -> None:
    names = vars(pimoe.clients).items()
    public = {name for name, value in names if name[0] != "_" and not isinstance(value, ModuleType)}
    assert set(pimoe.clients.__all__) == public
    assert sorted(pimoe.clients.__all__, key=lambda name: (not name.isupper(), name)) == pimoe.clients.__all__


def test_every_error_is_exported() -> None:
    for kind in pimoe.clients.ERRORS_BY_CODE.values():
        assert getattr(pimoe.clients, kind.__name__) is kind


def test_both_clients_have_the_same_methods() -> None:
    def public(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    assert public(Client) == public(AsyncClient)


def test_everything_public_is_documented() -> None:
    for module in modules():
        assert module.__doc__, module.__name__
    for name in pimoe.clients.__all__:
        value = getattr(pimoe.clients, name)
        if isinstance(value, type):
            assert value.__doc__, name
            for member, found in vars(value).items():
                if callable(found) and not member.startswith("_"):
                    assert found.__doc__, f"{name}.{member}"


def test_importing_it_brings_nothing_of_the_server() -> None:
    script = (
        "import sys, pimoe.clients; heavy = {'torch', 'ray', 'pimoe.runtime', 'pimoe.deployments', 'pydantic', "
        "'starlette', 'ml_dtypes', 'orjson', 'transformers'}; print(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_it_is_typed() -> None:
    assert all((Path(folder) / "py.typed").exists() for folder in pimoe.clients.__path__)
