"""Videos to wait for, asked for by OpenAI's own client; they are the videos that a viewer sees."""

import io
import json

import httpx2
import openai
import pytest
from live_viewer import GREEN, RED, Viewer, alone, new_engine, until
from live_web import running
from PIL import Image
from saved_runs import frames_of

from wan_autoregressive.server.guard import Door
from wan_autoregressive.server.jobs import VideoJobs

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def server(pipe, tmp_path_factory):
    engine = new_engine(pipe, tmp_path_factory.mktemp("jobs") / "state", slots=1, max_seconds=20)
    with running(engine, Door(token="a good token")) as port:
        yield f"http://127.0.0.1:{port}/v1"


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(api_key="a good token", base_url=server, max_retries=0) as client:
        yield client


def made(client, **wanted):
    video = client.videos.create(**wanted)
    video = client.videos.poll(video.id, poll_interval_ms=50)
    assert video.status == "completed", video.error
    return video


def test_a_video_is_the_one_that_a_viewer_sees(client, pipe, tmp_path):
    video = made(client, prompt=RED, seconds="2", size="256x256", extra_body={"seed": 3})
    assert (video.progress, video.seconds, video.size, video.prompt) == (100, "2", "256x256", RED)
    (tmp_path / "job.mp4").write_bytes(client.videos.download_content(video.id).content)
    found = frames_of(tmp_path / "job.mp4")
    assert len(found) == 32
    expected = []
    for part in alone(pipe, RED, 3, 2):  # 21 frames; the third chunk is cut, and so encoded otherwise
        (tmp_path / "part.mp4").write_bytes(part)
        expected += list(frames_of(tmp_path / "part.mp4"))
    assert all((one == other).all() for one, other in zip(found, expected, strict=False))
    assert client.videos.download_content(video.id, variant="thumbnail").content[8:12] == b"WEBP"
    assert client.videos.delete(video.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(video.id)


def test_a_video_from_a_picture_whatever_its_name(client):
    file = io.BytesIO()
    Image.new("RGB", (300, 200), "red").save(file, "PNG")
    file.name = "../../evil.png"
    file.seek(0)
    assert made(client, prompt=RED, seconds="1", input_reference=file).status == "completed"


def test_lists_page_by_page(client):
    keys = [made(client, prompt=f"{RED} {number}", seconds="0.5").id for number in range(3)]
    assert [video.id for video in client.videos.list(limit=2)][:3] == keys[::-1]  # the client turns the pages
    assert client.videos.list(limit=2).has_more
    assert [video.id for video in client.videos.list(order="asc", after=keys[0]).data] == keys[1:]


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"prompt": " "}, "prompt"),
        ({"prompt": "a\0b"}, "U+0000"),
        ({"prompt": RED, "size": "1280x720"}, "videos of 256x256"),
        ({"prompt": RED, "seconds": "1000"}, "a video may have 20"),
        ({"prompt": RED, "seconds": "nan"}, "seconds"),
        ({"prompt": RED, "extra_body": {"steps": 4}}, "steps"),
        ({"prompt": RED, "extra_body": {"input_reference": "/etc/passwd"}}, "input_reference"),
        ({"prompt": RED, "input_reference": b"#EXTM3U\nfile:///etc/passwd"}, "not a picture"),
    ],
)
def test_says_what_cannot_be_made(client, wanted, words):
    with pytest.raises(openai.BadRequestError, match=words.replace("+", r"\+")):
        client.videos.create(**wanted)


def test_doors_and_other_bodies(server, client):
    stranger = client.with_options(api_key="a bad one")
    with pytest.raises(openai.AuthenticationError):
        stranger.videos.list()
    post = {"url": f"{server}/videos", "headers": {"Authorization": "Bearer a good token"}}
    for key in ("video_" + "0" * 24, "..%2f..%2fstate", "job.json"):
        assert httpx2.get(f"{server}/videos/{key}", headers=post["headers"]).status_code == 404
    assert httpx2.post(**post, json={"prompt": RED, "seconds": 0.5}).status_code == 200
    assert httpx2.post(**post, content=b"{").status_code == 400
    kind = {**post["headers"], "Content-Type": "multipart/form-data"}
    assert httpx2.post(post["url"], headers=kind, content=b"no boundary").status_code == 400
    assert httpx2.post(**post, content=bytes(9 * 2**20)).status_code == 413


@pytest.mark.slow
def test_a_job_takes_no_slot_and_yields_to_viewers(pipe, tmp_path):
    engine = new_engine(pipe, tmp_path / "state", slots=1)
    jobs = VideoJobs(engine)
    job = jobs.create(GREEN, 5, 1, None)
    viewer = Viewer(engine, prompt=RED, seed=2, ahead=1)
    assert viewer.watch(3) == alone(pipe, RED, 2, 3)
    until(lambda: jobs.get(job.id).status == "completed")
    assert engine.figures()["parked"] == 0
    jobs.close()
    engine.shutdown()


@pytest.mark.slow
def test_jobs_outlive_a_restart(pipe, tmp_path):
    """The one under way goes on, the others begin, and what is done stays."""
    engine = new_engine(pipe, tmp_path / "state")
    jobs = VideoJobs(engine)
    done, under_way, waiting = (jobs.create(RED, seconds, 7, None) for seconds in (0.5, 4, 1.5))
    until(lambda: jobs.get(under_way.id).progress > 20)
    jobs.close()
    engine.shutdown()
    assert [jobs.get(job.id).status for job in (done, under_way, waiting)] == ["completed", "in_progress", "queued"]

    engine = new_engine(pipe, tmp_path / "state")
    steps = engine.figures()["steps"]
    jobs = VideoJobs(engine)
    until(lambda: all(job.is_over for job in jobs.all()))
    assert {job.status for job in jobs.all()} == {"completed"}
    # 64 and 24 frames are 6 and 3 chunks; some of the first video's were made before.
    assert 3 < engine.figures()["steps"] - steps < 9
    again = jobs.create(RED, 4, 7, None)
    until(lambda: jobs.get(again.id).is_over)
    whole, resumed = (jobs.path(job, "video").read_bytes() for job in (again, under_way))
    assert whole == resumed
    jobs.close()
    engine.shutdown()


@pytest.mark.slow
def test_deleting_ends_what_is_under_way_and_a_bad_job_stops_no_other(pipe, tmp_path, monkeypatch):
    engine = new_engine(pipe, tmp_path / "state")
    jobs = VideoJobs(engine, most_waiting=3, most_kept=1)
    long = jobs.create(RED, 500, 1, None)
    until(lambda: jobs.get(long.id).progress > 0)
    jobs.delete(long.id)
    until(lambda: not (tmp_path / "state" / "jobs" / long.id).exists())
    until(lambda: engine.figures()["parked"] == 0)

    step = type(pipe.rollout(RED, num_frames=9, height=32, width=32)).step
    monkeypatch.setattr(
        "wan_autoregressive.pipelines.rollout.WanRollout.step",
        lambda self, prompt=None: 1 / 0 if self.prompt.text == ["fire"] else step(self, prompt),
    )
    bad, good = jobs.create("fire", 1, 1, None), jobs.create(GREEN, 1, 1, None)
    until(lambda: bad.is_over)
    assert (bad.status, "division by zero" in bad.error["message"]) == ("failed", True)
    until(lambda: good.is_over)
    assert [job.id for job in jobs.all()] == [good.id]  # only one that is over is kept
    saved = tmp_path / "state" / "jobs" / good.id / "job.json"
    until(lambda: json.loads(saved.read_text())["status"] == "completed")
    jobs.close()
    engine.shutdown()
