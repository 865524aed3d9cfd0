"""What is in the package, and which way its imports run (docs/architecture.md)."""

from __future__ import annotations

import ast
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from comfy_host import ROOT, copy_files, pack_files
from comfy_tools import PROJECT, python_of

HOST_MODULES = {
    "comfy",
    "comfy_api",
    "comfy_api_nodes",
    "comfy_execution",
    "comfy_extras",
    "execution",
    "folder_paths",
    "server",
}
DATA_SUFFIXES = {".safetensors", ".mp4", ".png", ".json", ".jpg", ".txt"}
# Who may import whom, inside the package. Left out: anybody.
ALLOWED = {
    "pipelines": {"pipelines"},
    "demo": {"demo", "pipelines"},
    "nodes": {"nodes", "demo", "pipelines"},
    "benchmarks": {"benchmarks", "demo", "pipelines"},
    "commands": {"commands", "benchmarks", "demo", "pipelines"},
}


def sources() -> list[Path]:
    """The package's Python files, relative to its root."""
    outside = {"docs", "web", "workflows", "subgraphs", "locales"}
    files = [
        f for f in pack_files() if f.suffix == ".py" and not f.parts[0].startswith(".") and f.parts[0] not in outside
    ]
    assert Path("__init__.py") in files
    return files


def imports(file: Path) -> list[tuple[str, bool, ast.stmt]]:
    """Each import of a file: its name (inside: from the package's root), whether it is relative, the statement."""
    found = []
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, False, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append((node.module, False, node))
        elif isinstance(node, ast.ImportFrom):
            inside = file.parent.parts[: len(file.parent.parts) - (node.level - 1)]
            base = [*inside, *(node.module or "").split(".")]
            name = ".".join(part for part in base if part)
            found += [(name, True, node)] if name else [(alias.name, True, node) for alias in node.names]
    return found


def runs_at_import(tree: ast.AST) -> list[ast.stmt]:
    """The statements that run when a module is imported: all but the bodies of functions and of `if TYPE_CHECKING`."""
    found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        found += [node, *runs_at_import(node)]
    return found


def names_imported_at_import_time(file: Path) -> set[str]:
    statements = set(map(ast.dump, runs_at_import(ast.parse((ROOT / file).read_text(encoding="utf-8")))))
    return {
        name.split(".")[0] for name, relative, node in imports(file) if not relative and ast.dump(node) in statements
    }


def test_the_packages_listed_are_those_in_the_tree():
    folders = {file.parent for file in sources()}
    missing = [str(folder) for folder in folders if not (ROOT / folder / "__init__.py").is_file()]
    assert missing == [], "a folder with Python in it has no __init__.py"
    tree = {".".join(("rewind", *folder.parts)) for folder in folders}
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(tree)


def test_both_lists_of_requirements_are_the_same():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split("\n")
    assert [line for line in lines if line] == PROJECT["project"]["dependencies"]
    for line in PROJECT["project"]["dependencies"]:
        assert ">=" in line and "<" not in line and not line.startswith("torch"), "lower bounds only, never torch"


def test_the_folder_is_not_registered_twice():
    assert "web" not in PROJECT["tool"]["comfy"]


@pytest.mark.parametrize("file", sources(), ids=str)
def test_imports_inside_the_package_are_relative(file):
    own = {"rewind", *(f.parts[0].removesuffix(".py") for f in sources())} - {"__init__"}
    assert [name for name, relative, _ in imports(file) if not relative and name.split(".")[0] in own] == []


@pytest.mark.parametrize("file", [f for f in sources() if f.parts[0] in ALLOWED], ids=str)
def test_imports_run_one_way(file):
    inside = {name.split(".")[0] for name, relative, _ in imports(file) if relative}
    assert inside <= ALLOWED[file.parts[0]]


@pytest.mark.parametrize("file", [f for f in sources() if f.parts[0] != "nodes"], ids=str)
def test_only_the_nodes_know_the_host(file):
    known = {name.split(".")[0] for name, relative, _ in imports(file) if not relative} & HOST_MODULES
    at_import = names_imported_at_import_time(file) & HOST_MODULES
    assert at_import == set()
    assert known == set() or file == Path("__init__.py")


@pytest.mark.parametrize("file", [f for f in sources() if f.parts[0] in {"nodes", "__init__.py", "pipelines"}], ids=str)
def test_diffusers_is_imported_only_when_it_is_needed(file):
    assert names_imported_at_import_time(file) & {"diffusers", "transformers"} == set()


def test_the_import_rules_can_fail(tmp_path, monkeypatch):
    bad = "from comfy import sd\nfrom ..nodes import x\nif True:\n    import diffusers\ndef f():\n    import einops\n"
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines" / "bad.py").write_text(bad)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    file = Path("pipelines/bad.py")
    assert {name for name, relative, _ in imports(file) if relative} == {"nodes"}
    assert names_imported_at_import_time(file) == {"comfy", "diffusers"}


def test_the_package_imports_without_a_host():
    script = "import sys, rewind; assert not [m for m in sys.modules if m.split('.')[0] in ('comfy', 'comfy_api')]"
    subprocess.run([sys.executable, "-c", script], cwd=Path(sys.prefix), check=True, timeout=120)


def test_an_installed_wheel_finds_its_data(tmp_path):
    """In an environment of its own: weights, clip and workflows are there and load, and the command starts."""
    copy = tmp_path / "source"
    copy_files(pack_files(), copy)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", tmp_path, copy], check=True, timeout=300)
    (wheel,) = tmp_path.glob("rewind-*.whl")

    clean = tmp_path / "clean"
    venv.create(clean, with_pip=True)
    python = python_of(clean)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True, timeout=300)
    # What it depends on comes from this environment, rather than being downloaded again.
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.check_output([python, "-c", ask], text=True).strip())
    here = subprocess.check_output([sys.executable, "-c", ask], text=True).strip()
    (site / "dependencies.pth").write_text(here + "\n")

    folders = {"demo", "workflows", "subgraphs", "web", "locales"}
    data = [f for f in pack_files() if f.parts[0] in folders and f.suffix in DATA_SUFFIXES]
    assert {"demo", "workflows", "subgraphs"} <= {f.parts[0] for f in data}
    assert any(f.suffix == ".safetensors" for f in data)
    assert [str(f) for f in data if not (site / "rewind" / f).is_file()] == []
    where = subprocess.check_output([python, "-c", "import rewind; print(rewind.__file__)"], text=True, cwd=tmp_path)
    assert Path(where.strip()) == site / "rewind" / "__init__.py"
    load = (
        "import json, pathlib, rewind\n"
        "from rewind.demo.models import load_components\n"
        "from rewind.demo.text import load_text_components\n"
        "from rewind.demo.text_to_image import EI2_WEIGHTS, load_image_components\n"
        "from rewind.pipelines.ei2.weights import load_weights\n"
        "from rewind.pipelines.video import read_video\n"
        "from rewind.demo.clip import CLIP\n"
        "assert len(load_components()) == 3 and len(read_video(CLIP).frames) == 8\n"
        "*_, tokenizer = load_text_components()\n"
        "assert len(tokenizer('a red circle moves right').input_ids) == 7\n"
        "load_weights(EI2_WEIGHTS).check(load_image_components()[0])\n"
        "graphs = list((pathlib.Path(rewind.__file__).parent / 'workflows').glob('*.json'))\n"
        "assert graphs and all(json.loads(graph.read_text(encoding='utf-8'))['nodes'] for graph in graphs)\n"
    )
    subprocess.run([python, "-c", load], check=True, timeout=300, cwd=tmp_path)
    subprocess.run(
        [python.parent / "rewind", "--help"], check=True, timeout=120, cwd=tmp_path, stdout=subprocess.DEVNULL
    )
