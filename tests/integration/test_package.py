"""The wheel: built, installed in a clean environment, and its command run outside the repository."""

import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: setuptools would take over what an earlier build left in `build/`."""
    folder = tmp_path_factory.mktemp("wheel")
    for path in repository_files():
        (folder / "source" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / "source" / path)
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, folder / "source", cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


def repository_files() -> list[Path]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.check_output(command, cwd=ROOT, text=True).splitlines()
    return [Path(name) for name in listed if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A new virtual environment that holds the wheel; its dependencies come from the present environment."""
    folder = tmp_path_factory.mktemp("package")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    purelib = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    dependencies = next(path for path in sys.path if path.endswith("site-packages"))
    # Not a .pth of the present environment's own: its editable install of this package must stay invisible.
    Path(purelib, "dependencies.pth").write_text(dependencies + "\n")
    return folder


def test_the_installed_command_renders_a_video(installed):
    command = installed / "env" / "bin" / "wan-ar"
    outside = installed / "outside"
    outside.mkdir()
    assert "estimate" in run(command, "--help", cwd=outside)
    output = run(
        command,
        *("generate", "--prompt", "a red circle moving right on a navy background", "--output", "video.mp4"),
        *("--num-frames", "21", "--seed", "0"),
        cwd=outside,
    )
    assert "21 frames of 256x256" in output  # every pixel of the demo is shown as 4 x 4
    assert (outside / "video.mp4").stat().st_size > 0
    assert (outside / "video.json").exists()


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    """What git knows of in the folders that pyproject.toml lists; no tests, benchmarks, examples or tools."""
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    places = {folder: name.replace(".", "/") for name, folder in folders.items()}
    expected = set()
    for path in repository_files():
        if path.parts[0] in places:
            expected.add(str(Path(places[path.parts[0]], *path.parts[1:])))
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}
    assert held == expected


def test_every_module_of_the_wheel_can_be_imported(installed):
    listed = run(
        installed / "env" / "bin" / "python",
        "-c",
        "import pkgutil, wan_autoregressive as w\n"
        "print(w.__file__)\n"
        "for module in pkgutil.walk_packages(w.__path__, 'wan_autoregressive.'):\n"
        "    __import__(module.name)",
        cwd=installed,
    ).split()
    assert Path(listed[0]).is_relative_to(installed)


def test_tests_import_the_package_and_never_its_folders(pytestconfig):
    """`import cache` from the root would make second copies of our classes, which isinstance does not know."""
    assert pytestconfig.getoption("importmode") == "importlib"
    folders = {"cache", "client", "configs", "core", "media", "models", "pipelines", "schedulers", "scripts", "server"}
    assert not folders & set(sys.modules)
