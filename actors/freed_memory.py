"""Memory that a process has freed, given back to its machine.

The C library gives back what is free at the end of a heap, and keeps what lies between pieces in use. In processes that
allocate tensors and tables of ever different sizes that share can be large, although nothing is kept: an engine on CPUs held
129 MiB of it after two hours.
"""

from __future__ import annotations

import ctypes
from threading import Event, Thread

_PERIOD_S = 300.0


def keep_returning(period_s: float = _PERIOD_S) -> Event:
    """Give freed memory back to the machine at intervals, from a daemon thread.

    Only glibc can be asked to; with another C library this does nothing. Returns: an event that ends it when it is set.
    """
    end = Event()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return end
    trim.argtypes = [ctypes.c_size_t]

    def work() -> None:
        while not end.wait(period_s):
            # Releases the interpreter's lock; heaps are locked in turn, for milliseconds.
            trim(0)

    Thread(target=work, name="kdray-freed-memory", daemon=True).start()
    return end
