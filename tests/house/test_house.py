"""The house stands in floors: imports run downwards, no module is reached in a circle, and doors only re-export."""

import ast
from pathlib import Path

import optimjax

ROOT = Path(optimjax.__file__).parent
# From the ground up. A folder's modules import one another, without a circle, and those of the floors below.
FLOORS = [
    "_storage",
    "_core",
    "rule",
    "_params",
    "_engine",
    "_facade",
    "optimizer",
    "schedules",
    "lr_scheduler",
    "algorithms.parts",
    "algorithms",
    "swa_utils",
    "sweeps",
    "plot",
    "functional",
    "interop",
    "",  # optimjax/__init__.py
    "demo",
    "_command",
    "__main__",
]
DOORS = ["rule", "optimizer", "functional", ""]


def modules() -> dict[str, Path]:
    """Every module by its name within the package; a folder's `__init__` has the folder's name."""
    named = {path: path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in ROOT.rglob("*.py")}
    return {("." + name).removesuffix(".__init__").removeprefix("."): path for path, name in named.items()}


MODULES = modules()


def floor_of(name: str) -> int:
    """The floor with the longest name that is the module's, or its folder's."""
    fits = [floor for floor in FLOORS if name == floor or name.startswith(f"{floor}.")]
    assert fits or name == "", f"{name} is on no floor: give it one"
    return FLOORS.index(max(fits, key=len, default=""))


def imported(name: str) -> set[str]:
    """What a module imports of the package, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "optimjax":
            module = (node.module or "").removeprefix("optimjax").removeprefix(".")
            for alias in node.names:  # a name may be a module, too
                below = f"{module}.{alias.name}".removeprefix(".")
                found.add(below if below in MODULES else module)
        if isinstance(node, ast.Import):
            found |= {
                alias.name.removeprefix("optimjax").removeprefix(".")
                for alias in node.names
                if alias.name.split(".")[0] == "optimjax"
            }
    return found


def test_imports_run_downwards() -> None:
    upwards = [(name, other) for name in MODULES for other in imported(name) if floor_of(other) > floor_of(name)]
    assert not upwards


def test_there_is_no_circle() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle: {' -> '.join((*path, name))}"
        if name not in done:
            for other in imported(name):
                visit(other, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


def test_doors_only_re_export() -> None:
    """Nothing that a user imports is defined at a door."""
    for name in DOORS:
        for node in ast.parse(MODULES[name].read_text()).body:
            assert not isinstance(node, (ast.ClassDef,)), (name, node.name)
            assert not isinstance(node, ast.FunctionDef) or node.name.startswith("__"), (name, node.name)


def test_nothing_is_too_long() -> None:
    """Lines of code, without documentation: 300 in a class, 60 in a function; a solver's loop may stay whole."""
    whole = {"minimize", "strong_wolfe", "__init__"}
    long = []
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                most = 300 if isinstance(node, ast.ClassDef) else 60
                lines = code_lines(node, path.read_text().splitlines())
                if lines > most and node.name not in whole:
                    long.append((name, node.name, lines))
    assert not long


def code_lines(node: ast.AST, lines: list[str]) -> int:
    """The lines of a definition that are neither empty, comments nor documentation."""
    skipped: set[int] = set()
    for inner in ast.walk(node):
        if isinstance(inner, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(inner) is not None:
            text = inner.body[0]
            skipped |= set(range(text.lineno, (text.end_lineno or text.lineno) + 1))
    span = range(node.lineno, node.end_lineno + 1)  # pyright: ignore[reportAttributeAccessIssue]
    return sum(
        1 for n in span if n not in skipped and lines[n - 1].strip() and not lines[n - 1].strip().startswith("#")
    )
