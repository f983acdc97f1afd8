"""Writes `docs/CHECKPOINTS.md` from the list of published checkpoints: `python tools/checkpoints_page.py`."""

from __future__ import annotations

from pathlib import Path

from wan_autoregressive.configs.checkpoints import PublishedCheckpoint, gigabytes, published_checkpoints

PAGE = Path(__file__).parents[1] / "docs" / "CHECKPOINTS.md"

_HEAD = """\
# Published checkpoints

```
wan-ar pull --list          # the names, sizes and licences
wan-ar pull self-forcing    # downloads, converts, writes ~/.cache/wan-autoregressive/self-forcing
wan-ar generate --model self-forcing --prompt "a fox runs through fresh snow" --output fox.mp4
```

In Python: `WanAutoregressivePipeline.from_pretrained(checkpoint_folder("self-forcing"))`. `WAN_AUTOREGRESSIVE_CACHE`
names another folder for all of them, `--to DIR` one for a single one.

- **None of these has been downloaded or run where this package is built**: there is no Hub there. `wan-ar pull` is
  tested with a small Hub on the loopback and small checkpoints in the original layout.
- `pull` prints size and licence before it downloads, and checks that there is space. Every file is compared with the
  Hub's hash, and the folder appears once it is whole. A connection that breaks is resumed. Pulled again after a stop,
  what is whole is kept and the file that it was at begins anew.
- The downloads stay in the Hub's cache; text encoder and VAE are links to it where the file system can.
- `--model NAME` sets the preset of the table where no `--config` is given.
- A name that "needs" something is listed and not pulled.
- Sizes count the checkpoint and what is taken of its Wan model: tokenizer, text encoder and VAE.

| name | what it is | files | Wan model | preset | sampler | licence | download |
|---|---|---|---|---|---|---|---|
"""
_NOT_CHECKED = """
## What could not be checked

Files, entries and recipes are those of the authors' READMEs, inference code and settings. Beyond them, for want of the
Hub:

"""
_BASES = """
## Wan models

| repository | licence | of it downloaded, about |
|---|---|---|
"""


def page() -> str:
    """The whole page."""
    entries = published_checkpoints().values()
    bases = {entry.base: entry.base_model for entry in entries}
    return "".join(
        [
            _HEAD,
            *(_row(entry) for entry in entries),
            _BASES,
            *(
                f"| [{name}]({_url(name)}) | {base.license} | {gigabytes(base.bytes)} |\n"
                for name, base in bases.items()
            ),
            _NOT_CHECKED,
            *(f"- `{entry.name}`: {entry.unchecked}\n" for entry in entries if entry.unchecked),
        ]
    )


def _row(entry: PublishedCheckpoint) -> str:
    files = f"`{entry.file}`" + (f" (`{entry.weights}`)" if entry.weights != "auto" else "")
    files += _lora(entry.lora, entry.lora_scale)
    if entry.second is not None:
        files += f" and `{entry.second}`" + _lora(entry.second_lora, entry.second_lora_scale)
    cells = (
        f"`{entry.name}`",
        entry.title,
        f"[{entry.repo}]({_url(entry.repo)}): {files}",
        entry.base.removeprefix("Wan-AI/").removesuffix("-Diffusers"),
        f"`{entry.preset}`" if entry.preset else "",
        f"`{entry.sampler}`" if entry.sampler else "",
        f"{entry.license}, **non-commercial**" if entry.non_commercial else entry.license,
        entry.size_text if entry.needs is None else f"needs {entry.needs}",
    )
    return f"| {' | '.join(cells)} |\n"


def _lora(path: str | None, scale: float) -> str:
    return "" if path is None else f" + LoRA `{path}`, scale {scale:g}"


def _url(repo: str) -> str:
    return f"https://huggingface.co/{repo}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
