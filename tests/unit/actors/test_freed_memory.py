import gc
import subprocess
import sys
import time
import weakref

from actors.freed_memory import keep_returning

PROGRAM = """
import time
import psutil
from actors.freed_memory import keep_returning

own = psutil.Process()
large, small = [], []
# Below the size that the C library maps by itself, and with a piece after each that stays in use.
for _ in range(2000):
    large.append(bytes(60_000))
    small.append(bytes(2_000))
held = own.memory_full_info().uss
large.clear()
freed = held - own.memory_full_info().uss
keep_returning(period_s=0.05)
until = time.monotonic() + 30
while held - own.memory_full_info().uss < 80e6 and time.monotonic() < until:
    time.sleep(0.05)
print(freed, held - own.memory_full_info().uss)
"""


def test_memory_that_is_free_between_pieces_in_use_goes_back_to_the_machine():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    freed, returned = map(int, done.stdout.split())
    # It shows nothing unless the C library has kept the memory.
    assert freed < 20e6
    assert returned > 80e6


class Cycle:
    def __init__(self) -> None:
        self.own = self


def test_unreachable_cycles_are_collected_however_old_they_are() -> None:
    cycle = Cycle()
    # Among the oldest objects, which Python looks through last.
    gc.collect()
    gone = weakref.ref(cycle)
    gc.disable()
    end = keep_returning(period_s=0.05)
    try:
        del cycle
        until = time.monotonic() + 30
        while gone() is not None and time.monotonic() < until:
            time.sleep(0.05)
    finally:
        end.set()
        gc.enable()
    assert gone() is None
