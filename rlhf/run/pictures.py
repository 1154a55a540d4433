"""Pictures: matplotlib that only writes files, loaded only where a picture is drawn, and never the end of a run."""

import logging
import warnings
from contextlib import contextmanager, suppress

# Okabe and Ito's colours: they differ for colour-blind readers, and in grey print by their lightness.
BLUE, ORANGE, GREEN, PURPLE, BLACK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000"
# A system has one of them, if it has any font with Chinese characters.
CHINESE_FONTS = (
    "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "PingFang SC", "Microsoft YaHei", "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei", "SimHei", "Heiti SC", "Arial Unicode MS",
)  # fmt: skip


def pyplot():
    """matplotlib.pyplot, set up to draw without a screen."""
    import matplotlib

    # Before pyplot is imported: on a machine without a screen, its own choice can fail.
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def attempt(draw, *given, failed: str = "a picture could not be drawn") -> None:
    """Call `draw(*given)`; whatever it raises is a warning that begins with `failed`.

    A picture or report shows numbers that are in files already. What was trained must not be lost for it.
    """
    try:
        draw(*given)
    except Exception as error:
        why = f"{type(error).__name__} {error}".partition("\n")[0][:200]
        warnings.warn(f"{failed} ({why}): its numbers are in the files beside it", stacklevel=2)


def chinese_font() -> str | None:
    """The name of an installed font with Chinese characters, if there is one."""
    from matplotlib import font_manager

    # matplotlib remembers the fonts of its first start: those installed since are added.
    manager = font_manager.fontManager
    known = {font.fname for font in manager.ttflist}
    for file in set(font_manager.findSystemFonts()) - known:
        # A file of a kind that matplotlib cannot read is no font for it.
        with suppress(RuntimeError, OSError):
            manager.addfont(file)

    installed = {font.name for font in manager.ttflist}
    return next((name for name in CHINESE_FONTS if name in installed), None)


@contextmanager
def lettering(font: str | None):
    """Figures made and saved inside it use this font, in front of the usual one."""
    plt = pyplot()
    # Many Chinese fonts have one weight only, of which it would complain at each word.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    families = [font] if font else []
    settings = {"font.family": [*families, "DejaVu Sans"], "axes.unicode_minus": font is None}
    with plt.rc_context(settings):
        yield
