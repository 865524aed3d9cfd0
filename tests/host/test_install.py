"""The pack installed as its users do it, into a copy of the host and of its environment as they were before it came.

ComfyUI Manager's `cm-cli` and `comfy node install` clone it from a git path and let pip bring what it requires.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import comfy_host
import comfy_tools
import host_clone
import pytest
from graph import to_api

GOLDEN = Path(__file__).parent / "golden" / "schemas.json"
NAME = "rewind"
# No package that begins so may come with the pack: torch is the user's own, in the build that fits their card.
OF_TORCH = ("torch", "nvidia", "triton", "cuda")


def scan(source: str) -> set[str]:
    """The node ids that ComfyUI Manager finds in a source file, by the rules of its own scanner.

    It runs nothing: a class whose base is named ComfyNode, in its define_schema a call of something named Schema, in
    that the keyword node_id with a plain string. Ids put together at run time, or in a class of another base, stay
    unseen, and Manager cannot tell a user who lacks them which pack to install.
    """

    def last_name(node: ast.expr) -> str:
        return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")

    found = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ClassDef) or "ComfyNode" not in map(last_name, node.bases):
            continue
        schemas = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "define_schema"]
        calls = [call for schema in schemas for call in ast.walk(schema) if isinstance(call, ast.Call)]
        for call in calls:
            if last_name(call.func) == "Schema":
                values = [word.value for word in call.keywords if word.arg == "node_id"]
                found |= {value.value for value in values if isinstance(value, ast.Constant)}
    return found


def test_manager_finds_every_node(host):
    files = [file for file in comfy_host.pack_files() if file.suffix == ".py"]
    found = set().union(*(scan((comfy_host.ROOT / file).read_text(encoding="utf-8")) for file in files))
    assert found == set(host.own_nodes())


@pytest.mark.parametrize(
    "source, found",
    [
        ("class A(io.ComfyNode):\n def define_schema(cls):\n  return io.Schema(node_id='A')", {"A"}),
        ("class A(ComfyNode):\n def define_schema(cls):\n  return Schema(node_id='A')", {"A"}),
        ("class A(io.ComfyNode):\n def define_schema(cls):\n  return Schema(node_id='A' + X)", set()),
        ("class A(Base):\n def define_schema(cls):\n  return Schema(node_id='A')", set()),
        ("class A(io.ComfyNode):\n def define_schema(cls):\n  return schema(node_id='A')", set()),
    ],
)
def test_the_scan_sees_what_manager_sees(source, found):
    assert scan(source) == found


@dataclass
class Computer:
    """A user's computer: the host, its environment, the pack's repository, a home."""

    host: Path
    environment: Path
    repository: Path
    home: Path
    before: dict[str, str]

    @property
    def pack(self) -> Path:
        return self.host / "custom_nodes" / NAME

    @property
    def url(self) -> str:
        """The git path in the one form that both programs take."""
        return f"file://localhost{self.repository.as_posix()}"

    def clean(self) -> None:
        """As before the pack came."""
        shutil.rmtree(self.pack, ignore_errors=True)
        if added := sorted(host_clone.freeze(self.environment).keys() - self.before.keys()):
            host_clone.pip(self.environment, "uninstall", "--yes", *added)
            assert host_clone.freeze(self.environment) == self.before

    def server(self) -> comfy_host.Server:
        """The host started as a user starts it, with whatever is installed."""
        python = comfy_tools.python_of(self.environment)
        return comfy_host.Server(self.host, self.host, python=python, install=lambda folder: None)


@pytest.fixture(scope="module")
def computer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Computer]:
    host, folder = Path(os.environ["REWIND_HOST"]), tmp_path_factory.mktemp("computer")
    # Beside the host's own environment, on the same disk, for the hard links.
    environments = Path(tempfile.mkdtemp(prefix="install-", dir=Path(sys.prefix).parent))
    try:
        environment = host_clone.clone_environment(host_clone.requirements_of(host), environments / "environment")
        host_clone.pip(environment, "install", "--quiet", "-r", str(host / "manager_requirements.txt"))
        yield Computer(
            host=host_clone.copy_host(host, folder / "ComfyUI"),
            environment=environment,
            repository=comfy_tools.repository(folder / NAME),
            home=folder / "home",
            before=host_clone.freeze(environment),
        )
    finally:
        shutil.rmtree(environments)


def by_manager(computer: Computer) -> str:
    program = comfy_tools.python_of(computer.environment).with_name("cm-cli")
    command = [program, "install", computer.url, "--mode", "local"]
    # PYTHONPATH: the Manager of the older host looks for the host's modules there, not where COMFYUI_PATH says.
    where = {"COMFYUI_PATH": str(computer.host), "PYTHONPATH": str(computer.host)}
    return comfy_tools.run(command, folder=computer.host, home=computer.home, **where)


def by_comfy_cli(computer: Computer) -> str:
    python = comfy_tools.python_of(computer.environment)
    if subprocess.run([python, "-c", "import cm_cli"], capture_output=True).returncode:
        pytest.skip(f"comfy-cli needs a newer Manager than {computer.before['comfyui-manager']}, which this host pins")
    words = [f"--workspace={computer.host}", "node", "install", computer.url, "--mode", "local"]
    return comfy_tools.comfy(*words, folder=computer.host, home=computer.home, environment=computer.environment)


def by_git(computer: Computer) -> str:
    """As the README has it."""
    printed = comfy_tools.run(["git", "clone", computer.url, computer.pack], computer.host, computer.home)
    return printed + host_clone.pip(computer.environment, "install", "-r", str(computer.pack / "requirements.txt"))


def by_the_registry(computer: Computer) -> str:
    """As Manager does it with what the registry gives it: the archive, unpacked, and its requirements."""
    copy = comfy_tools.repository(computer.home / "published" / NAME)
    comfy_tools.unpack(comfy_tools.published(copy, computer.home), computer.pack)
    return host_clone.pip(computer.environment, "install", "-r", str(computer.pack / "requirements.txt"))


def check_that_it_works(computer: Computer) -> None:
    """The host starts with all nodes, no import fails, and a workflow that ships with the pack runs to its end."""
    server = computer.server()
    try:
        known = server.object_info()
        own = {name for name, node in known.items() if node["python_module"] == f"custom_nodes.{NAME}"}
        assert own == set(json.loads(GOLDEN.read_text(encoding="utf-8")))
        log = server.log.read_text()
        assert "IMPORT FAILED" not in log and "Traceback" not in log, log
        prompt = to_api(json.loads((computer.pack / "workflows" / "videoshop.json").read_text("utf-8")), known)
        for node in prompt.values():
            if node["class_type"] == "BasicScheduler":
                node["inputs"]["steps"] = 2
        history = server.prompt(prompt)
        assert any(output.get("images") for output in history["outputs"].values())
    finally:
        server.stop()


@pytest.mark.slow
@pytest.mark.parametrize("install", [by_manager, by_comfy_cli, by_git, by_the_registry])
def test_it_installs_and_leaves_the_environment_alone(computer, install):
    computer.clean()
    printed = install(computer)
    assert (computer.pack / "__init__.py").is_file(), printed
    if install in (by_manager, by_comfy_cli):  # they end well also where they failed
        assert "[INSTALLED]" in printed and "ERROR" not in printed, printed
    after = host_clone.freeze(computer.environment)
    assert {name: (line, after.get(name)) for name, line in computer.before.items() if after.get(name) != line} == {}
    assert "diffusers" in after, f"the requirements were not installed\n{printed}"
    added = after.keys() - computer.before.keys()
    assert len(added) < 10 and not any(name.startswith(OF_TORCH) for name in added), added
    assert {"torch", "numpy", "transformers"} <= computer.before.keys()
    host_clone.pip(computer.environment, "check")
    check_that_it_works(computer)


@pytest.mark.slow
def test_it_works_where_its_requirements_never_came(computer):
    """A user who cloned it and installed nothing: diffusers is truly not there, and every node loads and runs."""
    computer.clean()
    comfy_tools.run(["git", "clone", computer.url, computer.pack], computer.host, computer.home)
    assert "diffusers" not in host_clone.freeze(computer.environment)
    check_that_it_works(computer)


@pytest.mark.slow
def test_a_changed_environment_is_seen(computer):
    """The comparison above can fail: another version of a package that the host has shows."""
    computer.clean()
    try:
        host_clone.pip(computer.environment, "install", "--quiet", "zipp==3.19.0", "toml==0.10.1")
        after = host_clone.freeze(computer.environment)
        assert after["toml"] != computer.before["toml"]
        assert after.keys() - computer.before.keys() == {"zipp"}
    finally:
        host_clone.pip(computer.environment, "install", "--quiet", computer.before["toml"])
        computer.clean()
