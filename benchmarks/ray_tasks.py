"""What Ray's GCS holds of tasks that are over: `python -m benchmarks.ray_tasks [TASKS]`.

A local Ray, and one actor that is called again and again. Prints the GCS's own memory (USS) after every tenth of the calls: it
remembers so many tasks (`RAY_task_events_max_num_task_in_gcs`, by default 100,000), and forgets older ones.
"""

from __future__ import annotations

import os
import sys
import time

import psutil
import ray

from cluster.connect import start_local

_AT_ONCE = 1_000
_SETTLING_S = 3.0
"""Longer than a process takes to report its tasks."""


@ray.remote(num_cpus=0)
class Echo:
    """Does nothing."""

    def say(self, value: int) -> int:
        return value


def gcs() -> psutil.Process:
    """The GCS of the Ray that this process has started."""
    (found,) = (each for each in psutil.Process().children(recursive=True) if "gcs_server" in " ".join(each.cmdline()))
    return found


def main() -> None:
    tasks = int(sys.argv[1]) if len(sys.argv) > 1 else 250_000
    start_local(num_cpus=2, log_to_driver=False, object_store_memory=100 * 2**20)
    bound = os.environ.get("RAY_task_events_max_num_task_in_gcs", "the default number of")  # noqa: SIM112 - Ray spells it so
    print(f"ray {ray.__version__}; {bound} tasks are remembered")
    echo, process = Echo.remote(), gcs()
    for done in range(0, tasks + 1, tasks // 10):
        time.sleep(_SETTLING_S)
        print(f"{done:>9,} tasks  {process.memory_full_info().uss / 2**20:7.1f} MiB", flush=True)
        if done < tasks:
            for _ in range(tasks // 10 // _AT_ONCE):
                ray.get([echo.say.remote(1) for _ in range(_AT_ONCE)])
    ray.shutdown()


if __name__ == "__main__":
    main()
