"""The container's recipes: linted, and for the package as it is. They are not built here."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "containers" / "Dockerfile").read_text()
APPTAINER = (ROOT / "containers" / "wan-autoregressive.def").read_text()


def test_hadolint_has_nothing_to_say():
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, ROOT / "containers" / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_hadolint_would_say_something(tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN apt-get install curl\n")
    hadolint = Path(sys.executable).parent / "hadolint"
    assert subprocess.run([hadolint, tmp_path / "Dockerfile"], capture_output=True).returncode != 0


@pytest.mark.parametrize("recipe", [DOCKERFILE, APPTAINER], ids=["docker", "apptainer"])
def test_extras_and_python_are_those_of_the_package(recipe):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extras,) = re.findall(r"\[([\w,]+)\]\"", recipe.replace('"/models", "/outputs"', ""))
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()
    versions = {tuple(map(int, found.split("."))) for found in re.findall(r"python:(\d+\.\d+)-", recipe)}
    lowest = tuple(map(int, project["requires-python"].removeprefix(">=").split(".")))
    assert min(versions) >= lowest


def test_what_is_copied_is_there_and_not_ignored():
    ignored = (ROOT / ".dockerignore").read_text().split()
    for source in re.findall(r"^COPY (?!--from)(\S+)", DOCKERFILE, re.MULTILINE):
        assert (ROOT / source).exists()
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"].values()
    assert not {folder.split("/")[0] for folder in folders} & set(ignored)
