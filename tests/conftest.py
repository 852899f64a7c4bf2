import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread_and_no_drift_of_global_state():
    """One thread (two small matrix products on two threads are slower), and the global generator and defaults as they
    were."""
    torch.set_num_threads(1)
    dtype, state = torch.get_default_dtype(), torch.get_rng_state()
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
    torch.set_rng_state(state)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shapes", action="store_true", help="check the shapes in the signatures (tests/shape_checks.py)")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("shapes"):
        import shape_checks

        shape_checks.install()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("shapes"):  # there the package's own error would not be reached
        wrong = [item for item in items if item.get_closest_marker("wrong_shapes")]
        config.hook.pytest_deselected(items=wrong)
        items[:] = [item for item in items if item not in wrong]
