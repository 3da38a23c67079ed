"""The emulation itself: it sums as a GPU would, and it tells when threads part ways at a barrier."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
from emulation import compiler

HEADER = Path(__file__).with_name("cuda_emulation.h")
SOURCE = """
struct Call { double* out; int stray; };
struct Empty {};
__global__ void sum(Call call, Empty) {
    double* values = reinterpret_cast<double*>(emulation::shared_memory());
    double mine = threadIdx.x + 1;
    for (int far = 16; far > 0; far /= 2) mine += __shfl_down_sync(0xffffffffu, mine, far);
    if (threadIdx.x % 32 == 0) values[threadIdx.x / 32] = mine;
    if (int(threadIdx.x) == call.stray) return;
    __syncthreads();
    if (threadIdx.x == 0) call.out[blockIdx.x] = values[0] + values[1];
}
extern "C" int run(double* out, int stray) {
    Call call{out, stray};
    Empty empty;
    void* arguments[] = {&call, &empty};
    return cudaLaunchKernel(sum, dim3(2), dim3(64), arguments, 2 * sizeof(double), nullptr);
}
extern "C" const char* message(int error) { return cudaGetErrorString(error); }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    if compiler() is None:
        pytest.fail("the emulation needs a C++ compiler; install g++")
    folder = tmp_path_factory.mktemp("emulation")
    (folder / "sum.cpp").write_text(SOURCE)
    subprocess.run([compiler(), "-std=c++17", "-shared", "-fPIC", "-include", HEADER, folder / "sum.cpp", "-o", folder / "sum.so"], check=True)
    library = ctypes.CDLL(str(folder / "sum.so"))
    library.message.restype = ctypes.c_char_p
    return library


def test_blocks_sum_by_shuffles_and_barriers(library) -> None:
    out = (ctypes.c_double * 2)()
    assert library.run(out, -1) == 0
    assert list(out) == [2080.0, 2080.0]


def test_a_thread_that_misses_a_barrier_is_an_error(library) -> None:
    error = library.run((ctypes.c_double * 2)(), 40)
    assert error != 0
    assert b"a barrier at line" in library.message(error) and b"thread 40 has left" in library.message(error)
