"""Tests of examples/digits.py, run as a user runs it: results, output and picture."""

import re

import matplotlib.image
import pytest
from programs import in_standard_promotion, load_program

METHODS = [
    "Batch statistics",
    "Method ONE: running averages",
    "Method TWO: pooled",
    "Method TWO: mean of batches",
    "Method TWO: moving average",
]


@pytest.fixture(scope="module")
def digits():
    """The example as a module."""
    module = load_program("digits.py")
    module.OPTIMIZER = in_standard_promotion(module.OPTIMIZER)
    return module


@pytest.fixture
def run(digits, capsys, monkeypatch, tmp_path):
    """Runs the program in an empty folder; returns its result and the lines of standard output."""

    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("COLUMNS", "100")
        scores = digits.main([*arguments, "--no-progress"])
        out, err = capsys.readouterr()
        assert not err.strip()
        return scores, out.splitlines()

    return run


def rows(lines):
    """Epoch, method and accuracy of each row of the printed table."""
    matches = (re.fullmatch(r"│ (\d+) +│ (.+?) +│ +(\d\.\d{3}) │", line) for line in lines)
    return [(int(m[1]), m[2], float(m[3])) for m in matches if m]


def split(lines):
    """The lines of standard output; the diagnosis, which stands between two empty lines, becomes one list."""
    start, *_, end = (number for number, line in enumerate(lines) if not line)
    diagnosis = [line for line in lines[start:end] if line]
    return [*lines[:start], diagnosis, *lines[end + 1 :]]


@pytest.mark.slow
@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_population_statistics_give_what_running_averages_do_not(api, run, tmp_path):
    scores, lines = run("--api", api)

    last = scores[-1]
    assert len(scores) == 3
    assert last["Method ONE: running averages"] < 0.5 < 0.9 < last["Method TWO: pooled"]
    assert last["Method TWO: pooled"] == pytest.approx(last["Batch statistics"], abs=0.05)

    expected = [(epoch, name, round(row[name], 3)) for epoch, row in enumerate(scores, 1) for name in METHODS]
    assert rows(lines) == expected

    title, *table, why, diagnosis, served, saved = split(lines)
    assert title.strip() == "448 held-out digits; training batches of shuffled digits"
    assert all(line[0] in "┏┃┡│├└" for line in table)
    assert re.fullmatch(
        r"Why: 53% \(0\.99\^63\) of each running average is still its initial value; without it: 0\.\d\d\.", why
    )
    assert served == "Saved digits.jaxbn; in a fresh process 448 of 448 predictions are the same."
    assert re.fullmatch(r"Saved digits\.png; \d+ s, compilation included\.", saved)
    assert diagnosis[0].startswith("21 batches")
    assert diagnosis[0].endswith(" of 64 examples")
    assert sum(re.search(r" \d/\d+$", line) is not None for line in diagnosis) == 10
    assert [line[:35] for line in diagnosis if line[0].isdigit()][1:] == ["1. The running averages lag behind: "[:35]]
    assert max(map(len, lines)) <= 100

    height, width, _ = matplotlib.image.imread(tmp_path / "digits.png").shape
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
    assert width > 1000 and height > 500


@pytest.mark.slow
def test_batches_of_one_digit_are_admitted_to_spoil_the_training(run, tmp_path):
    scores, lines = run("--order", "class", "--epochs", "1", "--picture", "one.svg")

    batch, pooled = scores[0]["Batch statistics"], scores[0]["Method TWO: pooled"]
    assert max(batch, pooled) < 0.5
    assert [row[:2] for row in rows(lines)] == [(1, name) for name in METHODS]
    _, *_, why, diagnosis, _, _ = split(lines)
    assert why == (
        "Why: batches of one digit spoiled training; new statistics cannot help: "
        f"batch {batch:.2f}, pooled {pooled:.2f}."
    )
    text = " ".join(map(str.strip, diagnosis))
    assert "Batches are not drawn at random: the variance of their means is up to" in text
    assert "-> Shuffle the examples." in text
    assert max(map(len, lines)) <= 100
    assert (tmp_path / "one.svg").stat().st_size > 10_000


def test_batches_hold_one_digit_each_when_ordered_by_class(digits, rng):
    data, _ = digits.load(seed=0)

    for images, labels in digits.training_batches(data, "class", rng):
        assert images.shape == (64, 8, 8, 1)
        assert len(set(labels)) == 1
    assert all(len(set(labels)) > 5 for _, labels in digits.training_batches(data, "shuffled", rng))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--epochs", "0"],
        ["--seed", "-1"],
        ["--order", "random"],
        ["--picture", "digits.txt"],
        ["--picture", "missing/digits.png"],
        ["--network", "missing/digits.jaxbn"],
        ["--api", "haiku"],
    ],
)
def test_bad_options_end_before_the_work(digits, arguments, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(SystemExit, match="2"):
        digits.main(arguments)

    assert arguments[0] in capsys.readouterr().err
