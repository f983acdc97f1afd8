"""What the site does beyond plain pages: links to files of the repository, and pages that a checkout may lack.

The pages are read in the repository too, where they link to code by `../pipelines/rollout.py`. On the site such a file
becomes a page of its own, with the code; a link to a file that is not there is an error, as every dead link.
"""

# pyright: reportMissingImports=false
# Only `make docs` installs what these import.

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
CODE_LINK = re.compile(r"\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")
LANGUAGES = {".py": "python", ".toml": "toml", ".yaml": "yaml", ".yml": "yaml", ".js": "javascript", ".md": "markdown"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Leave out of the navigation what is not written."""
    config.nav = _present(config.nav or [], Path(config.docs_dir))
    return config


def _present(entries: list[Any], folder: Path) -> list[Any]:
    kept = []
    for entry in entries:
        ((title, target),) = entry.items()
        if isinstance(target, list):
            kept.append({title: _present(target, folder)})
        elif (folder / target).is_file():
            kept.append(entry)
    return kept


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for every file of the repository that a page links to."""
    linked: set[str] = set()
    for path in Path(config.docs_dir).rglob("*.md"):
        linked |= {match[1].rstrip("/") for match in CODE_LINK.finditer(path.read_text(encoding="utf-8"))}
    for name in sorted(linked):
        page = File.generated(config, _page_of(name), content=_code_page(name), inclusion=InclusionLevel.NOT_IN_NAV)
        files.append(page)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to code at its page."""
    return CODE_LINK.sub(lambda match: f"]({_page_of(match[1].rstrip('/'))})", markdown)


def _page_of(name: str) -> str:
    return f"code/{name}.md" if not name.endswith(".md") else f"code/{name}"


def _code_page(name: str) -> str:
    path = ROOT / name
    if path.is_dir():
        listed = "\n".join(f"- `{entry.name}`" for entry in sorted(path.iterdir()) if entry.name[0] not in "._")
        return f"# `{name}/`\n\n{listed}\n"
    if not path.is_file():
        raise PluginError(f"a page links to ../{name}, which is not there")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    if path.suffix == ".ipynb":
        cells = ((cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"])
        return "\n\n".join(f"```python\n{source}\n```" if kind == "code" else source for kind, source in cells)
    fence = "`" * (max((len(run) for run in re.findall(r"`+", text)), default=2) + 3)
    return f"# `{name}`\n\n{fence}{LANGUAGES.get(path.suffix, 'text')}\n{text}\n{fence}\n"
