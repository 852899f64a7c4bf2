import pytest
import torch

IDS = pytest.StashKey[list[str]]()
LONGEST = 40  # of a text within an id


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


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """Short ids where a test names none: a dtype's name, the beginning of a text; a function without a name is called
    as the argument it is for."""
    if isinstance(val, torch.dtype):
        return str(val).removeprefix("torch.")
    if isinstance(val, str) and len(val) > LONGEST:
        return val[:LONGEST]
    if callable(val) and getattr(val, "__name__", "") == "<lambda>":
        return argname
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[IDS] = [item.nodeid for item in items]  # before slow ones are left out
    if config.getoption("shapes"):  # there the package's own error would not be reached
        wrong = [item for item in items if item.get_closest_marker("wrong_shapes")]
        config.hook.pytest_deselected(items=wrong)
        items[:] = [item for item in items if item not in wrong]


@pytest.fixture
def collected_ids(request: pytest.FixtureRequest) -> list[str]:
    """The ids of all tests that were collected, slow ones too."""
    return request.config.stash[IDS]
