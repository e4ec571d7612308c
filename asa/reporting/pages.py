"""HTML pages from the templates in `templates/`.

jinja2 and matplotlib (the `report` extra) are imported when a page is written, so that the numbers need neither.
"""

import base64
import re
from pathlib import Path
from typing import Any

from asa.data.io.files import write_whole
from asa.errors import require

OWN = re.compile(rb"\basa \d|asa-prepare")  # in each page; the second in that of an unfinished quality control


def require_report_extra(purpose: str) -> None:
    """Raise an ImportError if the `report` extra, which `purpose` needs, is not installed."""
    for module in ("jinja2", "matplotlib.figure"):
        require(module, "report", purpose)


def require_for_page(path: Path) -> None:
    """`require_report_extra` for the page of an evaluation, whose numbers have been written before."""
    require_report_extra(f"{path} (the other files do not need the extra and are complete)")


def check_page(path: Path) -> None:
    """Raise a ValueError for a file that exists and is no page of asa: these name asa with its version."""
    if not path.exists():
        return
    with path.open("rb") as file:
        if not any(OWN.search(line) for line in file):
            raise ValueError(f"{path}: exists and is no page of asa: move it away, or choose another out=")


def write_page(path: Path, template: str, **values: Any) -> None:
    """Fill in a template of `templates/` and write the page, whole or not at all: one HTML file that fetches nothing.

    The values are escaped for HTML.
    """
    import jinja2

    from asa import __version__

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("asa.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template).render(version=__version__, **values)
    # An id may come from a file name that is not valid Unicode.
    write_whole(path, page.encode("utf-8", errors="backslashreplace"))


def data_uri(png: bytes) -> str:
    """A PNG as text that is embedded in a page."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
