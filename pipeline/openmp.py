"""FAISS on one thread, and beside torch on a Mac. Every import of it is from here.

On macOS torch and FAISS each bring an OpenMP of their own. The second one to start ends the process ("OMP: Error #15")
unless KMP_DUPLICATE_LIB_OK allows it, the workaround that FAISS's wheels name; and then threads of both may crash, so
FAISS gets but one. Elsewhere one is right too: stage one has a process per group of cores.
"""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

if platform.system() == "Darwin":
    os.environ.setdefault("KMP_DUPLICATE_LIB_OK", "TRUE")

import faiss

__all__ = ["faiss", "one_thread"]


@contextmanager
def one_thread() -> Iterator[None]:
    """FAISS computes on the calling thread alone while the block runs; its setting is that thread's own."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
