"""What stands where a video's files go: inputs and other people's files are left alone, before a model is loaded."""

import json
import os
from pathlib import Path

import pytest

from wan_autoregressive.scripts.output_files import OutputFiles, check_output_files
from wan_autoregressive.scripts.output_lock import hold_output

REPORT = json.dumps({"config": {}, "seed": 1, "versions": {"wan-autoregressive": "1"}})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    "name", ["x.mp4", "x.json", "x.png", "x.part.mp4", "x.joining.mp4", "x.resume/segment-000000.mp4"]
)
@pytest.mark.parametrize("way", ["itself", "a link to it"])
def test_an_input_is_never_written_over(tmp_path: Path, name: str, way: str) -> None:
    source = tmp_path / name
    source.parent.mkdir(exist_ok=True)
    source.write_text(REPORT)
    given = source
    if way == "a link to it":
        given = tmp_path / "input"
        given.symlink_to(source)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="give another output"):
        check_output_files(tmp_path / "x.mp4", [tmp_path / "other", given], contact_sheet=True)
    assert contents(tmp_path) == before
    check_output_files(tmp_path / "y.mp4", [given], contact_sheet=True)


def test_a_contact_sheet_that_is_not_made_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / "x.png").touch()
    check_output_files(tmp_path / "x.mp4", [tmp_path / "x.png"], contact_sheet=False)


@pytest.mark.parametrize("text", ["{}", "[1]", "", '{"config": {}, "versions": {}}', '{"config": 1, "versions": 1}'])
def test_only_a_report_is_replaced_by_a_report(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match="is no report of this command"):
        check_output_files(tmp_path / "x.mp4", [], contact_sheet=False)
    (tmp_path / "x.json").write_text(REPORT)
    check_output_files(tmp_path / "x.mp4", [], contact_sheet=False)


@pytest.mark.parametrize("name", ["x.json", "x.png", "x.part.mp4", "x.joining.mp4", "x.resume"])
@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_what_is_no_plain_file_is_in_the_way(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / name
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        (tmp_path / "elsewhere").mkdir()
        path.symlink_to(tmp_path / "elsewhere")
    if (name, kind) == ("x.resume", "folder"):
        check_output_files(tmp_path / "x.mp4", [], contact_sheet=True)
        return
    with pytest.raises(OSError, match=name):
        check_output_files(tmp_path / "x.mp4", [], contact_sheet=True)


def test_the_longest_name_that_passes_can_be_written(tmp_path: Path) -> None:
    longest = next(
        name
        for length in range(255, 0, -1)
        if _passes(name := tmp_path / f"{'ü' * (length // 2)}{'x' * (length % 2)}.mp4")
    )
    files = OutputFiles(longest)
    for path in (files.video, files.report, files.contact_sheet, files.part, files.joining, files.resume_folder):
        path.touch()
    with hold_output(longest):
        pass
    with pytest.raises(OSError, match="too long"):
        check_output_files(longest.with_name(f"x{longest.name}"), [], contact_sheet=False)


def _passes(path: Path) -> bool:
    try:
        check_output_files(path, [], contact_sheet=False)
    except OSError:
        return False
    return True


def test_names_that_share_a_part_share_a_lock(tmp_path: Path) -> None:
    with hold_output(tmp_path / "x.mp4"):
        with pytest.raises(ValueError, match="another run is writing"), hold_output(tmp_path / "x.MP4"):
            pass
        with hold_output(tmp_path / "y.mp4"):
            pass
    assert not list(tmp_path.iterdir())
