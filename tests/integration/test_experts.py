"""Two transformers that share the steps (Wan2.2-A14B), against a video made with two of diffusers' own."""

import json
import shutil
from dataclasses import asdict, dataclass, field, replace

import accelerate
import numpy as np
import pytest
import torch
from accelerate.hooks import CpuOffload
from aligned_weights import align_weights
from diffusers import WanPipeline
from naive_video import CHANNELS, TEXT_DIM, Frame, NaiveTransformer, randn
from safetensors.torch import save_file
from saved_rollouts import assert_same, generator, start, state_of
from wan22_folder import make_a14b_folder

from wan_autoregressive import CausalWanTransformer3DModel, SelfForcingScheduler, WanAutoregressivePipeline
from wan_autoregressive.scripts.benchmark import measure_rollout
from wan_autoregressive.scripts.cli import main
from wan_autoregressive.scripts.costs.build import build_pipeline
from wan_autoregressive.scripts.costs.sizes import ModelSizes
from wan_autoregressive.scripts.costs.workload import make_workload
from wan_autoregressive.scripts.load_pipeline import check_model_folder

BOUND = 1e-4  # float32
STEPS, SHIFT, BOUNDARY = (1000, 850, 700, 350, 125), 12.0, 875.0
CHUNKS = (1, 3, 3)
GUIDANCE = 3.0


def shifted(step: float) -> float:
    return SHIFT * (step / 1000) / (1 + (SHIFT - 1) * step / 1000)


@dataclass
class NaivePair:
    """Every forward runs all frames so far, past ones at t = 0, through one of the two; nothing is kept."""

    experts: list[NaiveTransformer]
    switch: int | None = None
    """First frame of the second prompt; all before it were then rebuilt under that, in sight of each other."""
    finished: list[torch.Tensor] = field(default_factory=list)

    def make(self, noise: torch.Tensor, source: torch.Generator) -> torch.Tensor:
        sigmas = [shifted(step) for step in STEPS]
        bound = min((shifted(step) for step in range(1001)), key=lambda sigma: abs(1000 * sigma - BOUNDARY))
        for size in CHUNKS:
            done = len(self.finished)
            x = noise[:, :, done : done + size]
            for sigma, following in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
                flow = self._guided(x, 1000 * sigma)
                fresh = torch.randn(x.shape, generator=source) if self._draws(sigma, following) else None
                if 1000 * sigma < BOUNDARY:
                    x = x - sigma * flow
                    x = x if fresh is None else (1 - following) * x + following * fresh
                else:
                    x = x - (sigma - bound) * flow
                    if fresh is not None:
                        a = (1 - following) / (1 - bound)
                        x = a * x + (following**2 - (a * bound) ** 2) ** 0.5 * fresh
            self.finished += x.split(1, dim=2)
        return torch.cat(self.finished, dim=2)

    @staticmethod
    def _draws(sigma: float, following: float) -> bool:
        is_handed_over = 1000 * sigma >= BOUNDARY > 1000 * following
        return following > 0 and not is_handed_over

    def _guided(self, x: torch.Tensor, timestep: float) -> torch.Tensor:
        done, size = len(self.finished), x.shape[2]
        expert = self.experts[0 if timestep >= BOUNDARY else 1]
        switched = self.switch is not None and done >= self.switch

        def flow(prompt: int, rebuilt: int) -> torch.Tensor:
            frames = []
            for number, latents in enumerate(self.finished):
                end = max(rebuilt, 1 if number < 1 else 4 if number < 4 else 7)
                frames.append(Frame(latents, 0.0, number, {other: other for other in range(end)}, prompt))
            sees = {other: other for other in range(done + size)}
            for number, latents in enumerate(x.split(1, dim=2), start=done):
                frames.append(Frame(latents, timestep, number, sees, prompt))
            return expert.flow(frames)[:, :, done:].double()

        wanted, negative = flow(1 if switched else 0, (self.switch or 0) if switched else 0), flow(2, 0)
        return (negative + GUIDANCE * (wanted - negative)).float()


def naive_experts(*prompts: torch.Tensor) -> list[NaiveTransformer]:
    return [NaiveTransformer(prompts=list(prompts), seed=seed) for seed in (0, 1)]


@pytest.mark.parametrize("switch", [None, 1, 4])
def test_a_pair_makes_the_video_of_recomputed_prefixes(switch):
    prompts = [randn(2, 6, TEXT_DIM, seed=seed) for seed in (1, 2, 3)]
    experts = naive_experts(*prompts)
    noise = randn(2, CHANNELS, sum(CHUNKS), 4, 4, seed=4)
    expected = NaivePair(experts, switch).make(noise, generator(5))

    pipe = WanAutoregressivePipeline(
        *(None, None, experts[0].causal, None, SelfForcingScheduler(denoising_steps=STEPS, shift=SHIFT)),
        **{"transformer_2": experts[1].causal, "boundary_ratio": 0.875},
    )
    rollout = pipe.rollout(
        prompt_embeds=prompts[0],
        negative_prompt_embeds=prompts[2],
        guidance_scale=GUIDANCE,
        latents=noise,
        generator=generator(5),
        first_chunk_frames=1,
        output_type="latent",
        prompt_schedule=None if switch is None else {switch: prompts[1]},
    )
    made = torch.cat([chunk.latents for chunk in rollout], dim=2)
    torch.testing.assert_close(made, expected, rtol=0, atol=BOUND)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_a14b_folder(tmp_path_factory.mktemp("a14b") / "a14b")


def loaded(folder) -> WanAutoregressivePipeline:
    pipe = WanAutoregressivePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pair(folder) -> WanAutoregressivePipeline:
    return loaded(folder)


def options(seed: int = 0) -> dict:
    return {
        "num_inference_steps": 4,  # with shift 12 at t = 1000, 973, 923, 800
        "first_chunk_frames": 1,
        "window_frames": 6,
        "sink_frames": 1,
        "guidance_scale": 2.0,
        "prompt_schedule": {4: "rain"},
        "generator": generator(seed),
    }


def test_resumed_and_forked_at_any_boundary_equal_uninterrupted(pair, tmp_path):
    expected = list(start(pair, **options()))
    rollout = start(pair, **options())
    for done in range(1, len(expected)):
        rollout.step()
        rollout.save(tmp_path / "state")
        resumed, twin = pair.resume(tmp_path / "state"), rollout.fork()
        assert state_of(resumed) == state_of(rollout)
        assert_same(list(resumed), expected[done:])
        assert_same(list(twin), expected[done:])


def test_interleaved_equals_alone(pair):
    alone = [list(start(pair, **options(seed), prompt=prompt)) for seed, prompt in enumerate(("one", "two"))]
    rollouts = [start(pair, **options(seed), prompt=prompt) for seed, prompt in enumerate(("one", "two"))]
    together = [[rollout.step() for rollout in rollouts] for _ in alone[0]]
    for made, expected in zip(zip(*together, strict=True), alone, strict=True):
        assert_same(made, expected)


def test_from_a_given_frame_as_from_a_generated_one(pair):
    """The given frame is in both caches, as a generated one is after its context pass."""
    settings = {**options(), "prompt_schedule": None, "generator": None, "num_frames": 25}
    noise = randn(1, CHANNELS, 7, 4, 4)
    fixed = {"solver": "unipc", "output_type": "latent"}  # no noise between steps
    first, *others = start(pair, **settings, **fixed, latents=noise)
    given = start(pair, **settings, **fixed, latents=noise[:, :, 1:], video_latents=first.latents)
    for chunk, expected in zip(list(given)[1:], others, strict=True):
        assert torch.equal(chunk.latents, expected.latents)


def test_an_estimate_counts_both(pair, monkeypatch):
    calls = []
    forward = CausalWanTransformer3DModel.forward
    monkeypatch.setattr(
        CausalWanTransformer3DModel, "forward", lambda self, *a, **k: calls.append(self) or forward(self, *a, **k)
    )
    settings = {name: value for name, value in options().items() if name not in ("prompt_schedule", "generator")}
    rollout = start(pair, **settings)
    list(rollout)
    estimate = pair.estimate(height=32, width=32, num_frames=49, **settings)
    assert estimate.forwards == len(calls)
    assert {id(model) for model in calls} == {id(pair.transformer), id(pair.transformer_2)}
    assert estimate.kv_cache_bytes == rollout.denoiser.kv_cache_bytes
    assert estimate.text_kv_bytes == rollout.denoiser.text_kv_bytes


# Folders.


def frames_of(pipe) -> np.ndarray:
    arguments = {"prompt": "a red circle", "height": 32, "width": 32, "num_frames": 25, "first_chunk_frames": 1}
    return pipe(**arguments, num_inference_steps=4, generator=generator()).frames


def test_a_stock_folder_loads_and_is_saved_as_one(folder, pair, tmp_path):
    assert (pair.config.boundary_ratio, pair.scheduler.config.shift) == (0.875, 12.0)
    assert type(pair.transformer_2) is CausalWanTransformer3DModel
    pair.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == index["transformer_2"] == ["diffusers", "WanTransformer3DModel"]
    assert index["boundary_ratio"] == 0.875
    check_model_folder(tmp_path)
    again = loaded(tmp_path)
    assert np.array_equal(frames_of(again), frames_of(pair))
    stock = WanPipeline.from_pretrained(tmp_path)
    assert stock.config.boundary_ratio == 0.875
    for name, parameter in stock.transformer_2.state_dict().items():
        assert torch.equal(parameter, pair.transformer_2.state_dict()[name])
    assert np.array_equal(
        frames_of(WanAutoregressivePipeline.from_pipe(WanPipeline.from_pretrained(folder))), frames_of(pair)
    )


@pytest.mark.parametrize("offload", ["model", "sequential", "group"])
def test_offload_gives_the_same_frames(folder, offload):
    expected = frames_of(align_weights(loaded(folder)))
    hooked, cpu = align_weights(loaded(folder)), torch.device("cpu")
    if offload == "model":
        hooked.enable_model_cpu_offload(device="cpu")
    for name in ("transformer", "transformer_2", "vae"):
        if offload == "sequential":
            accelerate.cpu_offload(getattr(hooked, name), cpu, offload_buffers=True)
        elif offload == "group":
            getattr(hooked, name).enable_group_offload(onload_device=cpu, offload_type="leaf_level")
    assert np.array_equal(frames_of(hooked), expected)


def test_model_offload_has_one_expert_on_the_device_and_swaps_twice_per_chunk(folder, monkeypatch):
    pipe, there, loads = loaded(folder), set(), []
    pipe.enable_model_cpu_offload(device="cpu")
    names = {id(pipe.transformer): "high", id(pipe.transformer_2): "low"}
    enter, leave = CpuOffload.pre_forward, CpuOffload.init_hook

    def pre_forward(hook, module, *args, **kwargs):
        result = enter(hook, module, *args, **kwargs)
        if (name := names.get(id(module))) and name not in there:
            there.add(name)
            loads.append(name)
            assert there == {name}
        return result

    def init_hook(hook, module):
        there.discard(names.get(id(module)))
        return leave(hook, module)

    monkeypatch.setattr(CpuOffload, "pre_forward", pre_forward)
    monkeypatch.setattr(CpuOffload, "init_hook", init_hook)
    frames_of(pipe)
    assert loads == ["high", "low"] * 3


# Refusals.


def test_decoding_alongside_an_offloaded_expert_is_refused(folder):
    pipe = loaded(folder)
    pipe.transformer_2.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(ValueError, match="but the transformer_2 is offloaded"):
        pipe.stream("x", decode_alongside=True, height=32, width=32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"denoising_steps": (1000, 850)}, r"t = 1000, 985\.507; two transformers share them at 875"),
        ({"denoising_steps": (300, 100)}, "two transformers share them at 875 and each needs at least one"),
        ({"first_chunk_steps": (1000,)}, "each needs at least one"),
        ({"sampler": "rolling"}, "sampler 'rolling' does not take a chunk through its steps by itself"),
        ({"sampler": "recompute", "window_frames": 6, "switch_policy": "blend"}, "use 'chunkwise'"),
        ({"clean_pass": False}, "leave the context pass on"),
    ],
)
def test_settings_that_a_pair_cannot_take(pair, settings, message):
    for make in (lambda **own: pair.rollout("x", **own), pair.estimate):
        with pytest.raises(ValueError, match=message):
            make(height=32, width=32, num_frames=25, **settings)


def test_a_change_that_a_pair_cannot_take(pair):
    rollout = start(pair, num_inference_steps=4)
    for settings in ({"clean_pass": False}, {"denoising_steps": (1000,)}):
        with pytest.raises(ValueError, match="two transformers"):
            rollout.change(**settings)


def test_models_that_are_no_pair(pair, tiny_checkpoint):
    parts = {"tokenizer": None, "text_encoder": None, "vae": None, "scheduler": SelfForcingScheduler()}
    first = pair.transformer
    smaller = CausalWanTransformer3DModel.from_config({**first.config, "num_layers": 1})
    for pieces, message in (
        ({"boundary_ratio": 0.875}, "boundary_ratio is 0.875, but there is no transformer_2"),
        ({"transformer_2": first}, "boundary_ratio is None; with a transformer_2"),
        ({"transformer_2": first, "boundary_ratio": 1.0}, r"boundary_ratio is 1\.0; with a transformer_2"),
        ({"transformer_2": smaller, "boundary_ratio": 0.875}, "must have the same num_layers, got 2 and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            WanAutoregressivePipeline(transformer=first, **parts, **pieces)


def test_folders_that_are_no_pair(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    index = json.loads((copy / "model_index.json").read_text())
    for changes, message in (
        ({"transformer": [None, None]}, "holds a transformer_2 and no transformer"),
        ({"transformer_2": [None, None]}, "no transformer_2 for the steps below"),
        ({"boundary_ratio": None}, "boundary_ratio is None"),
    ):
        (copy / "model_index.json").write_text(json.dumps({**index, **changes}))
        with pytest.raises(ValueError, match=message):
            WanAutoregressivePipeline.from_pretrained(copy)
    (copy / "model_index.json").write_text(json.dumps(index))
    sizes = ModelSizes.of_folder(copy)
    assert (sizes.experts, sizes.layers) == (2, 2)
    config = json.loads((copy / "transformer_2" / "config.json").read_text())
    (copy / "transformer_2" / "config.json").write_text(json.dumps({**config, "num_layers": 1}))
    with pytest.raises(ValueError, match="have other sizes each"):
        ModelSizes.of_folder(copy)
    shutil.rmtree(copy / "transformer_2")
    with pytest.raises(ValueError, match="two transformers, and there is no transformer_2 in it"):
        ModelSizes.of_folder(copy)
    with pytest.raises(ValueError, match="there is no folder 'transformer_2' in it"):
        check_model_folder(copy)


def test_states_of_one_transformer_and_of_two_do_not_mix(pair, pipe, tmp_path):
    start(pair, num_inference_steps=4).save(tmp_path / "two")
    start(pipe).save(tmp_path / "one")
    with pytest.raises(ValueError, match="needs a transformer_2; this pipeline has none"):
        pipe.resume(tmp_path / "two")
    with pytest.raises(ValueError, match="is of one transformer; this pipeline has a transformer_2 too"):
        pair.resume(tmp_path / "one")


@pytest.mark.slow
def test_converted_from_two_files(folder, tmp_path):
    """In the original names, as training scripts save them."""
    weights = {}
    for name in ("transformer", "transformer_2"):
        pipe = WanPipeline.from_pretrained(folder)
        weights[name] = tmp_path / f"{name}.safetensors"
        save_file({f"model.{key}": value for key, value in getattr(pipe, name).state_dict().items()}, weights[name])
    words = ["--second", str(weights["transformer_2"]), "--steps", "1000,900,300"]
    words += ["--base", str(folder), "--output", str(tmp_path / "out"), "--shift", "12"]
    assert main(["convert", str(weights["transformer"]), *words]) == 0
    check_model_folder(tmp_path / "out")
    made, expected = loaded(tmp_path / "out"), loaded(folder)
    assert made.config.boundary_ratio == 0.875
    for name in weights:
        for key, value in getattr(expected, name).state_dict().items():
            assert torch.equal(getattr(made, name).state_dict()[key], value)
    assert WanPipeline.from_pretrained(tmp_path / "out").transformer_2 is not None
    assert np.array_equal(frames_of(made), frames_of(expected))


@pytest.mark.slow
def test_the_benchmark_measures_both(capsys):
    sizes = replace(ModelSizes.of_preset("demo"), experts=2)
    workload = make_workload(sizes, layers=1, chunks=3, steps=4, window_frames=6)
    pipe = build_pipeline(workload)
    measure = measure_rollout(pipe, workload)
    both = [p.nbytes for model in (pipe.transformer, pipe.transformer_2, pipe.vae) for p in model.parameters()]
    assert measure.weights_bytes == sum(both)
    assert measure.kv_cache_bytes == pipe.estimate(**asdict(workload.rollout)).kv_cache_bytes
    assert len(measure.chunks) == 3
