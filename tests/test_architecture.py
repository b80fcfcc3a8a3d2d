"""The floors of the house: who may import whom, checked on the source itself."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("cluster", "runtime", "faulttol", "models", "parallel", "kernels")
BELOW = {
    "cluster": {"runtime", "faulttol", "models", "parallel", "kernels"},
    "runtime": {"faulttol", "models", "parallel", "kernels"},
    "faulttol": {"parallel", "kernels"},
    "models": {"parallel", "kernels"},
    "parallel": {"kernels"},
    "kernels": set(),
}


def files() -> Iterator[Path]:
    for folder in FOLDERS:
        yield from sorted((ROOT / folder).rglob("*.py"))


FILES = list(files())


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def walk(node: ast.AST, *, whole: bool) -> Iterator[ast.AST]:
    """All nodes; with `whole=False` only what runs on import."""
    for child in ast.iter_child_nodes(node):
        if not whole and (
            isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or is_type_checking(child)
        ):
            continue
        yield child
        yield from walk(child, whole=whole)


def imports(path: Path, *, whole: bool = True) -> Iterator[str]:
    """The modules that a file imports; the package's own as dotted names from its root with a leading dot."""
    package = path.relative_to(ROOT).parent.parts
    for node in walk(ast.parse(path.read_text()), whole=whole):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or ""
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            base = [part for part in base if part]
            for alias in node.names:
                parts = [*base, alias.name]
                is_file = (ROOT / Path(*parts)).with_suffix(".py").exists()
                yield "." + ".".join(parts if is_file else base)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_the_ladder(path: Path) -> None:
    """An arrow that points up makes a circle sooner or later; Ray stays in its own room."""
    own = path.relative_to(ROOT).parts[0]
    for name in imports(path):
        if name.startswith("."):
            folder = name.split(".")[1]
            assert folder == own or folder in BELOW[own], f"{own}/ imports {name}"
        else:
            first = name.split(".")[0]
            assert first != "rayfold", f"{name}: imports inside the package are relative"
            assert first != "ray" or own == "cluster", "only cluster/ imports Ray"


def test_no_circle_between_files() -> None:
    """Two files that need each other are one file, or miss a third."""
    graph = {
        "." + ".".join(path.relative_to(ROOT).with_suffix("").parts): {
            name for name in imports(path) if name.startswith(".")
        }
        for path in FILES
        if path.name != "__init__.py"
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_packages_hold_only_a_docstring() -> None:
    """Importing a folder starts nothing and imports nothing."""
    for path in [ROOT / "__init__.py", *(p for p in FILES if p.name == "__init__.py")]:
        body = ast.parse(path.read_text()).body
        assert len(body) <= 1, path
        assert all(isinstance(node, ast.Expr) for node in body), path


def test_kernels_is_a_folder_without_a_door() -> None:
    """Each operator is imported by its file; there is nothing to gather."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_file_is_named_after_its_idea() -> None:
    """A drawer for everything is a drawer where nothing is found."""
    vague = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "managers"}
    names = [*FILES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    assert not [path for path in names if path.stem in vague or path.parent.name in vague]


def test_every_folder_of_the_package_is_installed() -> None:
    """A wheel without a folder works in the checkout and nowhere else."""
    text = (ROOT / "pyproject.toml").read_text()
    for folder in {path.parent.relative_to(ROOT) for path in FILES}:
        assert f'"rayfold.{".".join(folder.parts)}"' in text, folder


@pytest.mark.parametrize("module", ["runtime.config", "runtime.plan", "runtime.resume", "cluster.cli"])
def test_a_wrong_configuration_answers_without_torch_and_ray(module: str) -> None:
    """Their imports take seconds; a typing slip should not."""
    code = (
        f"import rayfold.{module}, sys; print([m for m in ('torch', 'ray', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
