"""A self-contained HTML page of a pipeline run: pictures, a table, curves, and what each stage is for."""

import base64
import csv
import html
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from softgen.images import grid, to_uint8

_STYLE = """
:root { color-scheme: light dark; --line: #8883; --soft: #6b7280; --accent: #2a6fdb; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 70rem; margin: 2.5rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { margin-top: 2.4rem; font-size: 1.2rem; }
p.lead, figcaption, .note { color: var(--soft); } figure { margin: 1rem 0; }
figure img { max-width: 100%; image-rendering: pixelated; border: 1px solid var(--line); border-radius: 4px; }
figure.curve img { image-rendering: auto; background: white; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1.2rem; }
table { border-collapse: collapse; width: 100%; margin: .8rem 0; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child, td:last-child, th:last-child { text-align: left; white-space: normal; }
tr.best td { font-weight: 600; color: var(--accent); }
code { background: #8882; padding: .1em .3em; border-radius: 3px; }
"""


@dataclass(frozen=True)
class Figure:
    """A grid of images (n, 3, H, W) in [0, 1] with a caption."""

    images: Tensor
    caption: str
    columns: int = 10


@dataclass(frozen=True)
class Section:
    """One stage: what it is for, its pictures, its training curves.

    Attributes:
        title: Heading.
        purpose: What the stage is for, in a sentence.
        seconds: Wall time of the training, or None.
        figures: Pictures, side by side.
        curves: Column of the logs -> label, drawn over the steps.
        logs: The stage's metrics.csv files, oldest first.
    """

    title: str
    purpose: str
    seconds: float | None
    figures: Sequence[Figure]
    curves: Mapping[str, str]
    logs: Sequence[Path]


@dataclass(frozen=True)
class TableRow:
    """One line of the table; `highlight` marks the line that the page is about."""

    cells: Sequence[str]
    highlight: bool = False


def write_report(
    path: Path,
    *,
    title: str,
    lead: str,
    header: Sequence[str],
    rows: Sequence[TableRow],
    notes: Sequence[str],
    sections: Sequence[Section],
) -> None:
    """Write the page, whole or not at all; every picture is inside it.

    Args:
        path: The HTML file.
        title: Of the page.
        lead: A sentence under the title.
        header: Of the table.
        rows: Of the table.
        notes: How to read the table: protocol, n, seed, command.
        sections: One a stage.
    """
    body = [f"<h1>{html.escape(title)}</h1><p class=lead>{html.escape(lead)}</p>", _table(header, rows)]
    body.extend(f"<p class=note>{html.escape(note)}</p>" for note in notes)
    body.extend(_section(section) for section in sections)
    page = (
        f"<!doctype html><html lang=en><head><meta charset=utf-8><title>{html.escape(title)}</title>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.partial")
    scratch.write_text(page)
    os.replace(scratch, path)


def _table(header: Sequence[str], rows: Sequence[TableRow]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    lines = []
    for row in rows:
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row.cells)
        lines.append(f"<tr{' class=best' if row.highlight else ''}>{cells}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _section(section: Section) -> str:
    seconds = f" <span class=note>{section.seconds:.0f} s</span>" if section.seconds is not None else ""
    pictures = [
        f'<figure><img alt="{html.escape(figure.caption)}" src="{_png(figure)}">'
        f"<figcaption>{html.escape(figure.caption)}</figcaption></figure>"
        for figure in section.figures
    ]
    curve = _curve_png(section) if section.curves else None
    if curve is not None:
        pictures.append(
            f'<figure class=curve><img alt="training curves" src="{curve}">'
            "<figcaption>Training, by optimizer step.</figcaption></figure>"
        )
    return (
        f"<h2>{html.escape(section.title)}{seconds}</h2><p>{html.escape(section.purpose)}</p>"
        f"<div class=pair>{''.join(pictures)}</div>"
    )


def _data_uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def _png(figure: Figure) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    tiled = to_uint8(grid(figure.images, columns=figure.columns)).permute(1, 2, 0).numpy()
    Image.fromarray(tiled).save(buffer, format="PNG", optimize=True)
    return _data_uri(buffer.getvalue())


def read_curve(logs: Sequence[Path], column: str) -> tuple[list[int], list[float]]:
    """Steps and values of one column of Lightning's CSV logs."""
    steps, values = [], []
    for path in logs:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if row.get(column):
                    steps.append(int(row["step"]))
                    values.append(float(row[column]))
    return steps, values


def _curve_png(section: Section) -> str | None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(5.2, 3.0), layout="constrained")
    axes = canvas.subplots()
    drawn = False
    for column, label in section.curves.items():
        steps, values = read_curve(section.logs, column)
        if steps:
            axes.plot(steps, values, label=label, linewidth=1.4)
            drawn = True
    if not drawn:
        return None
    axes.set_xlabel("step")
    axes.grid(visible=True, alpha=0.25)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    canvas.set_canvas(FigureCanvasAgg(canvas))
    canvas.savefig(buffer, format="png")
    return _data_uri(buffer.getvalue())
