"""Every notebook runs, and is stored as it ran: with its outputs, without errors and without paths of a machine."""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOKS = sorted((Path(__file__).parent.parent.parent / "notebooks").glob("*.ipynb"))
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
MACHINE_PATH = re.compile(r"/(?:home|Users|root|work|tmp|usr|opt)/|[A-Z]:\\|\.venv")


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(cell):
    """What a reader sees of a cell: its source and its outputs but for pictures."""
    yield cell.source
    for output in cell.get("outputs", []):
        yield output.get("text", "")
        yield from (str(data) for kind, data in output.get("data", {}).items() if not kind.startswith("image/"))


def shown(cell):
    """What is the same whenever a cell runs: the kinds of its outputs, and their text but for numbers."""
    for output in cell.outputs:
        text = {"text/plain": output.text} if "text" in output else output.get("data", {})
        yield (
            output.output_type,
            {
                kind: None if kind.startswith("image/") else " ".join(NUMBER.sub("#", str(value)).split())
                for kind, value in sorted(text.items())
            },
        )


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_stored_with_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run from top to bottom, once"
    outputs = [output for cell in cells for output in cell.outputs]
    kinds = {output.output_type for output in outputs}
    assert kinds, "stored without outputs"
    assert "error" not in kinds
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    for cell in notebook.cells:
        for text in texts(cell):
            assert not MACHINE_PATH.search(text), text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    prose = "".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", prose)
    assert targets
    assert [target for target in targets if not (path.parent / target).exists()] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_runs(path):
    stored = nbformat.read(path, as_version=4)
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(path.parent)}}).execute()
    for cell, before in zip(code_cells(notebook), code_cells(stored), strict=True):
        assert list(shown(cell)) == list(shown(before)), f"run the notebook again:\n{cell.source}"


def test_what_is_shown():
    def cell(**data):
        return nbformat.v4.new_code_cell(outputs=[nbformat.v4.new_output("execute_result", data)])

    def seen(**data):
        return list(shown(cell(**{kind.replace("_", "/"): value for kind, value in data.items()})))

    stored = seen(text_plain="lr 0.10  in 3 s", image_png="iVBOR")
    assert stored == seen(text_plain="lr 1e-1 in 12.5 s", image_png="iVBAA")  # numbers and pixels may differ
    assert stored != seen(text_plain="rate 0.10 in 3 s", image_png="iVBOR")
    assert stored != seen(text_plain="lr 0.10 in 3 s", image_png="iVBOR", text_html="<b>lr 0.10</b>")
