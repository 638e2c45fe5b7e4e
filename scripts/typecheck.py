"""mypy, strict, over the import package as it is installed.

The rooms are folders at the top level that install as sub-packages (``quant/`` is
``deploykit.quant``), which mypy cannot know. So the package is built from links in
``build/typecheck``, mypy runs there, and its messages name the files where they really are.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / "build" / "typecheck"
BESIDE = ("scripts/*.py", "examples/**/*.py", "benchmarks/**/*.py")


def package_folders() -> dict[str, str]:
    """Folders in the import package and where they are in the repository, deepest first."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    mapping: dict[str, str] = settings["tool"]["setuptools"]["package-dir"]
    folders = {name.replace(".", "/"): folder for name, folder in mapping.items()}
    return dict(sorted(folders.items(), key=lambda item: -item[0].count("/")))


def build_tree(folders: dict[str, str]) -> None:
    """Links to every room's entries, in the shape of the import package."""
    shutil.rmtree(TREE, ignore_errors=True)
    for inside, folder in folders.items():
        target = TREE / inside
        target.mkdir(parents=True, exist_ok=True)
        for entry in (ROOT / folder).iterdir():
            if entry.suffix in (".py", ".pyi") or (entry / "__init__.py").is_file():
                (target / entry.name).symlink_to(entry)


def files_beside() -> list[str]:
    """Scripts and examples: checked too, though they are not in the package."""
    found = []
    for pattern in BESIDE:
        for path in sorted(ROOT.glob(pattern)):
            relative = path.relative_to(ROOT)
            (TREE / relative).parent.mkdir(parents=True, exist_ok=True)
            (TREE / relative).symlink_to(path)
            found.append(str(relative))
    return found


def real_paths(text: str, folders: dict[str, str]) -> str:
    """mypy's output with the paths of the repository."""
    for inside, folder in folders.items():
        if inside != folder:
            text = re.sub(rf"^{re.escape(inside)}/", f"{folder}/", text, flags=re.MULTILINE)
    return text


def main() -> int:
    folders = package_folders()
    build_tree(folders)
    packages = sorted({inside.split("/")[0] for inside in folders})
    command = [sys.executable, "-m", "mypy", "--strict", "--explicit-package-bases"]
    command += ["--config-file", str(ROOT / "pyproject.toml")]
    command += ["--cache-dir", str(ROOT / ".mypy_cache" / "typecheck")]
    environment = {name: value for name, value in os.environ.items() if name != "MYPYPATH"}
    done = subprocess.run(
        [*command, *packages, *files_beside(), *sys.argv[1:]],
        cwd=TREE,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    sys.stdout.write(real_paths(done.stdout, folders))
    sys.stderr.write(done.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
