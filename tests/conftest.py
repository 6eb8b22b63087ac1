"""Every test starts from the same seed, with one thread and the widest instruction set.

`pytest --hypothesis-profile=thorough` draws many more geometries, new ones each time.
"""

import hypothesis
import pytest
import torch

import cnnops

torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

_quiet = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("cnnops", max_examples=150, derandomize=True, database=None, **_quiet)
hypothesis.settings.register_profile("thorough", max_examples=5000, **_quiet)
hypothesis.settings.load_profile("cnnops")


def pytest_configure(config):
    config.addinivalue_line("markers", "huge: needs more than 20 GB of memory; runs only with CNNOPS_TEST_HUGE=1")
    config.addinivalue_line("markers", "gpu: uses a GPU, where there is one; every test with device=cuda is marked so")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    for item in items:
        parameters = getattr(item, "callspec", None) and item.callspec.params.values()
        if "cuda" in [value for value in parameters or () if isinstance(value, str)]:
            item.add_marker("gpu")


@pytest.fixture(autouse=True)
def same_start():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(params=list(cnnops.settings.instruction_sets))
def instruction_set(request):
    """Runs the test once with each instruction set that this processor has."""
    before = cnnops.settings.instruction_set
    cnnops.settings.instruction_set = request.param
    yield request.param
    cnnops.settings.instruction_set = before


@pytest.fixture(scope="session")
def kernels():
    """The CUDA kernels, emulated: see cuda_on_cpu/README.md."""
    from cuda_helpers import Kernels

    kernels = Kernels()
    yield kernels
    kernels.close()
