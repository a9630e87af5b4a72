"""The one place that imports FAISS: it runs on one thread, and next to torch on macOS and Windows.

There, torch and FAISS each bring their own copy of OpenMP. The second copy to start ends the process ("OMP: Error #15")
unless KMP_DUPLICATE_LIB_OK is set. FAISS's packagers name this workaround and call it dangerous: threads of both copies
may crash. So FAISS uses one thread. On Linux one is right too: stage one has one process per group of cores.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

if sys.platform in ("darwin", "win32"):
    os.environ.setdefault("KMP_DUPLICATE_LIB_OK", "TRUE")

import faiss

__all__ = ["faiss", "one_thread"]


@contextmanager
def one_thread() -> Iterator[None]:
    """FAISS computes on the calling thread only while the block runs; other threads keep their setting."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
