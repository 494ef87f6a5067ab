"""Break the library in one place at a time, and see whether the tests notice.

    python tests/mutations.py --count 40 --seed 0

Each mutation is one operator, comparison, condition, number or statement of ``optimjax/`` that becomes another. The
short form of the tests runs on a copy of the repository until the first failure; where it finds none, the thorough form
follows. What neither finds is printed with its line: either the change is without effect, such as a larger buffer, or
a test is missing.
"""

import argparse
import ast
import concurrent.futures
import copy
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 3600  # seconds; a mutation that runs into it is a loop without end
# Folders of tests, in the order in which they are likely to notice a mutation of a folder or module of the package.
ORDER = ("functional", "invariants", "facade", "parity", "schedulers", "interop", "devices", "house", "docs")
FORMS = {"short": (), "thorough": ("--thorough",)}
FIRST = {
    "algorithms": ("parity",),
    "lr_scheduler": ("schedulers",),
    "schedules": ("schedulers",),
    "formulas": ("schedulers",),
    "_facade": ("facade", "interop"),
    "_params": ("facade",),
    "_engine": ("facade",),
    "swa_utils": ("facade",),
    "demo": ("docs",),
    "plot": ("docs",),
    "__main__": ("docs",),
}

OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mod,
    ast.Mod: ast.FloorDiv,
}
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}


@dataclass(frozen=True)
class Mutation:
    """A piece of a file, from ``start`` to ``end`` in bytes, and what it becomes."""

    path: str
    line: int
    start: int
    end: int
    old: str
    new: str

    def __str__(self) -> str:
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return f"{self.path}:{self.line}: {old} -> {new}"

    def apply(self, root: Path) -> None:
        source = (ROOT / self.path).read_bytes()
        (root / self.path).write_bytes(source[: self.start] + self.new.encode() + source[self.end :])

    def undo(self, root: Path) -> None:
        shutil.copyfile(ROOT / self.path, root / self.path)


def mutated(node: ast.AST) -> ast.AST | None:
    """The node with one thing changed, if there is something to change."""
    new = copy.deepcopy(node)
    match new:
        case ast.BinOp(op=op) if type(op) in OPERATORS:
            new.op = OPERATORS[type(op)]()
        case ast.Compare(ops=[op, *_]):
            new.ops[0] = COMPARISONS[type(op)]()
        case ast.BoolOp(op=op):
            new.op = ast.Or() if isinstance(op, ast.And) else ast.And()
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            return operand
        case ast.IfExp(test=test) | ast.If(test=test):
            new = ast.UnaryOp(ast.Not(), test)
        case ast.Constant(value=bool(value)):
            new = ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            new = ast.Constant(value + 1)
        case ast.Expr(value=ast.Call()) | ast.AugAssign():
            new = ast.Pass()
        case _:
            return None
    return new


def candidates(path: str) -> Iterator[Mutation]:
    """Every mutation of a file; messages, annotations and what is only printed are left alone."""
    source = (ROOT / path).read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def visit(node: ast.AST) -> Iterator[Mutation]:
        if isinstance(node, (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom)):
            return
        new = mutated(node)
        if new is not None:
            place = node.test if isinstance(node, (ast.If, ast.IfExp)) else node
            start = starts[place.lineno - 1] + place.col_offset  # pyright: ignore[reportAttributeAccessIssue]
            end = starts[place.end_lineno - 1] + place.end_col_offset  # pyright: ignore
            text = ast.unparse(ast.fix_missing_locations(new))
            text = text if isinstance(node, ast.stmt) and not isinstance(node, ast.If) else f"({text})"
            yield Mutation(path, place.lineno, start, end, source[start:end].decode(), text)  # pyright: ignore
        for name, value in ast.iter_fields(node):
            if name not in ("annotation", "returns", "decorator_list"):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        yield from visit(child)

    yield from visit(ast.parse(source))


def chosen(count: int, seed: int) -> Sequence[Mutation]:
    """So many mutations of the package, by chance."""
    paths = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "optimjax").rglob("*.py"))
    return random.Random(seed).sample([mutation for path in paths for mutation in candidates(path)], count)


def copied(folder: Path) -> Path:
    """The files that git knows, elsewhere."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def nearest_first(path: str, root: Path) -> list[str]:
    """All tests: those named like a module of this path, then those of its folder, then the others."""
    words = set(re.findall(r"[a-z]{3,}", path.removeprefix("optimjax/").removesuffix(".py")))
    folders = [folder for word, found in FIRST.items() if word in path for folder in found]
    folders = list(dict.fromkeys([*folders, *ORDER]))
    files = [file for folder in folders for file in sorted((root / "tests" / folder).glob("test_*.py"))]
    files.sort(key=lambda file: not words & set(re.findall(r"[a-z]{3,}", file.stem)))  # stable
    return [path, *(str(file.relative_to(root)) for file in files), "optimjax"]


def failure(path: str, root: Path, *options: str) -> str | None:
    """The first test that fails with a mutation of this file, if one does."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *options]
    tests = nearest_first(path, root)
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        run = subprocess.run(
            [*command, *tests], cwd=root, env=environment, capture_output=True, text=True, timeout=LIMIT
        )
    except subprocess.TimeoutExpired:
        return "no end"
    if run.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", run.stdout, re.MULTILINE)
    return found.group(1) if found else f"pytest ended with {run.returncode}: {(run.stdout + run.stderr)[-300:]}"


def judged(mutation: Mutation, root: Path, forms: Sequence[str]) -> str:
    """Which form of the tests notices the mutation, and by which test."""
    mutation.apply(root)
    try:
        for form in forms:
            found = failure(mutation.path, root, *FORMS[form])
            if found:
                return f"{form}: {found}"
        return "NOT NOTICED"
    finally:
        mutation.undo(root)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=40, help="how many mutations (default 40)")
    parser.add_argument("--seed", type=int, default=0, help="which ones (default 0)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many at a time (default: one a core)")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="of the tests, in this order")
    parser.add_argument("--list", action="store_true", help="only print them")
    arguments = parser.parse_args()
    mutations = chosen(arguments.count, arguments.seed)
    if arguments.list:
        print(*mutations, sep="\n")
        return 0
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        roots = [copied(Path(folder) / str(job)) for job in range(arguments.jobs)]
        with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:

            def judge(mutation: Mutation) -> str:
                root = roots.pop()
                try:
                    return judged(mutation, root, arguments.forms)
                finally:
                    roots.append(root)

            futures = {pool.submit(judge, mutation): mutation for mutation in mutations}
            for future in concurrent.futures.as_completed(futures):
                mutation, verdict = futures[future], future.result()
                print(f"{mutation}\n    {verdict}", flush=True)
                missed += not verdict.startswith("short")
    print(f"{len(mutations) - missed} of {len(mutations)} noticed by the short form")
    return 0


if __name__ == "__main__":
    sys.exit(main())
