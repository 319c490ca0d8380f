"""What the HTML pages have in common: the frame of a page, and cells and rows of its tables."""

from __future__ import annotations

from html import escape
from pathlib import Path

CSS = Path(__file__).with_name("page.css")


def document(title: str, css: str, sections: list[str]) -> str:
    """A page that loads nothing from anywhere, for light and dark screens of any width."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{escape(title)}</title>\n'
        f"<style>\n{css}</style>\n</head>\n<body>\n<main>\n" + "\n".join(sections) + "\n</main>\n</body>\n</html>\n"
    )


def table_row(name: str, cells: list[str], css: str = "") -> str:
    """A body row; cells are escaped unless they are `Html`."""
    columns = "".join(f"<td>{cell if isinstance(cell, Html) else escape(cell)}</td>" for cell in cells)
    return f'<tr{f" class={css}" if css else ""}><th scope="row">{escape(name)}</th>{columns}</tr>'


class Html(str):
    """Text that is HTML already."""


def bar(text: str, share: float) -> Html:
    """A number with a bar of `share` (cut off at 1) below it."""
    return Html(f'{escape(text)}<i class="bar"><i style="width:{100 * min(share, 1):.1f}%"></i></i>')
