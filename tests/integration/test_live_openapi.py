"""The description of the API names every route that there is, and describes the messages that are taken."""

import re

import pytest
from live_viewer import RED, new_engine, until
from starlette.testclient import TestClient

from wan_autoregressive.server.app import build_app
from wan_autoregressive.server.guard import Door


@pytest.fixture(scope="module")
def client(pipe, tmp_path_factory):
    engine = new_engine(pipe, tmp_path_factory.mktemp("described") / "state")
    with TestClient(build_app(engine, Door()), base_url="http://127.0.0.1:8000") as client:
        yield client


def test_every_route_is_described(client):
    document = client.get("/openapi.json").json()
    described = {(path, method) for path, methods in document["paths"].items() for method in methods}
    expected = set()
    for route in client.app.routes:
        path = re.sub(r"{(\w+):\w+}", r"{\1}", route.path)
        if path not in ("/", "/{name}", "/openapi.json", "/api"):
            expected |= {(path, name.lower()) for name in getattr(route, "methods", None) or {"GET"} if name != "HEAD"}
    assert described == expected
    assert all(entry["summary"] for methods in document["paths"].values() for entry in methods.values())
    page = client.get("/api").text
    assert all(f"{method.upper()} {path}<" in page for path, method in expected)


def test_every_reference_leads_somewhere(client):
    document = client.get("/openapi.json").json()

    def references(value):
        if isinstance(value, dict):
            yield from ([value["$ref"]] if "$ref" in value else [])
            for inner in value.values():
                yield from references(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from references(inner)

    found = set(references(document))
    assert found
    for reference in found:
        at = document
        for part in reference.removeprefix("#/").split("/"):
            at = at[part]
    start = document["components"]["schemas"]["Start"]["properties"]
    assert {"prompt", "seed", "image", "resume", "ahead"} <= start.keys()


def test_the_schema_of_a_schedule_names_what_the_server_takes(client):
    document = client.get("/openapi.json").json()
    body = document["paths"]["/v1/schedules"]["post"]["requestBody"]["content"]["application/yaml"]["schema"]
    schema = document["components"]["schemas"][body["$ref"].rsplit("/", 1)[1]]
    assert schema["required"] == ["prompt"]

    def refusal(text: str) -> str:
        answer = client.post("/v1/schedules", content=text)
        assert answer.status_code == 400
        return answer.json()["error"]["message"]

    for name in schema["properties"]:
        assert "unknown" not in refusal(f"prompt: x\n{name}: {{nonsense: 1}}"), name
    for name in ("prompts", "video", "strength", "widht"):
        assert name not in schema["properties"]
        assert f"{name} cannot be used here" in (told := refusal(f"prompt: x\n{name}: 1")) or "unknown" in told, told
    assert "no prompt" in refusal("seed: 1")


def test_metrics_are_what_prometheus_reads_and_count(client):
    def figures() -> dict[str, float]:
        lines = client.get("/metrics").text.splitlines()
        assert all(re.fullmatch(r'# (HELP|TYPE) \w+ .+|\w+(\{stage="\w+"\})? [-+.e\d]+', line) for line in lines)
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    before = figures()
    answer = client.post("/v1/videos", json={"prompt": RED, "seconds": 0.5, "seed": 1})
    assert answer.status_code == 200
    until(lambda: client.get(f"/v1/videos/{answer.json()['id']}").json()["status"] == "completed")
    after = figures()
    assert after["wan_ar_frames_total"] - before["wan_ar_frames_total"] == 8
    assert after["wan_ar_steps_total"] - before["wan_ar_steps_total"] == 1
    for stage in ("text", "denoise", "decode", "video"):
        assert after[f'wan_ar_stage_seconds_total{{stage="{stage}"}}'] > 0
