"""Pictures: matplotlib that only writes files, loaded only where a picture is drawn, and never the end of a run."""

import warnings


def pyplot():
    """matplotlib.pyplot, set up to draw without a screen."""
    import matplotlib

    # Before pyplot is imported: on a machine without a screen, its own choice can fail.
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def attempt(draw, *given) -> None:
    """Call `draw(*given)`; whatever it raises is a warning.

    A picture shows numbers that are in files already. What was trained is saved after it, and must not be lost for it.
    """
    try:
        draw(*given)
    except Exception as error:
        why = f"{type(error).__name__} {error}".partition("\n")[0][:200]
        warnings.warn(f"a picture could not be drawn ({why}): its numbers are in the files beside it", stacklevel=2)
