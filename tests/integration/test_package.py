"""The wheel: built, installed in a clean environment, and its command run outside the repository."""

import os
import subprocess
import sys
import venv
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
def installed(tmp_path_factory) -> Path:
    """A new virtual environment that holds the wheel; its dependencies come from the present environment."""
    folder = tmp_path_factory.mktemp("package")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, ROOT, cwd=folder)
    (wheel,) = folder.glob("*.whl")
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
    run(command, "tiny-checkpoint", "tiny", cwd=outside)
    output = run(
        command,
        *("generate", "--model", "tiny", "--prompt", "a red circle", "--output", "video.mp4", "--config", "longlive"),
        *("--height", "32", "--width", "32", "--num-frames", "9", "--seed", "0"),
        cwd=outside,
    )
    assert "9 frames of 32x32" in output
    assert (outside / "video.mp4").stat().st_size > 0
    assert (outside / "video.json").exists()


def test_the_wheel_holds_every_package(installed):
    listed = run(
        installed / "env" / "bin" / "python",
        "-c",
        "import pkgutil, wan_autoregressive as w\n"
        "print(w.__file__)\n"
        "for module in pkgutil.walk_packages(w.__path__, 'wan_autoregressive.'):\n"
        "    __import__(module.name)\n"
        "    print(module.name)",
        cwd=installed,
    ).split()
    assert Path(listed[0]).is_relative_to(installed)
    ours = [path for path in subprocess.check_output(["git", "ls-files", "*.py"], cwd=ROOT, text=True).split()]
    expected = set()
    for path in map(Path, ours):
        if path.parts[0] in ("tests",) or path.name == "__init__.py":
            continue
        parts = path.with_suffix("").parts
        expected.add(".".join(("wan_autoregressive", *(parts[1:] if parts[0] == "core" else parts))))
    assert expected <= set(listed)


def test_tests_import_the_package_and_never_its_folders(pytestconfig):
    """`import cache` from the root would make second copies of our classes, which isinstance does not know."""
    assert pytestconfig.getoption("importmode") == "importlib"
    folders = {"cache", "configs", "core", "media", "models", "pipelines", "schedulers", "scripts"}
    assert not folders & set(sys.modules)
