"""Nonsense on the command line and in yaml files: one line and exit code 2, never a traceback, never a file."""

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wan_autoregressive.configs import SETTING_NAMES, load_preset, resolve_config
from wan_autoregressive.scripts.cli import main

FLAGS = [f"--{name.replace('_', '-')}" for name in SETTING_NAMES]
# No line breaks and no surrogates: a shell cannot pass the latter either.
WORDS = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=12),
    st.integers(-(10**6), 10**6).map(str),
    st.floats().map(str),
    st.sampled_from(["longlive", "0: a fox", "5s: snow", "1000,500", ",", "auto", "/", ".", "--", "nan", "1e999"]),
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arguments=st.lists(st.tuples(st.sampled_from(FLAGS), WORDS), max_size=6))
def test_any_flags(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # there is no model in here, so nothing can be rendered
    argv = ["generate", *(word for pair in arguments for word in pair)]
    code = main(argv)
    output = capsys.readouterr()
    assert code in (0, 2), output.err  # 0 is --help
    assert "Traceback" not in output.err
    assert not list(tmp_path.iterdir())


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(list(SETTING_NAMES)) | st.text(max_size=8), VALUES, max_size=6))
def test_any_settings(values):
    needed = {"model": "m", "output": "o.mp4", "prompt": "a fox"}
    try:
        config = resolve_config({**needed, **values})
    except ValueError as error:
        message = str(error)
    else:
        message = f"height {config.rollout_settings()['height']}"
    assert len(message.splitlines()) == 1


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.one_of(st.binary(max_size=60), VALUES.map(lambda value: yaml.safe_dump(value).encode())))
def test_any_yaml(content, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_bytes(content)
    try:
        loaded, message = load_preset(str(path)), "fine"
    except ValueError as error:
        loaded, message = {}, str(error)
    assert set(loaded) <= set(SETTING_NAMES)
    assert len(message.splitlines()) == 1
