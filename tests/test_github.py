"""The public project's workflows on GitHub: they pin what the project promises, and decide rightly when to publish."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from comfy_host import ROOT
from comfy_tools import PROJECT

FOLDER = ROOT / ".github" / "workflows"
HASH = re.compile(r"[0-9a-f]{40}")


def read(name: str) -> dict:
    # YAML takes the key `on` for a boolean: BaseLoader leaves every word as it is written.
    return yaml.load((FOLDER / f"{name}.yml").read_text(encoding="utf-8"), yaml.BaseLoader)


def steps(workflow: dict) -> list[dict]:
    return [step for job in workflow["jobs"].values() for step in job.get("steps", [])]


def hosts() -> dict[str, dict]:
    """The ComfyUI releases that are checked out, by version."""
    found = {}
    for step in steps(read("test")):
        if step.get("with", {}).get("repository") == "Comfy-Org/ComfyUI":
            found[re.fullmatch(r"Check out ComfyUI (\d+\.\d+\.\d+)", step["name"])[1]] = step["with"]
    return found


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def test_the_oldest_host_tested_is_the_oldest_promised():
    oldest = min(hosts(), key=numbers)
    assert PROJECT["tool"]["comfy"]["requires-comfyui"] == f">={oldest}"
    source = (ROOT / "__init__.py").read_text(encoding="utf-8")
    assert re.search(r"^MINIMUM_HOST = \((.*)\)$", source, re.MULTILINE)[1] == ", ".join(oldest.split("."))


def test_the_readme_names_the_hosts_tested():
    (row,) = re.findall(r"^\| ComfyUI \|(.*)\|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    minimum, tested = row.split("tested on")
    assert re.findall(r"\d+\.\d+\.\d+", minimum) == [min(hosts(), key=numbers)]
    assert set(re.findall(r"\d+\.\d+\.\d+", tested)) == set(hosts())


def test_every_host_checked_out_is_tested_at_a_commit():
    (job,) = read("test")["jobs"].values()
    paths = [path.removeprefix("${{ github.workspace }}/") for path in job["env"]["COMFYUI_PATH"].split(":")]
    assert sorted(paths) == sorted(host["path"] for host in hosts().values())
    assert all(HASH.fullmatch(host["ref"]) for host in hosts().values())
    assert len({host["ref"] for host in hosts().values()}) == len(hosts()) > 1


@pytest.mark.parametrize("name", ["test", "publish"])
def test_actions_are_pinned_by_commit(name):
    used = [step["uses"] for step in steps(read(name)) if "uses" in step]
    assert len(used) >= 3
    assert [use for use in used if not HASH.fullmatch(use.split("@")[1])] == []


def test_the_tests_that_run_are_ours():
    """On a push and on a pull request the quick ones; once a week and by hand all of them."""
    workflow = read("test")
    assert {"push", "pull_request", "schedule", "workflow_dispatch", "workflow_call"} == set(workflow["on"])
    (job,) = workflow["jobs"].values()
    target = job["env"]["TARGET"]
    assert re.findall(r"event_name == '(\w+)'", target) == ["schedule", "workflow_dispatch"]
    assert target.endswith("&& 'test-all' || 'test' }}")
    (run,) = [step for step in job["steps"] if step.get("run", "").startswith("make")]
    assert run["run"] == 'make "$TARGET"'
    rules = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "\ntest: " in rules and "\ntest-all: " in rules


def test_nothing_is_published_untested_or_from_a_fork():
    workflow = read("publish")
    owner = re.search(r"github\.com/([\w-]+)/", PROJECT["project"]["urls"]["Repository"])[1]
    assert owner == PROJECT["tool"]["comfy"]["PublisherId"]
    jobs = workflow["jobs"]
    assert jobs["test"]["uses"] == "./.github/workflows/test.yml"
    for name in ("version", "publish"):
        assert f"github.repository_owner == '{owner}'" in jobs[name]["if"]
    assert set(jobs["publish"]["needs"]) == {"version", "test"}
    with_secret = [name for name, job in jobs.items() if "secrets." in str(job)]
    assert with_secret == ["publish"]
    assert workflow["on"] == {"push": {"branches": ["main"], "paths": ["pyproject.toml"]}}


def git(folder: Path, *words: str) -> str:
    command = ["git", "-c", "user.name=tests", "-c", "user.email=tests@localhost", *words]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize(
    "before, now, changed",
    [("0.1.0", "0.2.0", "changed=true"), ("0.1.0", "0.1.0", "changed=false"), ("", "0.2.0", None)],
)
def test_a_version_is_compared_with_the_one_before_the_push(tmp_path, before, now, changed):
    """The step of publish.yml itself, run in a repository of two commits; an unreadable version stops it."""
    git(tmp_path, "init", "--quiet")
    for version, dependency in ((before, "a"), (now, "b")):
        line = f'version = "{version}"\n' if version else ""
        (tmp_path / "pyproject.toml").write_text(f'[project]\nname = "x"\n{line}dependencies = ["{dependency}"]\n')
        git(tmp_path, "add", "--all")
        git(tmp_path, "-c", "commit.gpgsign=false", "commit", "--quiet", "--message", "x")
    (step,) = [step for step in steps(read("publish")) if step.get("id") == "compare"]
    output = tmp_path / "output"
    variables = {"BEFORE": git(tmp_path, "rev-parse", "HEAD^"), "GITHUB_OUTPUT": str(output)}
    shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
    result = subprocess.run(shell, cwd=tmp_path, env={**os.environ, **variables}, capture_output=True, text=True)
    assert (result.returncode == 0) == bool(changed), result.stderr
    if changed:
        assert output.read_text().splitlines() == [changed]
    else:
        assert not output.exists()
