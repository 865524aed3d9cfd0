"""A host and its environment as a user has them before this pack comes: copies, made cheaply, to install into.

`tests/run.py` puts the pack's requirements into a host's environment. The copy has the host's own ones only, so that
what an installer changes can be told by `pip freeze`. Its files are hard links: five gigabytes in a few seconds, and
pip, which replaces a file rather than writing into it, cannot reach the original through them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import venv
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from comfy_tools import python_of

TORCH = ("torch", "torchvision", "torchaudio")
OF_THE_USER = {".git", "custom_nodes", "models", "input", "output", "temp", "user"}


def copy_host(host: Path, folder: Path) -> Path:
    """A host's folder without what its user has put there."""

    def left_out(inside: str, names: list[str]) -> set[str]:
        return OF_THE_USER & set(names) if Path(inside) == host else {"__pycache__"} & set(names)

    shutil.copytree(host, folder, ignore=left_out)
    (folder / "custom_nodes").mkdir()
    return folder


def requirements_of(host: Path) -> list[str]:
    """The lines of a host's requirements.txt, with torch, which it leaves to the user in part."""
    lines = (host / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()] + [*TORCH, "pip", "setuptools"]


def closure(requirements: Iterable[str]) -> dict[str, metadata.Distribution]:
    """The installed packages that these requirements bring, theirs included, by name."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found: dict[str, metadata.Distribution] = {}
    todo = [(Requirement(line), ("",)) for line in requirements]
    seen = set()
    while todo:
        requirement, extras = todo.pop()
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        name, wanted = canonicalize_name(requirement.name), ("", *sorted(requirement.extras))
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        found[name] = metadata.distribution(name)
        todo += [(Requirement(line), wanted) for line in found[name].requires or []]
    return found


def clone_environment(requirements: Iterable[str], folder: Path) -> Path:
    """A virtual environment with those of this one's packages that the requirements bring, and no others."""
    venv.create(folder, with_pip=False)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    for package in closure(requirements).values():
        for file in package.files or []:
            source = Path(package.locate_file(file))
            if (
                ".." not in file.parts and source.is_file()
            ):  # scripts lie elsewhere; a .pyc may be listed and not be there
                target = site / file
                target.parent.mkdir(parents=True, exist_ok=True)
                if not target.exists():
                    os.link(source, target)
    return folder


def freeze(environment: Path) -> dict[str, str]:
    """`pip freeze` as a table: each package's line by its name."""
    command = [python_of(environment), "-m", "pip", "freeze", "--all", "--disable-pip-version-check"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.splitlines()
    return {line.replace(" @ ", "==").split("==")[0].lower().replace("_", "-"): line for line in lines}


def pip(environment: Path, *words: str) -> str:
    """Run pip in an environment."""
    command = [python_of(environment), "-m", "pip", "--disable-pip-version-check", *words]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
    assert result.returncode == 0, result.stdout
    return result.stdout
