"""Pictures: matplotlib for files alone, loaded only where one is drawn."""


def pyplot():
    """matplotlib.pyplot, set up to draw without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
