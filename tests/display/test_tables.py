"""Names that fit into a column, and the width of a line."""

import os
import shutil
import sys

import pytest

from jaxbn._src.display.tables import line_width, names_of


def test_paths_that_no_cut_tells_apart_are_numbered():
    paths = [f"{'a' * i}/{'b' * (30 - i)}" for i in range(10, 20)]  # alike in every part of 12 characters
    names = list(names_of(paths, 12).values())
    assert len(set(names)) == len(paths)
    assert all(len(name) <= 12 and name.startswith(f"{i}: ") for i, name in enumerate(names, 1))


def test_paths_that_fit_stay_as_they_are():
    assert names_of(["", "a/b"], 12) == {"": "(the model)", "a/b": "a/b"}


@pytest.mark.parametrize(("columns", "width"), [(40, 80), (100, 100), (300, 120)])
def test_a_line_is_as_wide_as_a_terminal_within_bounds(columns, width, monkeypatch):
    monkeypatch.setattr(shutil, "get_terminal_size", lambda fallback: os.terminal_size((columns, 24)))
    assert line_width() == 80
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert line_width() == width
