"""What the page can do beside a prompt: pictures, settings, schedules, a camera; and that everybody can use it."""

import io
import json
import re
import urllib.request

import numpy as np
import pytest
import yaml
from live_browser import GREEN, RED, Page
from PIL import Image

pytestmark = pytest.mark.slow


def described(page: Page, link: str) -> dict:
    with urllib.request.urlopen(f"{link}v1/sessions/{page.js('wanLive.session')}") as answer:
        return json.load(answer)


def test_a_video_starts_from_a_picture(visit, live_server, tmp_path):
    page = visit(live_server.link)
    page.ask(RED)
    page.shows("red", "green")
    before = page.js("wanLive.session")
    Image.new("RGB", (300, 200), (250, 180, 40)).save(tmp_path / "in.png")
    page.page.set_input_files("#image", tmp_path / "in.png")
    page.until(lambda: page.js("wanLive.session") != before and page.chunks.count() > 0)
    values = described(page, live_server.link)
    assert values["from_image"]
    assert values["chunks"][0]["frames"] == 1
    with urllib.request.urlopen(
        f"{live_server.link}v1/sessions/{values['session']}/chunks/{values['chunks'][0]['id']}.webp"
    ) as answer:
        pixels = np.asarray(Image.open(io.BytesIO(answer.read())).convert("RGB"))
    np.testing.assert_allclose(pixels.mean(axis=(0, 1)), (250, 180, 40), atol=30)
    page.plays_on()
    assert page.problems == []

    # What is none is refused in words, and what plays goes on.
    (tmp_path / "bad.png").write_bytes(b"nothing")
    page.page.set_input_files("#image", tmp_path / "bad.png")
    page.until(lambda: "not a picture that can be used" in page.page.inner_text("#problem"))
    page.page.set_input_files("#image", {"name": "big.png", "mimeType": "image/png", "buffer": bytes(9 << 20)})
    page.until(lambda: "A picture may have 8 MB" in page.page.inner_text("#problem"))
    page.page.click("#problem button")
    assert not page.page.is_visible("#problem")
    page.plays_on(0.5)
    assert page.js("wanLive.session") == values["session"]


def test_settings_hold_at_the_start_and_while_it_plays(visit, live_server):
    page = visit(live_server.link)
    page.page.click("#open-settings")
    for name in ("window_frames", "sink_frames", "sampler", "num_inference_steps", "switch_policy", "strength"):
        field = page.page.locator(f"#setting-{name}")
        meaning = page.page.inner_text(f"#{field.get_attribute('aria-describedby')}")
        assert re.match(r"(Next start|Also while it plays)\. .{15}", meaning)
    page.page.fill("#seed", "77")
    page.page.fill("#setting-window_frames", "9")
    page.page.fill("#setting-sink_frames", "3")
    page.page.click("#start-anew")
    page.until(lambda: page.chunks.count() >= 2)
    page.page.click("#open-settings")
    page.page.select_option("#setting-switch_policy", "flush")
    page.page.fill("#setting-num_inference_steps", "2")
    page.page.keyboard.press("Escape")
    page.until(lambda: described(page, live_server.link)["chunks"][-1]["new_settings"] is not None)
    values = described(page, live_server.link)
    assert values["seed"] == 77
    assert values["settings"] == {"window_frames": 9, "sink_frames": 3}
    changed = {}
    for chunk in values["chunks"]:
        changed |= chunk["new_settings"] or {}
    assert changed.items() <= {"switch_policy": "flush", "num_inference_steps": 2}.items()

    # What cannot work is said in words, where it is typed or by the server.
    page.page.click("#open-settings")
    page.page.fill("#setting-sink_frames", "9")
    page.page.click("#start-anew")
    page.until(lambda: "does not hold a sink of 9" in page.page.inner_text("#problem"))
    page.until(lambda: page.status == "Live")
    assert page.js("wanLive.session") == values["session"]  # it comes back
    assert page.problems == []


def test_keys_do_what_the_help_says(visit, live_server):
    page = visit(live_server.link)
    keyboard = page.page.keyboard
    keyboard.press("?")
    assert page.page.is_visible("#help")
    assert "quick prompts" in page.page.inner_text("#help")
    keyboard.press("2")  # not behind a dialog
    keyboard.press("Escape")
    assert not page.page.is_visible("#help")
    assert page.js("wanLive.events.length") == 0
    keyboard.press("2")
    page.shows("green", "red")
    assert page.page.input_value("#prompt") == GREEN
    page.until(lambda: page.chunks.count() >= 3)
    keyboard.press(" ")
    assert page.status == "Paused"
    keyboard.press("Home")
    page.until(lambda: page.chunks.first.get_attribute("aria-current") == "true")
    keyboard.press("ArrowRight")
    page.until(lambda: page.chunks.nth(1).get_attribute("aria-current") == "true")
    keyboard.press("f")
    page.until(lambda: page.page.locator("#branches button").count() == 2)
    keyboard.press("n")
    assert not page.page.is_checked("#now")
    keyboard.press("s")
    assert page.page.is_visible("#settings")
    keyboard.press("Escape")
    page.page.focus("#prompt")
    keyboard.type("12 ?s")  # are letters there
    assert page.page.input_value("#prompt").endswith("12 ?s")
    files = []
    page.page.on("download", lambda download: files.append(download.suggested_filename))
    keyboard.press("Escape")
    keyboard.press("d")
    page.until(lambda: sorted(files) == ["video.json", "video.mp4"])
    assert page.problems == []


def test_a_schedule_leaves_and_is_played_again(visit, live_server, tmp_path):
    page = visit(live_server.link)
    page.show_red_then_green()
    page.page.click("#pause")
    page.page.click("#files summary")
    with page.page.expect_download() as download:
        page.page.click("#schedule")
    file = download.value.path().read_bytes()
    plan = yaml.safe_load(file)
    assert (plan["prompt"], [*plan["prompt_changes"].values()]) == (RED, [GREEN])
    before = described(page, live_server.link)
    schedule = {"name": "video.yaml", "mimeType": "text/yaml", "buffer": file}
    page.page.set_input_files("#import", schedule)
    page.until(lambda: page.js("wanLive.session") != before["session"])
    page.shows("green", "red")
    again = described(page, live_server.link)
    count = min(len(before["chunks"]), len(again["chunks"]))
    assert again["seed"] == before["seed"]
    assert [chunk["prompt"] for chunk in again["chunks"][:count]] == [
        chunk["prompt"] for chunk in before["chunks"][:count]
    ]
    assert page.problems == []
    page.page.set_input_files("#import", {**schedule, "buffer": b"prompt: a\nheight: 480"})
    page.until(lambda: "Height is 480 in the file" in page.page.inner_text("#problem"))


def test_the_camera_is_made_into_a_video(visit, live_server):
    page = visit(live_server.link)
    page.page.click("#camera")
    page.until(lambda: page.chunks.count() >= 3)
    assert page.page.is_visible("#camera-view")
    assert described(page, live_server.link)["from_camera"]
    assert page.page.is_disabled("#fork")
    page.ask(GREEN)
    page.until(lambda: page.page.locator("li.changed").count() == 1)
    page.plays_on(0.5)
    sent, size = page.js("[wanLive.camera.sent, wanLive.camera.canvas.width]")
    assert size == 64
    assert sent >= 12 * (page.chunks.count() - 2)
    page.page.click("#camera")
    assert not page.page.is_visible("#camera-view")
    assert page.js("document.getElementById('camera-view').srcObject") is None
    assert page.problems == []


def test_a_phone_in_the_dark(visit, live_server):
    small = {"viewport": {"width": 390, "height": 780}, "color_scheme": "dark", "has_touch": True, "is_mobile": True}
    page = visit(live_server.link, **small)

    def fits() -> bool:
        return page.js("document.documentElement.scrollWidth <= innerWidth")

    assert fits()
    page.page.tap("#go")
    page.until(lambda: page.chunks.count() >= 3)
    assert fits()
    for button, dialog in (("#open-settings", "#settings"), ("#open-help", "#help")):
        page.page.tap(button)
        box = page.page.locator(dialog).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390
        assert page.page.locator(dialog).evaluate("(dialog) => dialog.scrollWidth <= innerWidth")
        page.page.keyboard.press("Escape")

    def lightness() -> int:
        return page.js("Math.max(...getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number))")

    assert lightness() < 60
    page.page.tap("#open-settings")
    page.page.select_option("#colours", "light")
    assert lightness() > 200
    assert page.problems == []


@pytest.mark.parametrize("ratio", [1, 1.5, 2])
def test_a_pixel_of_the_model_is_a_square_of_whole_pixels(visit, live_server, ratio):
    page = visit(live_server.link + "?player=images", device_scale_factor=ratio)
    page.ask(RED)
    page.shows("red", "green")
    page.page.click("#pause")
    page.page.evaluate("document.getElementById('status').hidden = true")
    box = page.js("document.querySelector('#stage').getBoundingClientRect().toJSON()")
    shot = np.asarray(Image.open(io.BytesIO(page.page.screenshot())).convert("RGB"))
    edge = round(box["width"] * ratio / 64)
    assert edge >= 2
    assert box["width"] * ratio == pytest.approx(64 * edge, abs=0.1)

    def is_exact(left: int, top: int) -> bool:
        """Whether the middle of the picture, without round corners, is made of squares that begin there."""
        middle = shot[top + 8 * edge : top + 56 * edge, left + 8 * edge : left + 56 * edge]
        squares = middle.reshape(48, edge, 48, edge, 3)
        assert len(np.unique(squares.reshape(-1, 3), axis=0)) > 20
        return bool((squares == squares[:, :1, :, :1]).all())

    # The browser draws from the nearest whole pixel on.
    left, top = (round(box[side] * ratio) for side in ("left", "top"))
    assert any(is_exact(left + right, top + down) for right in (-1, 0, 1) for down in (-1, 0, 1))


def test_every_control_has_a_name_and_nothing_moves_that_should_not(visit, live_server):
    page = visit(live_server.link, reduced_motion="reduce")
    page.page.click("#go")
    page.until(lambda: page.chunks.count() >= 2)
    page.page.fill("#prompt", GREEN)
    page.chunks.first.click()
    page.until(lambda: page.page.locator("#branches button").count() == 2)
    for button, dialog in ((None, "body"), ("#open-settings", "#settings"), ("#compare", "#comparison")):
        if button is not None:
            page.page.click(button)
        seen = page.page.locator(dialog).aria_snapshot()
        kinds = "button|textbox|combobox|checkbox|slider|spinbutton|link|dialog|navigation|toolbar"
        assert re.findall(rf"^\s*- (?:{kinds})(?! \")(?::|$)", seen, re.MULTILINE) == [], seen
        page.page.keyboard.press("Escape")
    assert page.page.get_by_role("status").inner_text() in ("Live", "Paused")
    assert page.page.get_by_role("navigation", name="Branches").count() == 1
    assert page.js("getComputedStyle(document.getElementById('timeline')).scrollBehavior") == "auto"
    assert page.problems == []
