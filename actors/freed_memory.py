"""Memory that a process no longer uses, given back to its machine.

Python looks for cycles among all objects only when those that outlived its small collections have grown by a quarter. A process
that has imported torch and transformers has some 600,000 objects: what cycles hold, tensors among it, can then stay for hours.
To look through them all takes a quarter of a second.

The C library gives back what is free at the end of a heap, and keeps what lies between pieces in use. In processes that
allocate tensors and tables of ever different sizes that share can be large, although nothing is kept: an engine on CPUs held
129 MiB of it after two hours.
"""

from __future__ import annotations

import ctypes
import gc
import time
from threading import Event, Thread

_PERIOD_S = 300.0


def keep_returning(period_s: float = _PERIOD_S) -> Event:
    """Collect all unreachable cycles and give freed memory back to the machine at intervals, from a daemon thread.

    Only glibc can be asked for the latter; with another C library cycles alone are collected. Returns: an event that ends it
    when it is set.
    """
    end = Event()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim.argtypes = [ctypes.c_size_t]

    def work() -> None:
        # At the same times by every machine's clock: ranks wait for each other, so that they had better pause together.
        while not end.wait(period_s - time.time() % period_s):
            gc.collect()
            if trim is not None:
                # Releases the interpreter's lock; heaps are locked in turn, for milliseconds.
                trim(0)

    Thread(target=work, name="kdray-freed-memory", daemon=True).start()
    return end
