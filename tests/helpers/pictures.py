"""Runs that draw nothing: in a run of a few steps the pictures of its report take longer than the steps."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from dga_scale.logging import plots


@contextmanager
def no_pictures() -> Iterator[None]:
    """Within, what is drawn is thrown away; a few bytes stand in for each picture."""
    with pytest.MonkeyPatch.context() as patch:
        for name in vars(plots):
            if name.endswith("_figure"):
                patch.setattr(plots, name, lambda *_, **__: None)
        patch.setattr(plots, "png_bytes", lambda figure: b"png")
        patch.setattr(plots, "save_png", lambda figure, path: path.write_bytes(b"png"))
        patch.setattr(plots, "pixels", lambda figure: np.zeros((1, 1, 3), np.uint8))
        yield
