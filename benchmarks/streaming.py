"""Compares FedAvg rounds with private images on the devices, or streamed from the host.

    python -m benchmarks.streaming
    python -m benchmarks.streaming --users=4000 --cohort=100 --pool_mib=4,1

Uses the network and the synthetic images of `benchmarks.peers`, with 50 images per user and batches
of 10. The variants alternate in separate processes, whose peak resident memory is reported.
"""

import os
import platform
import tempfile
import time

from absl import app, flags

from benchmarks.alternate import Worker, alternate, spread
from benchmarks.peers_workload import make_workload, save_workload

_USERS = flags.DEFINE_integer("users", 4000, "how many there are, of 50 images each")
_COHORT = flags.DEFINE_integer("cohort", 100, "how many of them are in a round")
_POOL = flags.DEFINE_list("pool_mib", ["4", "1"], "bounds on the images on a device, in MiB")
_REPEATS = flags.DEFINE_integer("repeats", 5, "rounds of each that count")


def main(_: list[str]) -> None:
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        save_workload(make_workload(_USERS.value, 50, float64=False), folder)
        options = {
            "folder": folder,
            "float64": False,
            "cohort": _COHORT.value,
            "batch_size": 10,
            "rate": 0.1,
            "warm_up": 0,
            "rounds": 1,
            "devices": cores,
        }
        workers = {
            mib: Worker("benchmarks.peers_ours", options | {"max_device_bytes": int(mib) * 2**20})
            for mib in ("0", *_POOL.value)
        }
        seconds = alternate(workers, _REPEATS.value)
        peaks = {mib: worker.ask("round")["peak_gib"] for mib, worker in workers.items()}
    print("| images on a device | s a round | of all on the devices | peak, GiB |")
    print("|---|---|---|---|")
    for mib, times in seconds.items():
        s = spread(times)
        ratio = spread([ours / all for ours, all in zip(times, seconds["0"], strict=True)])
        print(
            f"| {f'at most {mib} MiB' if int(mib) else 'all'} "
            f"| {s['median']:.2f} ({s['low']:.2f} - {s['high']:.2f}) "
            f"| {ratio['median']:.2f} ({ratio['low']:.2f} - {ratio['high']:.2f}) "
            f"| {peaks[mib]:.2f} |"
        )
    version = workers["0"].about["version"]
    for worker in workers.values():
        worker.close()
    print(f"\n{cores} cores, {platform.machine()}, {time.strftime('%Y-%m-%d')}; {version}")


if __name__ == "__main__":
    app.run(main)
