"""Lays the folders of the repository out as the package that they are, for type checkers and editors.

    python tools/typing_links.py    # after `pip install --editable .`; `make` does it by itself

An editable install maps `wan_autoregressive.cache` to `cache/` while Python runs, which no type checker follows. This
makes `build/typing/wan_autoregressive/`, whose entries are links to where the packages are according to
pyproject.toml, so nothing is copied and new files in the folders are seen at once. `pyproject.toml` names the place to
mypy and pyright. Windows gets junctions and hard links, which need no rights that links do.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINKS = ROOT / "build" / "typing"


def main() -> None:
    """Make all links anew."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders: dict[str, str] = pyproject["tool"]["setuptools"]["package-dir"]
    (package,) = (name for name in folders if "." not in name)
    shutil.rmtree(LINKS, ignore_errors=True)
    top = LINKS / package
    top.mkdir(parents=True)
    for path in (ROOT / folders[package]).iterdir():
        if path.is_file():
            link_file(top / path.name, path)
    for name, folder in folders.items():
        _, _, inner = name.partition(".")
        if inner and "." not in inner:  # deeper ones lie in a folder that is linked
            link_folder(top / inner, ROOT / folder)


def link_folder(link: Path, target: Path) -> None:
    """Make `link` a relative symbolic link to a folder; on Windows a junction."""
    if os.name == "nt":
        subprocess.run(["cmd", "/c", "mklink", "/J", str(link), str(target)], check=True, capture_output=True)
    else:
        link.symlink_to(os.path.relpath(target, link.parent), target_is_directory=True)


def link_file(link: Path, target: Path) -> None:
    """Make `link` a relative symbolic link to a file; on Windows a hard link."""
    if os.name == "nt":
        os.link(target, link)
    else:
        link.symlink_to(os.path.relpath(target, link.parent))


if __name__ == "__main__":
    main()
