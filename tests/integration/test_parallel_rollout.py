"""Whole videos on several ranks: what one process makes, saved as one, and no wrong one where a rank drops out."""

import parallel_videos as videos
import pytest
import torch
from ranks import RankError, run_ranks, start_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo():
    return videos.demo()


@pytest.mark.parametrize("count", [2, 3])
def test_every_way_to_make_a_video(demo, count, tmp_path):
    names = list(videos.VIDEOS)
    found = run_ranks(videos.video_launch, count, tmp_path / "ranks", names, limit_s=600)[0]
    for name, expected in videos.videos(names, demo).items():
        got, heads = found[name], demo.transformer.config.num_attention_heads
        atol = 1e-3 if "kv_dtype" in videos.VIDEOS[name] else 1e-4
        torch.testing.assert_close(
            got["latents"], expected["latents"], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert abs(got["frames"].astype(int) - expected["frames"]).max() <= 1, name
        assert got["steps"] == expected["steps"], name
        assert got["cache_bytes"] * heads == expected["cache_bytes"] * -(-heads // count), name


def test_every_verb(demo, tmp_path):
    expected = videos.expected_of_verbs(demo, tmp_path)
    found = run_ranks(videos.verbs_launch, 2, tmp_path / "ranks", tmp_path, limit_s=600)[0]
    assert "needs a generator" in found["refused"][0]
    assert "on_step_end" in found["refused"][1]
    for name, chunks in expected.items():
        torch.testing.assert_close(found[name]["latents"], chunks["latents"], rtol=0, atol=1e-3, msg=name)
        assert found[name]["steps"] == chunks["steps"], name
    assert found["stopped"]["latents"].shape[2] == 9  # in the first of two steps of the third chunk
    videos.check_saved_as_one(demo, found, tmp_path)


@pytest.mark.parametrize("count", [2, 3])
def test_the_last_rank_decodes(demo, count, tmp_path):
    found = run_ranks(videos.decode_launch, count, tmp_path / "ranks", tmp_path / "state", limit_s=600)[0]
    whole = videos.made(videos.start(demo, **videos.SAVED))
    expected = {"alongside": whole, "forked": whole, "went on": whole, "resumed": whole}
    expected["recompute"] = videos.made(videos.start(demo, **videos.VIDEOS["recompute"]))
    for name, chunks in expected.items():
        got = found[name]
        assert abs(got["frames"].astype(int) - chunks["frames"][:, -got["frames"].shape[1] :]).max() <= 1, name
    # The state of the decoder has come back: another process goes on with it.
    alone = videos.made(demo.resume(tmp_path / "state"))
    assert abs(alone["frames"].astype(int) - found["resumed"]["frames"]).max() <= 1


@pytest.mark.parametrize(
    ("count", "failing", "how", "said"),
    [
        (2, 1, "raise", "rank 1 (process {pid}) failed: ValueError: the card caught fire"),
        (2, 0, "raise", "rank 0 (process {pid}) failed: ValueError: the card caught fire"),
        (3, 1, "kill", "rank 1 (process {pid}) has ended, was stopped or does not answer"),
        (3, 0, "kill", "rank 0 (process {pid}) has ended, was stopped or does not answer"),
        (3, 2, "stop", "rank 2 (process {pid}) has ended, was stopped or does not answer"),
    ],
)
def test_the_others_name_the_rank_that_fails(demo, count, failing, how, said, tmp_path):
    state, timeout_s = tmp_path / "state", 10.0
    lost = failing if how == "stop" else None
    arguments = (failing, how, state, timeout_s)
    found = start_ranks(videos.failure_launch, count, tmp_path / "ranks", *arguments, lost=lost)
    before, after = (part for part in said.split("{pid}"))
    for rank, result in enumerate(found):
        if rank == failing:
            assert how != "raise" or "the card caught fire" in str(result)
            continue
        told = result["told"] if rank == 0 else str(result).split("\n")[0]
        assert before in told
        assert after in told
        if rank == 0:
            assert all("cannot" in refusal for refusal in result["refused"])
        else:
            assert isinstance(result, RankError)
    # What was saved before is whole, and goes on.
    resumed = demo.resume(state)
    assert resumed.chunks_done == videos.FAILS_AT
    expected = videos.made(videos.start(demo, **videos.WINDOW))["latents"]
    torch.testing.assert_close(videos.made(resumed)["latents"], expected[:, :, 9:], rtol=0, atol=1e-4)


def test_other_weights_on_one_rank_are_refused_at_once(tmp_path):
    found = start_ranks(videos.failure_launch, 2, tmp_path / "ranks", 1, "other weights", tmp_path / "state", 5.0)
    for result in found:
        assert "has another transformer than rank 0" in str(result)
