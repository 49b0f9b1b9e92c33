"""The distribution: every package listed, data files included, constraints complete."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tomllib
import venv
from importlib.metadata import distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_listed() -> None:
    folders = {
        ".".join(("pimoe", *path.parent.relative_to(ROOT).parts))
        for top in ("runtime", "deployments", "clients")
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == folders


def test_import_names_are_the_installed_ones() -> None:
    """Never the folder under a second name: the same file twice gives two different classes."""
    for name in ("runtime", "deployments", "clients"):
        spec = importlib.util.find_spec(f"pimoe.{name}")
        assert spec is not None
        assert spec.origin is not None
        assert (Path(spec.origin).parent / "py.typed").exists()


def test_version_is_one() -> None:
    from pimoe.runtime import __version__

    assert __version__ == PROJECT["project"]["version"] == distribution("pimoe").version


def test_every_direct_dependency_is_pinned() -> None:
    def name(requirement: str) -> str:
        return re.split(r"[\[<>=;! ]", requirement)[0].lower()

    extras = PROJECT["project"]["optional-dependencies"]
    requirements = [*PROJECT["project"]["dependencies"], *(r for extra in extras.values() for r in extra)]
    wanted = {name(requirement) for requirement in requirements} - {"pimoe"}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {name(line) for line in lines if line and not line.startswith("#")}
    assert wanted <= pinned, wanted - pinned


def test_the_light_client_installs_without_torch_and_ray(tmp_path: Path) -> None:
    """Into an empty environment, as a user who only calls a server does."""
    venv.create(tmp_path / "env", with_pip=True)
    python = str(tmp_path / "env" / "bin" / "python")
    source = tmp_path / "source"  # building leaves files behind
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__"))
    install = [python, "-m", "pip", "install", "--quiet", str(source), "-c", str(ROOT / "constraints.txt")]
    installed = subprocess.run(install, capture_output=True, text=True, timeout=300)
    if "No matching distribution found for setuptools" in installed.stderr or "NewConnection" in installed.stderr:
        pytest.skip(f"no package index can be reached: {installed.stderr[-200:]}")
    assert installed.returncode == 0, installed.stderr
    check = (
        "from importlib.metadata import distributions as d; from pimoe.clients import AsyncClient, Client; "
        "print(*sorted(x.name.lower() for x in d()))"
    )
    names = subprocess.run(
        [python, "-c", check], capture_output=True, text=True, check=True, cwd=tmp_path
    ).stdout.split()
    assert {"pimoe", "aiohttp", "msgpack", "numpy"} <= set(names)
    assert not {"torch", "ray", "starlette", "pydantic"} & set(names)
    command = subprocess.run([str(Path(python).parent / "pimoe"), "status"], capture_output=True, text=True)
    assert command.returncode == 1
    assert "pimoe[server]" in command.stderr


def test_embedded_model_is_in_the_package() -> None:
    from pimoe.runtime.embedded import CHECKPOINT

    files = {path.name for path in CHECKPOINT.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files


def test_nothing_names_this_machine() -> None:
    """No machine path and no package index in anything that is committed."""
    words = re.compile(r"(?<![\w.])/(?:work|root|home)/|extra-index-url|find-links|pypi\.org")
    tops = ("runtime", "deployments", "clients", "tests", "load_tests")
    files = [path for top in tops for path in (ROOT / top).rglob("*")] + list(ROOT.iterdir())
    for path in files:
        if path.suffix in (".py", ".md", ".toml", ".txt", ".yaml") or path.name in ("Makefile", "run"):
            assert path == Path(__file__) or not words.search(path.read_text()), path
