"""Options, and what tests share. Heavy imports are in functions: a test of a light file starts at once."""

import os
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def draw_curve():
    """The function that draws the curve of a run. It takes as long as a short run, so it is replaced."""
    report = sys.modules.get("support.report")  # None if no test needs it
    with pytest.MonkeyPatch.context() as patch:
        original = report and report.draw_curve
        if report:
            patch.setattr(report, "draw_curve", lambda *run: None)
        yield original


@pytest.fixture
def curves(draw_curve, monkeypatch) -> None:
    """For tests whose runs draw their curves."""
    from support import report

    monkeypatch.setattr(report, "draw_curve", draw_curve)


@pytest.fixture(scope="session")
def world() -> Path:
    """The folder of the toy world `opening`: student/, teacher/, train.jsonl, test.jsonl; built once."""
    from support import toy

    return toy.build("opening")


def pytest_addoption(parser) -> None:
    parser.addoption(
        "--kills", type=int, default=1, help="how often a training run and an evaluation are killed"
    )
    parser.addoption("--device", default="cpu", help="for the tests of the five files: cpu, cuda, ...")
    parser.addoption("--slow", action="store_true", help="also the tests that are marked slow")


def pytest_configure(config) -> None:
    """Before the tests are imported. Without --device, neither they nor the programs they start use a GPU."""
    os.environ["TEST_DEVICE"] = config.getoption("device")
    if config.getoption("device") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_runtest_setup(item) -> None:
    if item.get_closest_marker("slow") and not item.config.getoption("--slow"):
        pytest.skip("slow: add --slow")
