"""`docs/MEMORY.md` is what the estimate computes, and its recipes run."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from saved_rollouts import start

from tools import memory_page
from wan_autoregressive import CausalWanTransformer3DModel, WanAutoregressivePipeline
from wan_autoregressive.scripts.cli import main
from wan_autoregressive.scripts.run_report import human_bytes

DOCUMENT = memory_page.PAGE.read_text(encoding="utf-8")
RECIPES = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)


@pytest.mark.slow
def test_the_page_is_what_is_computed():
    assert memory_page.page() == DOCUMENT, f"run {Path(sys.executable).name} tools/memory_page.py"


@pytest.mark.slow
def test_the_figures_are_what_the_command_prints(capsys):
    model, settings = "Wan2.2-T2V-A14B, 480x832", "tiny VAE, int8 weights and past"
    made = memory_page.row(model, settings)
    assert f"{made.command}\n" in DOCUMENT
    assert main(made.command.split()[1:]) == 0
    printed = dict(re.findall(r"^(.+?) {2,}(\S.*?) *$", capsys.readouterr().out, re.MULTILINE))
    assert printed["weights: transformer"] == human_bytes(made.weights)
    assert printed["held: K/V of 12 latent frames"] == human_bytes(made.kv_cache)
    most = printed["most at once: all models"], printed["most at once: without text encoder"]
    assert most == tuple(human_bytes(made.most[way]) for way in ("all models on it", "text encoder off it"))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES[:-1], ids=["torchao", "gguf", "float8"])
def test_a_recipe_runs(recipe, tiny_checkpoint, pipe, tmp_path):
    package = {"int8": "torchao", "gguf": "gguf"}.get(next(iter(re.findall("gguf|int8", recipe)), ""))
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if package == "gguf":
        import gguf

        writer = gguf.GGUFWriter(tmp_path / "FILE.gguf", "wan")
        for name, tensor in pipe.transformer.state_dict().items():
            writer.add_tensor(name, tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    names = {"torch": torch, "WanAutoregressivePipeline": WanAutoregressivePipeline}
    names["CausalWanTransformer3DModel"] = CausalWanTransformer3DModel
    for written, here in (("DIR", str(tiny_checkpoint)), ("FILE.gguf", str(tmp_path / "FILE.gguf"))):
        recipe = recipe.replace(f'"{written}"', repr(here))
    exec(recipe.replace("bfloat16", "float32"), names)  # bfloat16 products take minutes on a CPU
    assert start(names["pipe"]).step().frames.shape[1] == 9


def test_what_was_not_run_says_so():
    assert "Not run, for want of a GPU:\n\n```python\n" + RECIPES[-1] in DOCUMENT
    compile(RECIPES[-1], "recipe", "exec")
