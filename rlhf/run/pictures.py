"""Pictures: matplotlib that only writes files, loaded only where a picture is drawn."""


def pyplot():
    """matplotlib.pyplot, set up to draw without a screen."""
    import matplotlib

    # Before pyplot is imported: on a machine without a screen, its own choice can fail.
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
