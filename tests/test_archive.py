"""What the registry gets, and so every user of Manager: made by the real `comfy node pack`."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import comfy_tools
import pytest

# The top of the archive, and what may lie in its folders. docs/ is left out on purpose: the README's pictures are seen
# where the README is read, on the project's page; the node's own help and its pictures are in web/.
FILES = {"__init__.py", "cli.py", "pyproject.toml", "requirements.txt", "LICENSE", "README.md", "CHANGELOG.md"}
FOLDERS = {
    "nodes": {".py"},
    "pipelines": {".py"},
    "benchmarks": {".py"},
    "commands": {".py"},
    "demo": {".py", ".md", ".safetensors", ".mp4", ".png", ".json", ".txt"},
    "workflows": {".json", ".jpg"},
    "subgraphs": {".json"},
    "web": {".md", ".png", ".jpg", ".webp", ".mp4", ".js", ".css"},
    "locales": {".json"},
}
LEFT_OUT = (Path("benchmarks/results"), Path("demo/training"))
WITHOUT_WHICH_NOTHING_RUNS = {
    "nodes/videoshop.py",
    "nodes/host/sampling.py",
    "pipelines/videoshop/inversion.py",
    "demo/rewind_demo_svd.safetensors",
    "demo/rewind_demo_t2v.safetensors",
    "demo/rewind_demo_t2i.safetensors",
    "demo/ei2/rewind_demo_ei2.safetensors",
    "demo/inversions/rewind_demo_inversion.safetensors",
    "demo/tokenizer/vocab.json",
    "demo/tokenizer/merges.txt",
    "demo/tokenizer/tokenizer_config.json",
    "demo/clip.mp4",
    "demo/edited.png",
    "workflows/videoshop.json",
    "workflows/videoshop.jpg",
    "web/docs/RewindEDMInversion.md",
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return comfy_tools.repository(tmp_path_factory.mktemp("published") / "rewind")


@pytest.fixture(scope="module")
def archive(repository: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(comfy_tools.published(repository, repository.parent / "home"))


def belongs(file: Path) -> bool:
    """Whether a file of the project is for its users' hosts."""
    if any(folder in file.parents for folder in LEFT_OUT):
        return False
    return str(file) in FILES or file.parts[0] in FOLDERS


def test_the_archive_holds_what_a_host_needs_and_nothing_else(repository, archive):
    listing = subprocess.check_output(["git", "ls-files", "-z"], cwd=repository, text=True).split("\0")
    wanted = {name for name in listing if name and belongs(Path(name))}
    assert wanted >= FILES | WITHOUT_WHICH_NOTHING_RUNS
    assert set(archive.namelist()) == wanted


def test_its_folders_hold_no_strays(archive):
    inside = [Path(name) for name in archive.namelist() if "/" in name]
    assert [str(file) for file in inside if file.suffix not in FOLDERS.get(file.parts[0], set())] == []


def test_its_files_are_whole(repository, archive):
    """The weights above all: a pointer in their place, or a half of them, would load nothing."""
    assert archive.testzip() is None
    for name in archive.namelist():
        assert archive.read(name) == (repository / name).read_bytes(), name
    assert sum(entry.file_size for entry in archive.infolist()) < 60 * 2**20, "every user downloads all of it"


def test_the_registry_would_accept_it(repository):
    """`comfy node validate`: it ends well on warnings too (exec, eval, two statements in a line), so they are read."""
    printed = comfy_tools.comfy("node", "validate", folder=repository, home=repository.parent / "home")
    assert "All validation checks passed" in printed
    assert "arning" not in printed


def test_validation_can_fail(tmp_path):
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "x"\nversion = "1.0.0"\n[tool.comfy]\nPublisherId = "x"\n'
    )
    (tmp_path / "bad.py").write_text("x = eval('1'); y = 2\n")
    printed = comfy_tools.comfy("node", "validate", folder=tmp_path, home=tmp_path / "home")
    assert "arning" in printed and "S307" in printed and "E702" in printed
