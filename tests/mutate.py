"""Does a parity test notice when the communication is wrong? One line at a time is broken to find out.

The list of what can be broken is read from the source: every collective that `parallel/` or the step calls
(it sends nothing, shapes kept), every call of torch.distributed (left out), every product and quotient
(its second factor left out), every addition and copy in place (left out) and every setting of FSDP (left
out). For each, the ranks of a forked process are given the broken module, and parity must turn red: with a
wrong number, an error, or a rank that waits in vain.

    python tests/mutate.py            all of them, with the score
    python tests/mutate.py --sample 4 some of them, the same ones every time
    python tests/mutate.py --list     what would be broken
"""

import argparse
import ast
import importlib.abc
import importlib.util
import multiprocessing
import os
import random
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

# What is not broken is imported once, before forking; each fork imports the rest for itself.
import harness  # noqa: F401

import rayfold.kernels.attention
import rayfold.kernels.cross_entropy
import rayfold.runtime.data.loader  # noqa: F401

ROOT = Path(__file__).parents[1]
SENDING = ("sum_over", "max_over", "gather", "reduce_scatter", "all_to_all", "ring_shift")
# pure planning, which no rank executes between tensors: tested on its own
PLANNING = (
    *("layout.py", "rules.py", "legal.py", "limits.py", "fit.py", "microbatches.py"),
    *("timeline.py", "schedules.py", "folding.py", "random.py", "plan.py", "traffic.py"),
)


@dataclass(frozen=True)
class Site:
    """One thing that can be broken."""

    file: str
    line: int
    column: int
    what: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}"


def sites() -> list[Site]:
    """Everything that can be broken, from the source as it is."""
    files = [path for path in sorted((ROOT / "parallel").glob("*.py")) if path.name not in PLANNING]
    return [site for path in (*files, ROOT / "runtime/step.py") for site in _sites_of(path)]


def _sites_of(path: Path) -> Iterator[Site]:
    name = str(path.relative_to(ROOT))
    for node in ast.walk(ast.parse(path.read_text())):
        if breaks(node, in_step=name == "runtime/step.py"):
            yield Site(name, node.lineno, node.col_offset, ast.unparse(node)[:90])  # type: ignore[attr-defined]


def breaks(node: ast.AST, *, in_step: bool) -> bool:
    """Whether `node` is something to break."""
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Name):
            return node.func.id in SENDING
        return not in_step and isinstance(node.func, ast.Attribute) and _sends_or_sets(node.func)
    if in_step:
        return False
    if isinstance(node, ast.AugAssign):
        return not any(text in ast.unparse(node.value) for text in ("[", "list("))  # those grow a list
    if isinstance(node, ast.BinOp):
        repeats = isinstance(node.left, ast.List | ast.Tuple)
        rounds = "//" in ast.unparse(node)
        return isinstance(node.op, ast.Mult | ast.Div) and not repeats and not rounds
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and _in_place(node.value)


def _in_place(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    return (
        (name.endswith("_") and not name.startswith("_"))
        or name.startswith("_foreach")
        or any(keyword.arg == "out" for keyword in call.keywords)
    )


def _sends_or_sets(function: ast.Attribute) -> bool:
    raw = ast.unparse(function.value) == "dist" and function.attr in (
        *(
            "all_reduce",
            "all_gather_single",
            "reduce_scatter_single",
            "all_to_all_single",
            "all_gather",
            "broadcast",
            "batch_isend_irecv",
        ),
    )
    return raw or function.attr in ("set_gradient_divide_factor", "set_force_sum_reduction_for_comms")


class _Break(ast.NodeTransformer):
    def __init__(self, site: Site) -> None:
        self._site = site

    def visit(self, node: ast.AST) -> Any:
        here = (getattr(node, "lineno", 0), getattr(node, "col_offset", -1))
        in_step = self._site.file == "runtime/step.py"
        there = here == (self._site.line, self._site.column) and breaks(node, in_step=in_step)
        if there and ast.unparse(node)[:90] == self._site.what:
            return self._broken(node)
        return self.generic_visit(node)

    def _broken(self, node: ast.AST) -> ast.AST:
        if isinstance(node, ast.BinOp):
            return node.left
        if isinstance(node, ast.AugAssign | ast.Expr):
            return ast.Pass()
        assert isinstance(node, ast.Call), "nothing else is broken"
        if isinstance(node.func, ast.Name):
            at = 1 if node.func.id in ("sum_over", "max_over", "ring_shift") else len(node.args) - 1
            silent = ast.parse("__import__('dataclasses').replace(0, group=None)", mode="eval").body
            assert isinstance(silent, ast.Call), "just written"
            silent.args = [node.args[at]]
            return ast.Call(node.func, [*node.args[:at], silent, *node.args[at + 1 :]], node.keywords)
        left_out = "[]" if node.func.attr == "batch_isend_irecv" else "None"
        return ast.parse(left_out, mode="eval").body


def broken_source(site: Site) -> str:
    """The source of the file with `site` broken."""
    tree = ast.parse((ROOT / site.file).read_text())
    broken = ast.unparse(ast.fix_missing_locations(_Break(site).visit(tree)))
    assert broken != ast.unparse(ast.parse((ROOT / site.file).read_text())), f"{site} was not found"
    return broken


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Serves one module from other source."""

    def __init__(self, module: str, source: str) -> None:
        self._module = module
        self._source = source

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.util.spec_from_loader(name, self) if name == self._module else None

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self._source, self._module, "exec"), module.__dict__)


def notices(site: Site | None) -> str | None:
    """The first case that turns red with `site` broken; None when nothing notices."""
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_try, args=(site, send))
    process.start()
    send.close()
    try:
        found: str | None = receive.recv()
        return found
    except EOFError:
        raise RuntimeError(f"{site}: nothing could be tried; the reason stands above") from None
    finally:
        process.join()


def _try(site: Site | None, send: Any) -> None:
    warnings.simplefilter("ignore")
    if site is not None:
        module = "rayfold." + site.file.removesuffix(".py").replace("/", ".")
        assert module not in sys.modules, f"{module} was imported before it could be broken"
        sys.meta_path.insert(0, _Finder(module, broken_source(site)))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what is broken complains
    send.send(_first_red())


def _first_red() -> str | None:
    from alike import assert_parity, assert_told, mutation_cases

    try:
        assert_told()
    except Exception as error:
        return f"ranks that tell each other values: {type(error).__name__}"
    for case, layout in mutation_cases():
        try:
            assert_parity(case, layout)
        except Exception as error:
            return f"{layout}: {(str(error).strip() or type(error).__name__).splitlines()[-1][:100]}"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Break everything, tell the score; 1 when something went unnoticed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="only list what would be broken")
    parser.add_argument("--only", default="", help="sites whose description contains this")
    parser.add_argument("--sample", type=int, default=0, help="take this many of them at random, seeded")
    given = parser.parse_args(arguments)
    chosen = [site for site in sites() if given.only in str(site)]
    if given.sample:
        chosen = random.Random(3).sample(chosen, min(given.sample, len(chosen)))
    if not given.list and (red := notices(None)):
        raise SystemExit(f"parity is red with nothing broken: {red}")
    unnoticed = []
    for site in chosen:
        if given.list:
            print(site)
            continue
        started = time.monotonic()
        red = notices(site)
        print(f"{site}\n    {red or 'NOT NOTICED'} ({time.monotonic() - started:.1f} s)", flush=True)
        unnoticed += [] if red else [site]
    if not given.list:
        print(f"{len(chosen) - len(unnoticed)} of {len(chosen)} noticed")
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
