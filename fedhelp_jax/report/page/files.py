"""Writes the figures of a page as files, and returns them as markup."""

import io
import re
from collections.abc import Sequence
from pathlib import Path

from fedhelp_jax.report import run_files
from fedhelp_jax.report.page.content import Drawn
from fedhelp_jax.report.page.figures import Figure

PAGE, FOLDER = "report.html", "report"


class Files:
    """Writes each figure as SVG and PNG and its numbers as CSV, and returns its markup."""

    def __init__(self, folder: Path):
        """Writes to ``folder``, which is made when there is something to write."""
        self._folder = folder

    def drawn(self, found: Sequence[Figure | None], prefix: str = "") -> list[Drawn]:
        """Returns the figures that are not None; ``prefix`` comes before their names."""
        self._folder.mkdir(parents=True, exist_ok=True)
        return [self._drawn(figure, prefix) for figure in found if figure is not None]

    def _drawn(self, figure: Figure, prefix: str) -> Drawn:
        from markupsafe import Markup
        from matplotlib import rc_context

        name = f"{prefix}{figure.name}"
        # Laid out once, for both formats.
        figure.canvas.draw_without_rendering()
        figure.canvas.set_layout_engine("none")
        # Text as outlines, so that it fits everywhere; ids that are the same every time.
        with rc_context({"svg.fonttype": "path", "svg.hashsalt": name}):
            text = io.StringIO()
            figure.canvas.savefig(text, format="svg", metadata={"Date": None})
        svg = text.getvalue()
        run_files.write_text(self._folder / f"{name}.svg", svg)
        run_files.write_figure(self._folder / f"{name}.png", figure.canvas)
        columns = list(dict.fromkeys(key for row in figure.rows for key in row))
        run_files.write_csv(self._folder / f"{name}.csv", columns, figure.rows)
        return Drawn(figure.caption, Markup(_inline(svg, name)))


def _inline(svg: str, name: str) -> str:
    """Returns an SVG file as part of a page, where ids must differ between figures."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(width|height)="[\d.]+pt" ', "", svg, count=2)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    links = r'(xlink:href="#|href="#|url\(#)(?!' + re.escape(name) + "-)"
    svg = re.sub(links, rf"\g<1>{name}-", svg)  # the name may begin with a digit
    return re.sub(r"\s*\n\s*", "\n", svg)
