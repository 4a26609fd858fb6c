"""report.png and the summary, from a run directory alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lpexp.errors import ConfigError
from lpexp.report import single


def axes_of(values: list[float]) -> Any:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    single._draw_logarithmic(axes, [((np.arange(len(values)), np.array(values)), "red", "gap")])
    return axes


def test_zeros_stand_on_a_line_that_says_exactly_0() -> None:
    axes = axes_of([0.0, 1e-3, 0.0])
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[0] == "exactly 0" and labels[1:] == ["$10^{-3}$", "$10^{-2}$"][: len(labels) - 1]
    assert axes.texts[0].get_text() == "gap: exactly 0 at 2 of 3 steps"
    curve, _, zeros = axes.lines
    assert np.isnan(curve.get_ydata()[[0, 2]]).all() and curve.get_marker() == "o"  # a lone point is seen
    floor = axes.get_yticks()[0]
    assert list(zeros.get_xdata()) == [0, 2] and set(zeros.get_ydata()) == {floor}
    low, high = axes.get_ylim()
    assert low < floor < 1e-3 < high


def test_without_zeros_there_is_no_such_line_and_with_only_zeros_nothing_else() -> None:
    axes = axes_of([2e-3, 5e-2])
    assert "exactly 0" not in [label.get_text() for label in axes.get_yticklabels()]
    assert axes.get_ylim()[0] <= 2e-3 and axes.get_ylim()[1] >= 5e-2
    assert axes_of([0.0, 0.0]).texts[0].get_text() == "gap: exactly 0 at 2 of 2 steps"


def test_the_picture_is_drawn_from_the_directory_and_shows_a_difference(ran) -> None:
    from matplotlib.image import imread

    same, other = (imread(single.draw(ran(name, gap=gap))) for name, gap in (("a", 0.0), ("b", 0.3)))
    assert same.shape == other.shape and min(same.shape[:2]) > 1000
    assert (same != other).any()
    assert not np.array_equal(same, np.broadcast_to(same[0, 0], same.shape))


def test_a_directory_without_a_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no step of a run"):
        single.draw(tmp_path)
