"""Hook of mkdocs: each tutorial as a notebook to download, made of its percent-format source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jupytext
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: Any) -> Files:
    """Add ``tutorials/NAME.ipynb`` beside every ``tutorials/NAME.py``."""
    for source in sorted(Path(config["docs_dir"], "tutorials").glob("*.py")):
        notebook = jupytext.read(source, fmt="py:percent")
        text = jupytext.writes(notebook, fmt="ipynb")
        files.append(File.generated(config, f"tutorials/{source.stem}.ipynb", content=text))
    return files
