"""What a pack is published and installed with: comfy-cli in an environment of its own, the pack as a git repository.

comfy-cli brings more packages than the pack and a host together, so it must not get into a host's environment.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from comfy_host import ROOT, copy_files, project_files

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def python_of(environment: Path) -> Path:
    """The Python of a virtual environment."""
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def tools() -> Path:
    """The virtual environment .venvs/tools with comfy-cli, made on first use."""
    wanted = PROJECT["project"]["optional-dependencies"]["tools"]
    folder = ROOT / ".venvs" / "tools"
    stamp = folder / ".installed"
    if not stamp.is_file() or stamp.read_text().split() != wanted:
        venv.create(folder, with_pip=True)
        pip = [python_of(folder), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *wanted], check=True, timeout=600)
        stamp.write_text("\n".join(wanted))
    return folder


def comfy(*words: str | Path, folder: Path, home: Path, environment: Path | None = None) -> str:
    """Run `comfy ...` in a folder, its settings kept in `home`; what it printed. A failure is an error.

    `environment` is the virtual environment of the ComfyUI that it manages, as if activated.
    """
    command = [python_of(tools()).with_name("comfy"), "--skip-prompt", "--no-enable-telemetry", *words]
    return run(command, folder=folder, home=home, environment=environment)


def run(command: list, folder: Path, home: Path, environment: Path | None = None, **variables: str) -> str:
    """Run a command with its home in a folder of the test's; what it printed, both streams."""
    inherited = {name: value for name, value in os.environ.items() if name not in {"VIRTUAL_ENV", "CONDA_PREFIX"}}
    settings = {"HOME": str(home), "USERPROFILE": str(home), "COLUMNS": "200", **variables}
    if environment:
        settings["VIRTUAL_ENV"] = str(environment)
    home.mkdir(parents=True, exist_ok=True)
    result = subprocess.run(
        command,
        cwd=folder,
        env=inherited | settings,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, f"{command}: {result.returncode}\n{result.stdout}"
    return result.stdout


def repository(folder: Path) -> Path:
    """The project as it stands, committed to a git repository of its own, as its users would clone it."""
    copy_files(project_files(), folder)
    git = ["git", "-c", "user.name=tests", "-c", "user.email=tests@localhost", "-c", "commit.gpgsign=false"]
    for words in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "the pack"]):
        subprocess.run([*git, *words], cwd=folder, check=True)
    return folder


def published(folder: Path, home: Path) -> Path:
    """The archive that `comfy node pack` makes of a repository: what the registry gives to Manager."""
    comfy("node", "pack", folder=folder, home=home)
    return folder / "node.zip"


def unpack(archive: Path, folder: Path) -> Path:
    """The archive's files in a folder."""
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(folder)
    return folder
