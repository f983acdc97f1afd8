"""Imports inside the package go downwards only, and in no circle."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "wan_autoregressive"
FOLDERS = [
    *("cache", "client", "configs", "integrations", "media", "models", "pipelines", "schedulers", "scripts", "server")
]

# From the ground up; what stands in one tuple does not import each other.
LAYERS = [
    ("configs",),
    ("cache", "schedulers", "media"),
    ("models",),
    ("pipelines",),
    ("server",),
    ("client",),
    ("scripts",),
    ("integrations",),
]
PIPELINE_LAYERS = [
    *(("ranks",), ("components",), ("denoiser",), ("samplers",), ("switching",), ("rollout",)),
    *(("parallel_rollout",), ("session",), ("pipeline_wan_autoregressive",), ("parallel_pipeline",)),
]

EDGES = """
import grimp
graph = grimp.build_graph("wan_autoregressive", cache_dir=None, exclude_type_checking_imports=True)
for importer in graph.modules:
    print(importer, *graph.find_modules_directly_imported_by(importer))
"""


@pytest.fixture(scope="module")
def imports(tmp_path_factory) -> dict[str, set[str]]:
    """What every module of the package imports of it. The import finder of the library wants one folder."""
    folder = tmp_path_factory.mktemp("tree")
    ignore = shutil.ignore_patterns("demo_checkpoint", "__pycache__")
    shutil.copytree(ROOT / "core", folder / PACKAGE, ignore=ignore)
    for name in FOLDERS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / PACKAGE / name, ignore=ignore)
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    found = subprocess.run([sys.executable, "-c", EDGES], env=environment, capture_output=True, text=True, check=True)
    edges = {line.split()[0]: set(line.split()[1:]) for line in found.stdout.splitlines()}
    assert f"{PACKAGE}.pipelines.rollout" in edges[f"{PACKAGE}.pipelines.session"]
    return edges


def upward(imports: dict[str, set[str]], layers: list[tuple[str, ...]], depth: int) -> list[str]:
    """Imports that go up, or sideways between two that share a layer; `depth` is which part of a name is looked at."""

    def place(module: str) -> tuple[int, str] | None:
        part = (module.split(".") + [""] * depth)[depth]
        return next(((number, part) for number, layer in enumerate(layers) if part in layer), None)

    wrong = []
    for importer, imported in imports.items():
        for module in imported:
            above, below = place(importer), place(module)
            if above is not None and below is not None and above[1] != below[1] and below[0] >= above[0]:
                wrong.append(f"{importer} imports {module}")
    return sorted(wrong)


def test_folders_import_downwards(imports):
    assert upward(imports, LAYERS, depth=1) == []


def test_pipelines_import_downwards(imports):
    inside = {
        importer: {module for module in imported if module.startswith(f"{PACKAGE}.pipelines.")}
        for importer, imported in imports.items()
        if importer.startswith(f"{PACKAGE}.pipelines.")
    }
    assert upward(inside, PIPELINE_LAYERS, depth=2) == []


def test_no_circles(imports):
    """Packages count by what their `__init__` imports, and their modules do not import them."""
    left = {importer: set(imported) for importer, imported in imports.items()}
    while ends := {module for module, imported in left.items() if not imported}:
        left = {module: imported - ends for module, imported in left.items() if module not in ends}
    assert left == {}


def test_an_upward_import_would_be_found(imports):
    wrong = {**imports, f"{PACKAGE}.cache.kv_cache": {f"{PACKAGE}.pipelines.rollout"}}
    assert len(upward(wrong, LAYERS, depth=1)) == 1
