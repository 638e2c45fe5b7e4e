"""The shape of the house: who may import whom, and what the package contains."""

from __future__ import annotations

import ast
import fnmatch
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
LONGEST = 400


def folder_of(package: str) -> Path:
    """Where a package's files are in the repository."""
    mapping = SETUPTOOLS["package-dir"]
    best = max((p for p in mapping if f"{package}.".startswith(f"{p}.")), key=len)
    return ROOT.joinpath(mapping[best], *package[len(best) :].strip(".").split("."))


def modules() -> dict[str, Path]:
    """Every module of the import package and its file."""
    found = {}
    for package in SETUPTOOLS["packages"]:
        for path in sorted(folder_of(package).glob("*.py")):
            name = package if path.stem == "__init__" else f"{package}.{path.stem}"
            found[name] = path
    return found


def imports(path: Path, module: str = "") -> Iterator[str]:
    """Dotted names that a file imports, ``from a import b`` as ``a.b``; at any depth."""
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def within(name: str, *packages: str) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


MODULES = modules()


def offenders(room: str, forbidden: tuple[str, ...]) -> list[str]:
    return [
        f"{module} imports {name}"
        for module, path in MODULES.items()
        if within(module, room)
        for name in imports(path, module)
        if within(name, *forbidden)
    ]


def test_the_reader_of_imports_sees_every_form(tmp_path: Path) -> None:
    path = tmp_path / "m.py"
    path.write_text(
        "import a.b as c\nfrom d import e\ndef f():\n    from ..g import h\n    from . import i\n"
    )
    assert set(imports(path, "x.y.m")) == {"a.b", "d.e", "x.g.h", "x.y.i"}
    assert within("deploykit.quant.plan", "deploykit.quant")
    assert not within("deploykit.quantities", "deploykit.quant")


def test_targets_know_only_errors_and_types() -> None:
    allowed = (
        "deploykit.errors",
        "deploykit.runtimes",
        "deploykit.types",
        "deploykit.targets",
    )
    found = [
        f"{module} imports {name}"
        for module, path in MODULES.items()
        if within(module, "deploykit.targets")
        for name in imports(path, module)
        if within(name, "deploykit") and not within(name, *allowed)
    ]
    # torch runs graphs that deploykit saved: no runtime but ours reads that format
    reader = "deploykit.targets.torch_graph imports deploykit"
    assert set(found) == {
        f"{reader}.export.structure.SavedModel",
        f"{reader}.export.structure.load_model",
        f"{reader}.graph.layer_names.computing_layers",
    }


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [
        ("export", ("deploykit.quant", "deploykit.prune")),
        ("quant", ("deploykit.export", "deploykit.targets", "deploykit.prune")),
        ("prune", ("deploykit.quant", "deploykit.export", "deploykit.targets")),
        ("graph", ("deploykit.quant", "deploykit.prune", "deploykit.export", "deploykit.targets")),
    ],
)
def test_arrows_between_rooms_run_one_way(room: str, forbidden: tuple[str, ...]) -> None:
    assert offenders(f"deploykit.{room}", forbidden) == []


def test_nothing_imports_the_command_line() -> None:
    found = offenders("deploykit", ("deploykit.cli",))
    own = ("deploykit.cli", "deploykit.__main__")
    assert [line for line in found if not within(line.split()[0], *own)] == []


def test_timm_and_torchvision_come_through_compat() -> None:
    """Beside a CPU build of torch they cannot be imported without the repair made there."""
    files = {**MODULES}
    for folder in ("examples", "scripts", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            files[str(path.relative_to(ROOT))] = path
    found = [
        f"{module} imports {name}"
        for module, path in files.items()
        if module != "deploykit._compat"
        for name in imports(path, module)
        if within(name, "timm", "torchvision")
    ]
    assert found == []


def test_every_package_folder_is_packaged() -> None:
    roots = [ROOT / folder for folder in SETUPTOOLS["package-dir"].values()]
    existing = {path.parent for root in roots for path in root.rglob("*.py")}
    listed = {folder_of(package) for package in SETUPTOOLS["packages"]}
    assert existing == listed
    assert all((folder / "__init__.py").is_file() for folder in listed)


def test_every_data_file_is_packaged() -> None:
    """A file beside the code that the wheel lacks only fails at the user's."""
    missing = []
    for package in SETUPTOOLS["packages"]:
        patterns = SETUPTOOLS["package-data"].get(package, [])
        for path in folder_of(package).iterdir():
            if path.is_dir() or path.suffix in (".py", ".pyc") or path.name == "README.md":
                continue
            if not any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns):
                missing.append(str(path.relative_to(ROOT)))
    assert missing == []


def test_no_file_is_longer_than_a_reader_s_patience() -> None:
    folders = ["deploykit", "quant", "prune", "export", "targets"]
    folders += ["scripts", "examples", "benchmarks"]
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_every_room_says_what_lives_there() -> None:
    for folder in ("quant", "prune", "export", "targets", "tests", "benchmarks"):
        assert (ROOT / folder / "README.md").read_text(encoding="utf-8").startswith("# "), folder
    for name, path in MODULES.items():
        if path.stem == "__init__":
            assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), name


def test_every_dependency_has_a_pin_that_fits() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {r.name.lower(): r for r in map(Requirement, (x for x in lines if x[:1] not in "#"))}
    project = PROJECT["project"]
    wanted = [*project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        wanted += extra
    for requirement in map(Requirement, wanted):
        if requirement.name == project["name"]:
            continue
        pin = next(iter(pins[requirement.name.lower()].specifier))
        assert pin.operator == "=="
        assert "+" not in pin.version, "a local version exists on one index only"
        assert requirement.specifier.contains(pin.version), f"{requirement} against {pin}"
