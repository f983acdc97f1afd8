"""Step lists and step math, against the original's figures and diffusers' LCM scheduler."""

import pytest
import torch
from diffusers import FlowMatchLCMScheduler, UniPCMultistepScheduler
from diffusers.utils.torch_utils import randn_tensor

from wan_autoregressive import SelfForcingScheduler
from wan_autoregressive.schedulers.self_forcing_scheduler import draw_noise


def test_warped_steps_are_the_original_floats():
    scheduler = SelfForcingScheduler(denoising_steps=(1000, 750, 500, 250), shift=5.0, warp=True)
    assert scheduler.timesteps.tolist() == [1000.0, 937.5, 833.3333129882812, 625.0]
    assert scheduler.sigmas.tolist() == [1.0, 0.9375, 0.8333333134651184, 0.625, 0.0]


def test_unwarped_steps_are_used_as_they_are():
    scheduler = SelfForcingScheduler(denoising_steps=(1000, 757, 522), shift=8.0, warp=False)
    assert scheduler.timesteps.tolist() == [1000.0, 757.0, 522.0]
    # The nearest entry of the table, within half a step of it.
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1], strict=True):
        assert abs(float(timestep) / 1000 - float(sigma)) < 0.004


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0])
def test_equals_the_lcm_scheduler_of_diffusers(shift):
    steps = [1000, 750, 500, 250]
    ours = SelfForcingScheduler(denoising_steps=steps, shift=shift)
    theirs = FlowMatchLCMScheduler(shift=shift)
    theirs.set_timesteps(sigmas=[step / 1000 for step in steps])
    assert torch.allclose(ours.timesteps, theirs.timesteps, rtol=0, atol=1e-4)

    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    ours_sample = theirs_sample = torch.randn(1, 4, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    for i in range(4):
        flow = torch.randn(ours_sample.shape, generator=torch.Generator().manual_seed(2 + i))
        ours_sample = ours.step(flow, ours.timesteps[i], ours_sample, generator=generators[0]).prev_sample
        theirs_sample = theirs.step(flow, theirs.timesteps[i], theirs_sample, generator=generators[1]).prev_sample
        assert torch.allclose(ours_sample, theirs_sample, rtol=0, atol=2e-6)


def test_the_last_step_draws_nothing():
    scheduler = SelfForcingScheduler()
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    sample = torch.randn(1, 2, 1, 2, 2)
    output = scheduler.step(torch.zeros_like(sample), 625.0, sample, generator=generator)
    assert torch.equal(generator.get_state(), state)
    assert torch.equal(output.prev_sample, output.pred_original_sample)
    scheduler.step(torch.zeros_like(sample), 1000.0, sample, generator=generator)
    assert not torch.equal(generator.get_state(), state)


def test_a_list_of_generators_makes_each_video_its_own():
    scheduler = SelfForcingScheduler()
    sample, flow = torch.ones(2, 4, 1, 2, 2), torch.zeros(2, 4, 1, 2, 2)
    pair = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    both, _ = scheduler.step(flow, 1000.0, sample, generator=pair, return_dict=False)
    for i, seed in enumerate((3, 4)):
        alone, _ = scheduler.step(
            flow[:1], 1000.0, sample[:1], generator=[torch.Generator().manual_seed(seed)], return_dict=False
        )
        assert torch.equal(both[i : i + 1], alone)


def test_x0_and_noise_are_inverse():
    scheduler = SelfForcingScheduler()
    x0, noise = torch.randn(1, 2, 3, 4, 4), torch.randn(1, 2, 3, 4, 4)
    for timestep, sigma in zip(scheduler.timesteps.tolist(), scheduler.sigmas.tolist(), strict=False):
        noisy = scheduler.add_noise(x0, noise, timestep)
        assert torch.allclose(scheduler.predict_original_sample(noise - x0, sigma, noisy), x0, atol=1e-6)


def test_a_step_keeps_nothing_between_chunks():
    scheduler = SelfForcingScheduler()
    sample, flow = torch.randn(1, 2, 1, 2, 2), torch.randn(1, 2, 1, 2, 2)
    first = [
        scheduler.step(flow, t, sample, torch.Generator().manual_seed(0)).prev_sample for t in scheduler.timesteps
    ]
    again = [
        scheduler.step(flow, t, sample, torch.Generator().manual_seed(0)).prev_sample for t in scheduler.timesteps
    ]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_set_timesteps():
    scheduler = SelfForcingScheduler(denoising_steps=(1000, 900), warp=False)
    scheduler.set_timesteps(2)
    assert scheduler.timesteps.tolist() == [1000.0, 900.0]
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [1000.0, 750.0, 500.0, 250.0]
    scheduler.set_timesteps(denoising_steps=(800, 400, 200))
    assert scheduler.timesteps.tolist() == [800.0, 400.0, 200.0]
    with pytest.raises(ValueError, match="pass one"):
        scheduler.set_timesteps(2, denoising_steps=(1000, 500))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"denoising_steps": ()}, "empty"),
        ({"denoising_steps": (1000, 1000)}, "descend"),
        ({"denoising_steps": (250, 500)}, "descend"),
        ({"denoising_steps": (1001, 500)}, "from 0 to 1000"),
        ({"denoising_steps": (1000, -1)}, "from 0 to"),
        ({"denoising_steps": (1000, "a")}, "must be a number"),
        ({"denoising_steps": (1000, 500.5)}, "whole numbers"),
        ({"shift": 0}, "shift is 0"),
    ],
)
def test_refuses_bad_lists(arguments, message):
    with pytest.raises(ValueError, match=message):
        SelfForcingScheduler(**arguments)


def test_a_step_at_0_has_the_smallest_sigma_above_0():
    scheduler = SelfForcingScheduler(denoising_steps=(1000, 500, 0))
    assert scheduler.timesteps[-1] == 0
    smallest = 5 * 0.001 / (1 + 4 * 0.001)
    torch.testing.assert_close(scheduler.sigmas[2].item(), smallest, rtol=1e-5, atol=0)
    noisy = scheduler.add_noise(torch.zeros(1), torch.ones(1), 0.0)
    torch.testing.assert_close(noisy.item(), smallest, rtol=1e-5, atol=0)


def test_refuses_a_foreign_timestep():
    with pytest.raises(ValueError, match=r"timestep 937\.0 is not one of"):
        SelfForcingScheduler().step(torch.zeros(1), 937, torch.zeros(1))


def test_saves_and_loads(tmp_path):
    scheduler = SelfForcingScheduler(denoising_steps=(1000, 757, 522), shift=8.0, warp=False)
    scheduler.save_pretrained(tmp_path)
    loaded = SelfForcingScheduler.from_pretrained(tmp_path)
    assert torch.equal(loaded.timesteps, scheduler.timesteps)
    assert torch.equal(loaded.sigmas, scheduler.sigmas)


def test_keeps_the_shift_of_a_stock_wan_scheduler():
    stock = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    assert SelfForcingScheduler.from_config(stock.config).config.shift == 3.0
    assert SelfForcingScheduler.from_config(stock.config, shift=7.0).config.shift == 7.0


@pytest.mark.parametrize("drawn_from", ["one generator", "one for each", "global state"])
def test_noise_is_that_of_diffusers(drawn_from):
    def drawn(function):
        torch.manual_seed(3)
        one, two = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
        generator = {"one generator": one, "one for each": [one, two], "global state": None}[drawn_from]
        return function((2, 3, 4), generator=generator, device=torch.device("cpu"), dtype=torch.float32)

    with torch.random.fork_rng():
        assert torch.equal(drawn(draw_noise), drawn(randn_tensor))


def test_of_another_schedulers_config_is_taken_what_means_something_here(tmp_path):
    UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0).save_config(
        tmp_path
    )
    scheduler = SelfForcingScheduler.from_config(UniPCMultistepScheduler.load_config(tmp_path))
    own = {"denoising_steps", "shift", "warp", "num_train_timesteps"}
    assert {name for name in scheduler.config if not name.startswith("_")} == own
    assert scheduler.config.shift == 3.0
    assert (
        SelfForcingScheduler.from_config({"shift": 2.0, "sihft": 3.0}).config["sihft"] == 3.0
    )  # diffusers warns of it
