"""What the pictures of all reports share. Matplotlib is imported only here and only when a picture is drawn; it is
installed by the extra ``report``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import HyperFlexisError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette without its yellow, too pale for lines, and a grey: told apart with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A8A8A")
_STYLE: Any = {  # matplotlib types each key as a literal; a plain dict does not fit
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}
_DPI = 144
Share = Literal["none", "row", "col", "all"]


def require() -> None:
    """Raise HyperFlexisError naming the extra when pictures cannot be drawn here."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise HyperFlexisError("reports need matplotlib: pip install 'hyperflexis[report]'") from None
    mpl.use("Agg")


def save(out: Path, draw: Callable[[], Mapping[str, Figure]]) -> dict[str, bytes]:
    """Draw in the reports' style and write each picture into ``out`` under its name; their bytes by name.

    Raises OSError when ``out`` cannot be written.
    """
    require()
    import matplotlib as mpl

    out.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(_STYLE):
        pictures = draw()
        for name, figure in pictures.items():
            figure.savefig(out / name, dpi=_DPI)
    return {name: (out / name).read_bytes() for name in pictures}


def panels(
    columns: int, width: float, height: float, rows: int = 1, sharex: Share = "none", sharey: Share = "none"
) -> tuple[Figure, list[list[Axes]]]:
    """A figure of ``rows`` by ``columns`` panels, each ``width`` by ``height`` inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows))
    grid = figure.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey)
    return figure, [list(row) for row in grid]


def colour(index: int) -> str:
    """The colour of the policy at ``index``."""
    return COLOURS[index % len(COLOURS)]


def number(value: float | None, digits: int) -> str:
    """As shown in tables; "-" for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """A share as shown in tables."""
    return "-" if value is None else f"{100.0 * value:.1f}%"
