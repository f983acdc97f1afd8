"""Pages: no dead link, no test that is not there, no public name without a word of explanation."""

import importlib
import inspect
import re

import pytest
from doc_pages import HELD_ELSEWHERE, PAGES, ROOT, blocks_of

import wan_autoregressive

LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)]*)?\)")
DOCUMENTED = re.findall(r"^::: (\S+)", PAGES["docs/API.md"], re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    targets = [target for target in LINK.findall(PAGES[page]) if not target.startswith(("https://", "http://"))]
    assert [target for target in targets if not (ROOT / page).parent.joinpath(target).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_tests_that_are_named_exist(page):
    for name, test in re.findall(r"(tests/[\w/]+\.py)(?:::(\w+))?", PAGES[page]):
        assert (ROOT / name).is_file(), name
        assert not test or f"def {test}(" in (ROOT / name).read_text(), f"{name}::{test}"


def test_blocks_that_are_held_elsewhere_are_held_by_a_test():
    for page, test in HELD_ELSEWHERE.items():
        assert page in PAGES
        assert (ROOT / test).is_file()


def test_a_mark_belongs_to_a_block():
    for page, text in PAGES.items():
        marked = [block for block in blocks_of(text) if block.reason]
        assert len(marked) == len(re.findall(r"^<!-- not run here", text, re.MULTILINE)), page


def test_every_public_name_is_on_the_page_of_the_api():
    names = {path.rpartition(".")[2] for path in DOCUMENTED}
    assert set(wan_autoregressive.__all__) - {"__version__"} <= names


@pytest.mark.parametrize("path", DOCUMENTED)
def test_every_public_name_is_explained(path):
    module, _, name = path.rpartition(".")
    item = getattr(importlib.import_module(module), name)
    assert item.__doc__
    if inspect.isclass(item):
        own = {key for key, value in vars(item).items() if not key.startswith("_") and is_explainable(value)}
        explained_by_bases = {key for base in item.__mro__[1:] for key in vars(base)}
        assert [key for key in own - explained_by_bases if not inspect.getdoc(getattr(item, key))] == []
        assert not undescribed_fields(item)


def is_explainable(value) -> bool:
    return inspect.isfunction(value) or isinstance(value, property | classmethod | staticmethod)


def undescribed_fields(item: type) -> list[str]:
    """Public fields of a dataclass with neither a docstring below them nor a word in that of the class."""
    source, text = inspect.getsource(item), item.__doc__ or ""
    return [
        name
        for name in getattr(item, "__dataclass_fields__", {})
        if not name.startswith("_")
        and not re.search(rf"^    {name}: [^\n]*\n(?:        [^\n]*\n|    [)\]}}]\n)*    \"\"\"", source, re.MULTILINE)
        and not re.search(rf"\b{name}\b", text)
    ]
