"""`make freeze`: keep the workflows of this version, as its users will have saved them, for all versions to come.

They go to tests/fixtures/workflows/<version>/; tests/host/test_saved_workflows.py holds every later version to them.
Once the CHANGELOG gives the version a date, its copies are what users have: they are not written again.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
FIXTURES = Path("tests") / "fixtures" / "workflows"


def version(root: Path = ROOT) -> str:
    """The version that pyproject.toml gives."""
    return re.search(r'^version = "([^"]+)"$', (root / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]


def released(root: Path = ROOT) -> list[str]:
    """The versions to which the CHANGELOG gives a date, `## [1.2.3] - 2026-11-30`, newest first."""
    heading = r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d{2}-\d{2}$"
    return re.findall(heading, (root / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)


def differences(root: Path = ROOT) -> list[str]:
    """The names in which this version's copies and workflows/ differ, each with what is the matter."""
    folder = root / FIXTURES / version(root)
    names = {path.name for place in (folder, root / "workflows") for path in place.glob("*.json")}
    found = []
    for name in sorted(names):
        copy, graph = folder / name, root / "workflows" / name
        if not copy.is_file() or not graph.is_file():
            found.append(f"{name} is only in {(graph if graph.is_file() else copy).parent.relative_to(root)}")
        elif copy.read_bytes() != graph.read_bytes():
            found.append(f"{name} has changed since it was frozen")
    return found


def unready(root: Path = ROOT) -> list[str]:
    """What stands against publishing this version, in words."""
    found = [f"{line}: make freeze" for line in differences(root)]
    if version(root) not in released(root):
        found.append(f"the CHANGELOG gives {version(root)} no date")
    return found


def freeze(root: Path = ROOT) -> int:
    """Copy workflows/*.json to this version's folder, in place of what is there; how many."""
    if version(root) in released(root):
        raise ValueError(
            f"{version(root)} is released: its users have saved these workflows. Raise the version in pyproject.toml"
        )
    folder = root / FIXTURES / version(root)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    graphs = sorted((root / "workflows").glob("*.json"))
    for graph in graphs:
        shutil.copyfile(graph, folder / graph.name)
    return len(graphs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if this version is not to be published"
    )
    if parser.parse_args().check:
        found = unready()
        print("\n".join(found), file=sys.stderr)
        return int(bool(found))
    try:
        print(f"froze {freeze()} workflows of version {version()} in {FIXTURES / version()}")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
