"""Fine-tuning for the rolling sampler: its forwards are the sampler's own, and a short run saves and resumes."""

import json

import pytest
import torch

from examples.train_demo import finetune_rolling, world
from examples.train_demo.rolling_errors import errors_by_frame
from examples.train_demo.rolling_videos import RollingVideos
from examples.train_demo.rolling_window import JointForward, Sight, video_ticks
from examples.train_demo.sampling import generate_latents
from examples.train_demo.text import TEXT_DIM
from examples.train_demo.train_flow import FlowSettings, create_transformer
from wan_autoregressive import WanAutoregressivePipeline, demo_checkpoint
from wan_autoregressive.pipelines.denoiser import Denoiser
from wan_autoregressive.pipelines.noise import NoiseSource

CHUNKS = 10  # the sink gets out of sight of context passes at the eighth
BOUND = 1e-4


class SampledVideo:
    """A video of the rolling sampler, its joint forwards and the noise drawn before each."""

    def __init__(self, transformer, text, sight):
        self.text, self.forwards, self.noise = text, [], []
        predict, draw, drawn = Denoiser.predict, NoiseSource.draw, []

        def predict_and_note(denoiser, latents, window):
            flow = predict(denoiser, latents, window)
            self.forwards.append((latents, window, flow))
            self.noise.append(torch.cat(drawn, dim=2))
            drawn.clear()
            return flow

        def draw_and_note(source, *args, **kwargs):
            drawn.append(draw(source, *args, **kwargs))
            return drawn[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Denoiser, "predict", predict_and_note)
            patch.setattr(NoiseSource, "draw", draw_and_note)
            generator = torch.Generator().manual_seed(1)
            self.latents = generate_latents(transformer, text, CHUNKS, generator, **sight.sampler_settings)

    @torch.no_grad()
    def largest_difference(self, joint):
        """Between the flows of the sampler and those of the training forward."""
        differences = []
        for tick, (noisy, _, flow) in zip(video_ticks(CHUNKS), self.forwards, strict=True):
            own = joint.flow(tick, self.latents[:, :, : tick.start], noisy, self.text)
            differences.append((own - flow).abs().max().item())
        return max(differences)


@pytest.fixture(scope="module")
def transformer():
    model = create_transformer(FlowSettings(heads=2, head_dim=24, ffn_dim=64, layers=2), seed=0).eval()
    with torch.no_grad():  # as drawn, other frames would hardly matter
        for block in model.blocks:
            for layer in (block.attn1.to_v, block.attn1.to_out[0], block.attn1.norm_q):
                layer.weight *= 2
        model.proj_out.weight *= 10
    return model


@pytest.fixture(scope="module")
def text():
    return torch.randn(2, 10, TEXT_DIM, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def sampled(transformer, text):
    return SampledVideo(transformer, text, Sight())


def test_the_training_forward_is_the_samplers_joint_forward(transformer, sampled):
    for tick, (_, window, _) in zip(video_ticks(CHUNKS), sampled.forwards, strict=True):
        assert (window.frames.start, window.frames.stop) == (tick.frames.start, tick.frames.stop)
        assert list(window.timesteps) == (1000 * tick.sigmas).repeat_interleave(3).tolist()
    assert sampled.largest_difference(JointForward(transformer, Sight())) < BOUND
    # So that the bound means something: one finished chunk less in sight.
    assert sampled.largest_difference(JointForward(transformer, Sight(attended_frames=15))) > 100 * BOUND


@pytest.mark.parametrize("sight", [Sight(attended_frames=15), Sight(attended_frames=15, sink_frames=0)])
def test_so_it_is_with_another_sight(transformer, text, sight):
    assert SampledVideo(transformer, text, sight).largest_difference(JointForward(transformer, sight)) < BOUND


@torch.no_grad()
def test_a_video_that_is_all_own_is_the_samplers(transformer, text, sampled):
    """With the sampler's noise, whatever the right clip is."""
    joint, ticks = JointForward(transformer, Sight()), video_ticks(CHUNKS)
    video = RollingVideos.right(ticks[0], torch.full_like(sampled.latents, 7.0), text, sampled.noise[0])
    for number, tick in enumerate(ticks):
        torch.testing.assert_close(video.in_flight, sampled.forwards[number][0], atol=BOUND, rtol=0)
        _, clean = video.loss(tick, joint)
        if number + 1 < len(ticks):
            own = torch.ones(2, len(tick.chunks), dtype=torch.bool)
            video = video.after(tick, ticks[number + 1], clean, own, sampled.noise[number + 1])
    finished = torch.cat([video.finished, clean], dim=2)
    torch.testing.assert_close(finished, sampled.latents, atol=BOUND, rtol=0)


@torch.no_grad()
def test_a_video_in_which_nothing_is_own_is_right(transformer, text):
    generator = torch.Generator().manual_seed(3)
    clips, ticks = torch.randn(2, 16, 15, 8, 8, generator=generator), video_ticks(5)
    noise = [torch.randn(clips[:, :, tick.frames].shape, generator=generator) for tick in ticks]
    video = RollingVideos.right(ticks[0], clips, text, noise[0])
    for number in range(1, len(ticks)):
        before, tick = ticks[number - 1 : number + 1]
        not_own = torch.zeros(2, len(before.chunks), dtype=torch.bool)
        video = video.after(before, tick, torch.zeros_like(video.in_flight), not_own, noise[number])
        right = RollingVideos.right(tick, clips, text, noise[number])
        assert torch.equal(video.finished, right.finished)
        torch.testing.assert_close(video.in_flight, right.in_flight, atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rolling")
    finetune_rolling.main(["--output", str(folder), "--smoke"])
    return folder


def logged(folder):
    return [json.loads(line) for line in (folder / "training" / "train_log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_leaves_its_state_a_picture_and_a_checkpoint_that_rolls(smoke_run):
    assert (smoke_run / "training" / "rolling.pt").is_file()
    assert list((smoke_run / "training").glob("sample_*.png"))
    pipe = WanAutoregressivePipeline.from_pretrained(smoke_run / "checkpoint", dtype=torch.float32)
    trained = torch.load(smoke_run / "training" / "rolling.pt", weights_only=True)["model"]
    torch.testing.assert_close(pipe.transformer.state_dict(), trained, atol=1e-2, rtol=1e-3)  # saved in float16
    frames = pipe(
        world.held_out_scenes()[0].prompt, height=64, width=64, num_frames=9, **Sight().sampler_settings
    ).frames
    assert frames.shape == (1, 9, 64, 64, 3)


@pytest.mark.slow
def test_a_finished_run_resumes_without_training_again(smoke_run):
    before = sum("loss" in line for line in logged(smoke_run))
    finetune_rolling.main(["--output", str(smoke_run), "--smoke"])
    assert sum("loss" in line for line in logged(smoke_run)) == before


@pytest.mark.slow
def test_the_shipped_checkpoint_does_not_know_noisy_neighbours():
    """What the fine-tuning is for: in each frame it makes less of them than of a clean past."""
    errors = errors_by_frame(demo_checkpoint(), 2, Sight())
    assert len(errors["joint"]) == 12
    assert all(joint > 1.2 * alone for joint, alone in zip(errors["joint"], errors["alone"], strict=True))
