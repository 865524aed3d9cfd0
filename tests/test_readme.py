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


# --- what was measured ------------------------------------------------------------------------------------------------

PARAGRAPH = r"\n(?=\*\*[A-Z][^*]*\*\* \()"  # **Masks** (`rewind benchmark local`: ...
FIGURE, NUMBER = r"(?<![\w.])[+-]?\d+\.\d+", r"(?<![\w.])[+-]?\d+(?:\.\d+)?"


def table_rows(text):
    return [line for line in text.splitlines() if line.startswith("|")]


def measured_rows():
    """The rows of the README's tables of figures, each with the rows of the results that their paragraph names."""
    for part in re.split(PARAGRAPH, README.split("\n## What was measured\n")[1].split("\n## ")[0]):
        files = sorted(set(re.findall(r"\]\((benchmarks/results/\w+\.md)\)", part)))
        results = [row for file in files for row in table_rows((ROOT / file).read_text(encoding="utf-8"))]
        yield from ((row, results) for row in table_rows(part) if re.search(FIGURE, row))


def holds(row, figure):
    """Whether a row of results has a number that is this figure, rounded."""
    half = 0.5 * 10 ** -len(figure.split(".")[1]) + 1e-9
    return any(abs(float(number) - float(figure)) <= half for number in re.findall(NUMBER, row))


def found(row, results):
    """Whether all figures of a row stand in one row of the results, or in one row each of two tables."""
    figures = re.findall(FIGURE, row)
    first = max(results, key=lambda other: sum(holds(other, figure) for figure in figures))
    rest = [figure for figure in figures if not holds(first, figure)]
    return any(all(holds(other, figure) for figure in rest) for other in results)


MEASURED = list(measured_rows())


@pytest.mark.parametrize(("row", "results"), MEASURED, ids=[row.split("|")[1].strip() for row, _ in MEASURED])
def test_figures_are_those_of_the_results(row, results):
    assert found(row, results)


def test_another_figure_is_noticed():
    """A figure that is off by a tenth of itself is missed in few rows, where others happen to be the like."""
    assert len(MEASURED) > 40
    changed = [
        (re.sub(FIGURE, lambda match: f"{float(match[0]) * 1.1 + 0.1:.2f}", row, count=1), r) for row, r in MEASURED
    ]
    assert sum(found(row, results) for row, results in changed) < len(MEASURED) / 4
