"""How many runs a GPU has room for: the arithmetic, and what a machine without one says."""

import pytest
import torch

from axolotl_qtha.bench.suite import gpu_memory
from axolotl_qtha.bench.suite.gpu_memory import GIB, fitting, need, was_full, words


def result(memory, status="success"):
    return {"train_info": {"status": status, **({} if memory is None else {"accelerator_memory_max": memory})}}


def test_what_a_run_needs_is_the_most_that_one_needed():
    assert need([]) is None
    assert need([result(None), result(0)]) is None
    # 1.2 x 5 GiB in use, and one of CUDA's own
    assert need([result(3 * GIB), result(5 * GIB, "diverged"), result(9 * GIB, "failed"), result(None)]) == 7 * GIB


@pytest.mark.parametrize(
    ("jobs", "free", "each", "fit"),
    [(4, 40, 10, 4), (4, 39, 10, 3), (4, 400, 10, 4), (4, 5, 10, 1), (1, 40, 10, 1), (8, 0, 10, 1)],
)
def test_how_many_fit(jobs, free, each, fit):
    assert fitting(jobs, free * GIB, each * GIB) == fit


def test_words():
    assert words(4, 22 * GIB, 10 * GIB) == "2 of 4 jobs at a time: a run needs 10.0 GiB, 22.0 GiB of the GPU are free."


@pytest.mark.parametrize(
    ("error", "full"),
    [
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", True),
        ("RuntimeError: CUDA error: out of memory", True),
        ("RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("OutOfResources: out of resource: shared memory", False),
        ("", False),
    ],
)
def test_errors_of_a_full_gpu(error, full):
    assert was_full(error) is full


@pytest.mark.slow
def test_free_memory_is_asked_of_another_process():
    told = gpu_memory.free()
    if torch.cuda.device_count():
        assert told > 0
        assert not torch.cuda.is_initialized()
    else:
        assert told is None
