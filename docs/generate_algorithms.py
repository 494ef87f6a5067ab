"""A Sphinx extension that writes the page of algorithms from the package, so that a new algorithm needs no line here.

The text is that of the docstrings and of the comments next to the slots, the ranges are those of the annotations, and
shapes and memory are those of the state that `init` of the functional face would return.
"""

import importlib
import inspect
import math
import pkgutil
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optimjax import algorithms
from optimjax.optimizer import Optimizer
from optimjax.rule import Ignored, Kind, Numeric, Structural

PYTORCH = "https://docs.pytorch.org/docs/stable/generated/torch.optim.{}.html"
MATRIX = (1024, 512)
SIZES = {1024: "m", 512: "n", 1024 * 512: "mn"}  # how shapes are shown

INTRODUCTION = f"""\
.. Written by generate_algorithms.py.

Algorithms
==========

Each algorithm has two faces with the same keywords: a class with PyTorch's name, and a pure function that returns an
:class:`~optimjax.functional.Algorithm`. Wherever a number is expected, the function also takes an array, a schedule or
a tree of these. Changing a number compiles nothing; other values are compiled in.

*Memory* is the size of the state in bytes for each element of a float32 matrix of {MATRIX[0]}×{MATRIX[1]}, whose own
elements have 4: with the default flags, and with every flag on that can be.

*Differs from optax* compares with the optax function of the same name. That optax has no default for the learning rate
goes without saying. ``python benchmarks/differences.py`` measures these differences.
"""


class Entry(NamedTuple):
    """One algorithm."""

    cls: type[Optimizer]
    factory: Callable[..., Any]
    title: str
    equations: str
    source: str
    differs_from_pytorch: str
    differs_from_optax: str


def setup(app: Any) -> dict[str, Any]:
    """Have Sphinx write the page before it reads the sources."""
    app.connect("builder-inited", lambda app: write(Path(app.srcdir) / "algorithms.rst"))
    return {"parallel_read_safe": True}


def write(path: Path) -> None:
    """Write the page, if it has changed."""
    text = page()
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def page() -> str:
    """The page, in reStructuredText."""
    found = [read(module.name) for module in pkgutil.iter_modules(algorithms.__path__) if not module.ispkg]
    rows = [(f"`{entry.cls.__name__}`_", entry.title, " to ".join(dict.fromkeys(memory(entry)))) for entry in found]
    overview = table(("", "", "Memory"), rows, widths=(15, 70, 15))
    return "\n".join([INTRODUCTION, overview, *map(section, found)])


def read(name: str) -> Entry:
    """The algorithm of one module in `optimjax.algorithms`.

    Raises:
      ValueError: the docstring has not the layout of docs/adding_an_algorithm.md.
    """
    module = importlib.import_module(f"{algorithms.__name__}.{name}")
    public = [getattr(module, name) for name in module.__all__]
    (cls,) = (value for value in public if isinstance(value, type))
    (factory,) = (value for value in public if not isinstance(value, type))
    layout = r"[\w-]+: (.+?)\.\n\n(.+?)\n\nSource: (.+?)\n\nDiffers from PyTorch:(.+?)\n\nDiffers from optax:(.+)"
    title, *parts = match(layout, inspect.cleandoc(module.__doc__ or ""), module.__name__)
    return Entry(cls, factory, title[0].upper() + title[1:], *map(link_papers, parts))


def section(entry: Entry) -> str:
    """Everything about one algorithm, in reStructuredText."""
    cls, name = entry.cls, entry.cls.__name__
    summary, arguments, rest = match(r"(.+?)\n\nArgs:\n(.+?)\n\n(.+)", inspect.getdoc(cls) or "", name)
    return f"""
{name}
{"-" * len(name)}

{entry.title}.

{entry.equations}

.. py:class:: optimjax.{name}{signature(cls)}
   :canonical: {cls.__module__}.{name}
   :no-contents-entry:

{indent(summary)}

{indent(argument_table(cls, definitions(arguments)))}

{indent(with_error_fields(rest))}

.. py:function:: optimjax.functional.{entry.factory.__name__}{signature(entry.factory)}
   :no-contents-entry:

   The same as a pure :class:`~optimjax.functional.Algorithm`.

{state_table(entry)}
**Source:** {entry.source}

{in_pytorch(entry)}**Differs from PyTorch:** {entry.differs_from_pytorch}

**Differs from optax:** {entry.differs_from_optax}
"""


def in_pytorch(entry: Entry) -> str:
    """Where PyTorch documents it."""
    if "PyTorch does not have it" in entry.differs_from_pytorch:
        return ""
    name = entry.cls.__name__
    return f"**PyTorch:** `torch.optim.{name} <{PYTORCH.format(name)}>`__\n\n"


# --- Arguments and state --------------------------------------------------------------------------------------------


def argument_table(cls: type[Optimizer], arguments: dict[str, str]) -> str:
    """A table of what the arguments may be; those that change nothing are named after it."""
    parameters = dict(inspect.signature(cls).parameters)
    if undescribed := parameters.keys() - {name for names in arguments for name in names.split(", ")}:
        raise ValueError(f"Args of {cls.__name__} does not describe {', '.join(sorted(undescribed))}")
    rows, ignored = [], []
    for names, text in arguments.items():
        for name in names.split(", "):
            kind, default = cls.definition.hyperparameters.kinds.get(name), parameters[name].default
            if isinstance(kind, Ignored):
                ignored.append(f"``{name}={default!r}``")
            elif name in ("params", "options"):
                rows.append((f"``{name}``", "", "", text))
            else:
                rows.append((f"``{name}``", f"``{default!r}``", legal_values(kind, default), text))
    arguments_table = table(("Argument", "Default", "Values", ""), rows, widths=(20, 20, 15, 45))
    return arguments_table + (f"\nAccepted, without effect: {', '.join(ignored)}.\n" if ignored else "")


def legal_values(kind: Kind | None, default: Any) -> str:
    """What an argument may be, in a few words."""
    if not isinstance(kind, Numeric):
        return "flag" if isinstance(default, bool) else "compiled in"
    if kind.items:
        ranges = [legal_values(item, None) for item in kind.items]
        return " and ".join(ranges) if len(set(ranges)) > 1 else f"{ranges[0]} each"
    low = f"[{kind.minimum:g}" if math.isfinite(kind.minimum) else f"({kind.above:g}"
    high = f"{kind.maximum:g}]" if math.isfinite(kind.maximum) else f"{kind.below:g})"
    interval = f"{low},\N{NO-BREAK SPACE}{high}".replace("inf", "∞")
    return f"{interval} or ``None``" if kind.optional else interval


def state_of(entry: Entry, options: dict[str, Any], sizes: Sequence[int] = MATRIX) -> dict[str, Any]:
    """The shapes and dtypes of what is kept for one float32 array; the step count is kept once for all."""
    state = jax.eval_shape(entry.factory(**options).init, jax.ShapeDtypeStruct(sizes, jnp.float32))
    return {name: array for name, array in state._asdict().items() if name != "step"}


def all_on(entry: Entry) -> dict[str, Any]:
    """Every flag and switch that is off by default."""
    kinds = entry.cls.definition.hyperparameters.kinds
    return {
        name: 1.0 if isinstance(kinds[name], Numeric) else True
        for name, parameter in inspect.signature(entry.factory).parameters.items()
        if name in kinds
        and (
            (isinstance(kinds[name], Structural) and parameter.default is False)
            or getattr(kinds[name], "switch", False)
        )
    }


def memory(entry: Entry) -> list[str]:
    """Bytes of state for each element: with the defaults, and with everything on."""
    states = (state_of(entry, options) for options in ({}, all_on(entry)))
    sizes = (sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) for state in states)
    return [f"{size / math.prod(MATRIX):.3g}" for size in sizes]


def state_table(entry: Entry) -> str:
    """A table of what is kept for a parameter."""
    slots = entry.cls.rule.slots if entry.cls.rule else type(entry.factory().init(jnp.zeros(1)))
    # A comment may begin with the shape, `[m, n] int32, the ...`, which the table has anyway.
    comment = r"^    (\w+): .*?  # (?:\[.*?\](?: \w+)?, )?(.+)$"
    comments = dict(re.findall(comment, inspect.getsource(slots), re.MULTILINE))
    arrays, of = state_of(entry, all_on(entry)), "matrix of shape (m, n)"
    if uncommented := arrays.keys() - comments.keys():
        raise ValueError(f"no comment says what {', '.join(sorted(uncommented))} of {entry.cls.__name__} holds")
    if None in arrays.values():  # what is kept depends on the number of axes
        vectors, of = state_of(entry, all_on(entry), MATRIX[1:]), f"{of} or a vector of shape (n,)"
        arrays = {name: vectors[name] if array is None else array for name, array in arrays.items()}
    rows = [(f"``{name}``", shape(array), str(array.dtype), comments[name]) for name, array in arrays.items()]
    slot_table = table(("", "Shape", "Dtype", ""), rows, widths=(20, 15, 15, 50))
    return f"State for a float32 {of}:\n\n{slot_table}" if rows else "Nothing is kept.\n"


def shape(array: Any) -> str:
    """The shape, in letters where it has the sizes of the matrix."""
    return str(tuple(SIZES.get(size, size) for size in array.shape)).replace("'", "")


# --- Text -----------------------------------------------------------------------------------------------------------


def match(layout: str, doc: str, name: str) -> tuple[str, ...]:
    """The parts of a docstring."""
    found = re.fullmatch(layout, doc, re.DOTALL)
    if found is None:
        raise ValueError(f"the docstring of {name} has not the layout that docs/adding_an_algorithm.md shows:\n{doc}")
    return found.groups()


def definitions(text: str) -> dict[str, str]:
    """The entries `name: description` of a section of a docstring."""
    return {
        name: " ".join(description.split())
        for name, description in re.findall(r"^  (\w[\w, ]*): (.+(?:\n   .+)*)", text, re.MULTILINE)
    }


def with_error_fields(text: str) -> str:
    """The text with its section Raises as Sphinx has it."""

    def fields(found: re.Match[str]) -> str:
        return "".join(f":raises {error}: {when}\n" for error, when in definitions(found[1]).items())

    return re.sub(r"^Raises:\n((?:  .+\n)+)", fields, text, flags=re.MULTILINE)


def signature(function: Callable[..., Any]) -> str:
    """The signature without annotations."""
    of = inspect.signature(function)
    parameters = [parameter.replace(annotation=parameter.empty) for parameter in of.parameters.values()]
    return str(of.replace(parameters=parameters, return_annotation=of.empty))


def link_papers(text: str) -> str:
    """An arXiv number becomes a link."""
    return re.sub(r"arXiv:(\d+\.\d+)", r"`arXiv:\1 <https://arxiv.org/abs/\1>`__", text)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], widths: Sequence[int]) -> str:
    """A table, in reStructuredText."""
    lines = [
        ".. list-table::",
        "   :header-rows: 1",
        f"   :widths: {' '.join(map(str, widths))}",
        "   :width: 100%",
        "",
    ]
    for first, *others in (header, *rows):
        lines += [f"   * - {first}", *(f"     - {cell}" for cell in others)]
    return "\n".join(lines) + "\n"


def indent(text: str) -> str:
    """The text as the body of a directive."""
    return "\n".join(f"   {line}" if line else "" for line in text.splitlines())
