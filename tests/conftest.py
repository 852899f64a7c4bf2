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
