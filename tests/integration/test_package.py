"""Wheel and sdist: what they hold, installed in a clean environment, and the command run outside the repository."""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from wan_autoregressive import __version__

ROOT = Path(__file__).parents[2]
OFFLINE = ("--no-deps", "--no-index", "--no-build-isolation")


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
def sdist(tmp_path_factory) -> Path:
    """Built from a copy: setuptools would take over what an earlier build left in `build/`. No network is asked."""
    folder = tmp_path_factory.mktemp("sdist")
    for path in repository_files():
        (folder / "source" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / "source" / path)
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, folder / "source", cwd=folder)
    (path,) = folder.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(sdist) -> Path:
    """Built from the sdist, so that what it holds is what can be built from that."""
    run(sys.executable, "-m", "pip", "wheel", *OFFLINE, "--wheel-dir", sdist.parent, sdist, cwd=sdist.parent)
    (path,) = sdist.parent.glob("*.whl")
    return path


def repository_files() -> list[Path]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.check_output(command, cwd=ROOT, text=True).splitlines()
    return [Path(name) for name in listed if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    return new_environment(tmp_path_factory.mktemp("package"), wheel)


def new_environment(folder: Path, distribution: Path) -> Path:
    """A virtual environment that holds the distribution; its dependencies come from the present environment."""
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    purelib = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    dependencies = next(path for path in sys.path if path.endswith("site-packages"))
    # Not a .pth of the present environment's own: its editable install of this package must stay invisible.
    Path(purelib, "dependencies.pth").write_text(dependencies + "\n")
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        *OFFLINE,
        "--ignore-installed",
        distribution,
        cwd=folder,
    )
    return folder


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_sdist_holds_the_package_and_what_says_what_it_is(sdist):
    """No tests, recordings, benchmarks, examples or tools."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {folder.split("/")[0] for folder in settings["package-dir"].values()} | {"docs"}
    files = {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "README.md", "SECURITY.md"}
    files |= {"constraints.txt", "pyproject.toml"}
    expected = {str(path) for path in repository_files() if path.parts[0] in folders or str(path) in files}
    with tarfile.open(sdist) as archive:
        names = [Path(*Path(member.name).parts[1:]) for member in archive.getmembers() if member.isfile()]
    held = {str(name) for name in names if not name.parts[0].endswith(".egg-info")}
    assert held - {"PKG-INFO", "setup.cfg"} == expected


@pytest.mark.slow
def test_an_index_would_take_both(sdist, wheel):
    assert run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel, cwd=sdist.parent).count("PASSED") == 2


@pytest.mark.slow
def test_the_sdist_installs_without_network(sdist, tmp_path):
    folder = new_environment(tmp_path, sdist)
    version = run(folder / "env" / "bin" / "wan-ar", "--version", cwd=folder)
    assert version.split() == ["wan-ar", sdist.name.removesuffix(".tar.gz").split("-")[-1]]


def test_one_version():
    version = f"version: {__version__}\n"
    assert version in (ROOT / "CITATION.cff").read_text()
    assert f"## {__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.slow
def test_every_module_of_the_wheel_can_be_imported_without_ray(installed):
    listed = run(
        installed / "env" / "bin" / "python",
        "-c",
        "import sys; sys.modules['ray'] = None\n"  # any import of it fails
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
