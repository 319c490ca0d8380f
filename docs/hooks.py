"""What mkdocs calls while it builds: the page of the command line is what the program says of itself."""

import subprocess
import sys

PROGRAM = [sys.executable, "-m", "typer", "vis_sparse.cli.main", "utils", "docs", "--name", "vis-sparse"]


def on_page_markdown(markdown: str, page, **_) -> str:
    """cli.md with typer's own description of every command behind it."""
    if page.file.src_uri != "cli.md":
        return markdown
    described = subprocess.run(PROGRAM, check=True, capture_output=True, text=True).stdout
    _, commands = described.split("\n", 1)  # its title: the page has one
    return f"{markdown}\n{commands}"
