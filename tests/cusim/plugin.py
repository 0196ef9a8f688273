"""Runs tests on the emulated CUDA kernels: `pytest -p tests.cusim.plugin tests/ops` (--cusim=plain|asan|tsan).

asan and tsan need the environment of `tests.cusim.build.runtime_of`. --cusim-seed=N draws another schedule.
"""

from collections.abc import Sequence

import pytest

from tests.cusim.build import VARIANTS, install, missing


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cusim", choices=VARIANTS, default="plain", help="how the emulated kernels are built")
    parser.addoption("--cusim-seed", type=int, default=0, help="of the order in which emulated threads run")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config, args: Sequence[str]) -> None:
    """Before any conftest.py looks which backends there are."""
    if reason := missing():
        pytest.exit(f"the emulator cannot be built here: {reason}", returncode=0)
    options = early_config.known_args_namespace
    install(options.cusim).emulator.seed = options.cusim_seed
