"""`make freeze`: the workflows of a version are kept, and once it is released they are left alone."""

from __future__ import annotations

from pathlib import Path

import freeze
import pytest


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "x"\nversion = "1.2.0"\n')
    (tmp_path / "CHANGELOG.md").write_text("## [1.2.0] - unreleased\n\n## [1.1.0] - 2026-01-31\n")
    (tmp_path / "workflows").mkdir()
    (tmp_path / "workflows" / "a.json").write_text("{}")
    return tmp_path


def test_it_keeps_the_workflows_of_this_version(project):
    assert freeze.differences(project) == ["a.json is only in workflows"]
    assert freeze.freeze(project) == 1
    assert (project / freeze.FIXTURES / "1.2.0" / "a.json").read_text() == "{}"
    assert freeze.differences(project) == []


def test_a_change_shows_until_it_is_frozen_again(project):
    freeze.freeze(project)
    (project / "workflows" / "a.json").rename(project / "workflows" / "b.json")
    (project / "workflows" / "c.json").write_text("[]")
    assert freeze.differences(project) == [
        "a.json is only in tests/fixtures/workflows/1.2.0",
        "b.json is only in workflows",
        "c.json is only in workflows",
    ]
    freeze.freeze(project)
    assert freeze.differences(project) == []
    (project / "workflows" / "c.json").write_text("{}")
    assert freeze.differences(project) == ["c.json has changed since it was frozen"]


def test_a_released_version_is_left_alone(project):
    freeze.freeze(project)
    (project / "CHANGELOG.md").write_text("## [1.2.0] - 2026-02-28\n")
    (project / "workflows" / "a.json").write_text("[]")
    with pytest.raises(ValueError, match=r"1\.2\.0 is released.*Raise the version"):
        freeze.freeze(project)
    assert (project / freeze.FIXTURES / "1.2.0" / "a.json").read_text() == "{}"


def test_what_stands_against_publishing(project):
    assert freeze.unready(project) == ["a.json is only in workflows: make freeze", "the CHANGELOG gives 1.2.0 no date"]
    freeze.freeze(project)
    (project / "CHANGELOG.md").write_text("## [1.2.0] - 2026-02-28\n")
    assert freeze.unready(project) == []


def test_the_project_has_a_version_that_the_changelog_names():
    text = (freeze.ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{freeze.version()}] - " in text
