"""`wan-ar pull` from a small Hub on the loopback, and the models that it got."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled
from small_hub import SmallHub
from tiny_checkpoint import make_tiny_checkpoint
from wan22_folder import make_a14b_folder

from wan_autoregressive import checkpoint_folder
from wan_autoregressive.configs.checkpoints import CACHE_VARIABLE
from wan_autoregressive.schedulers import SelfForcingScheduler
from wan_autoregressive.scripts import cli, convert, hub_files, pull
from wan_autoregressive.scripts.load_pipeline import check_model_folder

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "weights" / "tiny_self_forcing.pt"
BASE = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
SELF_FORCING = "checkpoints/self_forcing_dmd.pt"
TEXT_ENCODER = "text_encoder/model.safetensors"
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wan folder whose transformer config is that of the recorded checkpoint, without transformer weights."""
    folder = make_tiny_checkpoint(tmp_path_factory.mktemp("base") / "wan", seed=5)
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text()) | {"ffn_dim": 192, "num_layers": 3}
    shutil.rmtree(folder / "transformer")
    path.parent.mkdir()
    path.write_text(json.dumps(config))
    return folder


@pytest.fixture
def hub(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallHub]:
    """The Hub that huggingface_hub talks to, with Self-Forcing and its Wan model; caches are in `tmp_path`."""
    with SmallHub() as hub:
        hub.add("gdhe17/Self-Forcing", {SELF_FORCING: GOLDEN.read_bytes(), "README.md": b"nobody asks for it"})
        hub.add_folder(BASE, base)
        point_to(hub.url, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what came before a break is kept from then on
        monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "pulled"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        huggingface_hub.close_session()
        yield hub
    huggingface_hub.close_session()


def point_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `HF_ENDPOINT` does when huggingface_hub is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def published(entry: str) -> Weights:
    """The recorded weights in diffusers names, by diffusers' own converter."""
    weights = torch.load(GOLDEN, weights_only=True)[entry]
    return convert_wan_transformer_to_diffusers({k.removeprefix("model."): v for k, v in weights.items()})


def stored(folder: Path) -> Weights:
    return WanTransformer3DModel.from_pretrained(folder, subfolder="transformer").state_dict()


def refused(capsys: pytest.CaptureFixture[str], code: int, message: str, *words: str) -> None:
    """The command ends with one line and leaves nothing but whole downloads."""
    assert cli.main(["pull", *words]) == code
    err = capsys.readouterr().err
    assert err.startswith("wan-ar: error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not Path(os.environ[CACHE_VARIABLE]).exists()
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.incomplete"))


def test_a_pulled_checkpoint_renders_under_its_name(hub: SmallHub, base: Path, tmp_path: Path, capsys) -> None:
    with pytest.raises(ValueError, match=r"`wan-ar pull self-forcing`: about 28\.9 GB, .*non-commercial"):
        checkpoint_folder("self-forcing")
    assert cli.main(["pull", "self-forcing"]) == 0
    out = capsys.readouterr().out
    assert "Licence: CC-BY-NC-SA-4.0 (non-commercial); of the Wan model: Apache-2.0" in out

    folder = checkpoint_folder("self-forcing")
    assert folder == tmp_path / "pulled" / "self-forcing"
    assert [path.name for path in folder.parent.iterdir()] == ["self-forcing"]
    weights, expected = stored(folder), published("generator_ema")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())
    assert (folder / TEXT_ENCODER).read_bytes() == (base / TEXT_ENCODER).read_bytes()
    assert hub.downloads("README.md") == []

    video = tmp_path / "x.mp4"
    words = ["--prompt", "a red fox", "--height", "32", "--width", "48", "--num-frames", "9", "--device", "cpu"]
    assert cli.main(["generate", "--model", "self-forcing", "--output", str(video), *words]) == 0
    settings = json.loads((tmp_path / "x.json").read_text())["config"]
    assert settings["denoising_steps"] == [1000, 750, 500, 250]
    assert (settings["chunk_frames"], settings["shift"], settings["warp"]) == (3, 5, True)


def test_what_is_there_is_not_downloaded_again(hub: SmallHub, tmp_path: Path, capsys) -> None:
    assert cli.main(["pull", "self-forcing"]) == 0
    hub.requests.clear()
    assert cli.main(["pull", "self-forcing"]) == 0
    assert "holds a checkpoint already" in capsys.readouterr().out
    assert hub.requests == []

    hub.add("zhuhz22/Causal-Forcing", {"causal-forcing++/framewise-2step.pt": GOLDEN.read_bytes()})
    assert cli.main(["pull", "causal-forcing-2step", "--to", str(tmp_path / "mine")]) == 0
    assert hub.downloads("causal-forcing++/framewise-2step.pt") == [""]
    assert hub.downloads(TEXT_ENCODER) == []
    scheduler = SelfForcingScheduler.from_pretrained(tmp_path / "mine", subfolder="scheduler")
    assert list(scheduler.config.denoising_steps) == [1000, 500]


def test_a_lora_is_merged(hub: SmallHub, tmp_path: Path) -> None:
    down, up = torch.randn(4, 80), torch.randn(80, 4)
    prefix = "base_model.model.blocks.1.self_attn.q"
    lora = {f"{prefix}.lora_A.default.weight": down, f"{prefix}.lora_B.default.weight": up}
    saved = io.BytesIO()
    torch.save({"generator_lora": lora, "critic_lora": {"a": torch.zeros(1)}}, saved)
    files = {"models/longlive_base.pt": GOLDEN.read_bytes(), "models/lora.pt": saved.getvalue()}
    hub.add("Efficient-Large-Model/LongLive-1.3B", files)
    assert cli.main(["pull", "longlive"]) == 0
    weights = stored(checkpoint_folder("longlive"))
    expected = published("generator")
    expected["blocks.1.attn1.to_q.weight"] = expected["blocks.1.attn1.to_q.weight"] + up @ down
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_a_pair(hub: SmallHub, tmp_path: Path) -> None:
    pair = make_a14b_folder(tmp_path / "pair")
    hub.add_folder("Wan-AI/Wan2.2-T2V-A14B-Diffusers", pair)
    names = [f"{name}/diffusion_pytorch_model.safetensors" for name in ("transformer", "transformer_2")]
    hub.add("FastVideo/CausalWan2.2-I2V-A14B-Preview-Diffusers", {name: (pair / name).read_bytes() for name in names})
    assert cli.main(["pull", "causalwan-a14b"]) == 0
    folder = checkpoint_folder("causalwan-a14b")
    check_model_folder(folder)
    for name in ("transformer", "transformer_2"):
        stored, expected = (
            WanTransformer3DModel.from_pretrained(f, subfolder=name).state_dict() for f in (folder, pair)
        )
        assert all(torch.equal(tensor, expected[key]) for key, tensor in stored.items())


def test_a_broken_connection_is_resumed(hub: SmallHub) -> None:
    hub.breaks_at[SELF_FORCING] = [250_500, 100_700]
    assert cli.main(["pull", "self-forcing"]) == 0
    assert hub.downloads(SELF_FORCING) == ["", "bytes=250000-", "bytes=350000-"]
    weights, expected = stored(checkpoint_folder("self-forcing")), published("generator_ema")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())


def test_a_connection_that_stays_broken(hub: SmallHub, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(huggingface_hub.file_download, "time", SimpleNamespace(sleep=lambda seconds: None))
    hub.breaks_at[SELF_FORCING] = [0] * 100
    refused(capsys, 1, f"cannot get 'gdhe17/Self-Forcing/{SELF_FORCING}'", "self-forcing")
    hub.breaks_at.clear()
    assert cli.main(["pull", "self-forcing"]) == 0


def test_a_stop_in_the_middle(hub: SmallHub, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.file_download, "http_get", stop)
        refused(capsys, 130, "interrupted", "self-forcing")
    with monkeypatch.context() as patch:
        patch.setattr(convert.shutil, "copytree", stop)
        refused(capsys, 130, "interrupted", "self-forcing")
    hub.requests.clear()
    assert cli.main(["pull", "self-forcing"]) == 0
    assert hub.downloads(SELF_FORCING) == []  # what was whole is kept


@pytest.mark.parametrize("path", [SELF_FORCING, "model_index.json"])  # a large file, and one with a git hash
def test_a_wrong_hash(path: str, hub: SmallHub, capsys) -> None:
    hub.damaged.add(path)
    refused(capsys, 1, f"'{path}' of '", "self-forcing")
    hub.damaged.clear()
    assert cli.main(["pull", "self-forcing"]) == 0  # the damaged file was not kept
    assert hub.downloads(path) == ["", ""]


def test_what_the_hub_does_not_have_or_give(hub: SmallHub, capsys) -> None:
    refused(capsys, 1, "no repository for 'tianweiy/CausVid'", "causvid")
    hub.add("tianweiy/CausVid", {"another.pt": b"x"})
    refused(capsys, 1, "'tianweiy/CausVid' has no file 'autoregressive_checkpoint/model.pt' any more", "causvid")
    hub.add("tianweiy/CausVid", {"autoregressive_checkpoint/model.pt": b"no checkpoint"})
    refused(capsys, 2, "is not a torch checkpoint, or is damaged", "causvid")
    hub.refuses["tianweiy/CausVid"] = (403, "GatedRepo")
    refused(capsys, 1, "open only to those who accepted its terms", "causvid")
    hub.refuses["tianweiy/CausVid"] = (500, "")
    refused(capsys, 1, "answered 500 for 'tianweiy/CausVid'", "causvid")


def test_no_network(hub: SmallHub, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    point_to("http://127.0.0.1:9", monkeypatch)  # the port of `discard`, where nothing listens
    refused(capsys, 1, "from http://127.0.0.1:9; check the network", "self-forcing")


def test_no_space(hub: SmallHub, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    of_the_base = sum(len(content) for path, content in hub.repos[BASE].items() if "scheduler" not in path)
    needed = of_the_base + 2 * GOLDEN.stat().st_size  # the checkpoint is downloaded, and written in another form
    monkeypatch.setattr(pull.shutil, "disk_usage", lambda place: SimpleNamespace(free=needed - 1))
    refused(capsys, 2, "not enough space", "self-forcing")
    assert hub.downloads(SELF_FORCING) == []
    monkeypatch.setattr(pull.shutil, "disk_usage", lambda place: SimpleNamespace(free=needed))
    assert cli.main(["pull", "self-forcing"]) == 0


def test_refused_before_anything_is_asked_for(hub: SmallHub, tmp_path: Path, capsys) -> None:
    refused(capsys, 2, "unknown checkpoint 'self-forcin'; did you mean 'self-forcing'?", "self-forcin")
    refused(capsys, 2, "'longlive2-2step' cannot be used yet: it needs weights in NVFP4", "longlive2-2step")
    refused(capsys, 2, "give the name of a checkpoint")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    refused(capsys, 2, "is not empty", "self-forcing", "--to", str(tmp_path / "mine"))
    assert hub.requests == []


def test_a_name_that_was_not_pulled_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "pulled"))
    for name, message in (
        ("self-forcing", "get it with `wan-ar pull self-forcing`: about 28.9 GB, licence CC-BY-NC-SA-4.0"),
        ("self-forcin", "does not exist; did you mean the published checkpoint 'self-forcing'?"),
        ("longlive2-2step", "cannot be used yet"),
    ):
        assert cli.main(["generate", "--model", name, "--prompt", "a", "--output", str(tmp_path / "x.mp4")]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_endpoint_of_the_environment(hub: SmallHub, tmp_path: Path) -> None:
    """In a process of its own, as users run it."""
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-m", "wan_autoregressive.scripts.cli", "pull", "self-forcing"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (checkpoint_folder("self-forcing") / "transformer").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OfflineModeIsEnabled("off"), 1, "is not in the Hub's cache and HF_HUB_OFFLINE is set; unset it"),
        (
            OSError("Consistency check failed: file should be of size 9"),
            1,
            "is not as long as the Hub says; pull again",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied"), 2, "Permission denied"),
    ],
)
def test_what_a_download_ends_with(
    hub: SmallHub, monkeypatch: pytest.MonkeyPatch, capsys, error, code, message
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(hub_files, "hf_hub_download", fail)
        refused(capsys, code, message, "self-forcing")
    assert cli.main(["pull", "self-forcing"]) == 0
