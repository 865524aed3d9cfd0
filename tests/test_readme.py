"""The README shows what it says it shows: every file it points to is there, every node with its picture."""

import re

import pytest
from comfy_host import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
NODES = sorted(page.stem for page in (ROOT / "web" / "docs").glob("*.md"))  # a host test holds them to the schemas
WORKFLOWS = sorted(file.stem for file in (ROOT / "workflows").glob("*.json"))


def test_every_file_that_the_readme_points_to_is_there():
    places = [place for place in re.findall(r"\]\(([^)#]+)[^)]*\)", README) if "://" not in place]
    assert len(places) > 10
    assert [place for place in places if not (ROOT / place).exists()] == []


@pytest.mark.parametrize("node", NODES)
def test_every_node_has_a_section_with_its_picture_in_a_graph(node):
    section = README.split("\n## Nodes\n")[1].split("\n## ")[0]
    assert f"](docs/nodes/{node}.png)" in section


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_every_workflow_is_in_the_table_and_has_its_picture(workflow):
    assert f"| `{workflow}` |" in README
    assert (ROOT / "docs" / "workflows" / f"{workflow}.png").is_file()
