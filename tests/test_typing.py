"""A type checker accepts correct uses of the library and rejects mistakes before the program runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

TYPED = Path(__file__).parent / "typed"


@pytest.mark.slow
def test_mypy_finds_each_mistake_and_accepts_correct_uses():
    """Takes about ten seconds without mypy's cache, and one with it."""
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--hide-error-context", str(TYPED)]
    run = subprocess.run(command, cwd=TYPED.parents[1], capture_output=True, text=True)
    found = {(file, int(line)) for file, line in re.findall(r"(\w+\.py):(\d+): error", run.stdout)}
    lines = (TYPED / "mistakes.py").read_text().splitlines()
    wrong = {("mistakes.py", number) for number, line in enumerate(lines, 1) if "  # wrong" in line}
    assert len(wrong) > 30 and found == wrong, run.stdout + run.stderr
