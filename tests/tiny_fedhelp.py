"""The command ``fedhelp`` with tiny networks instead of ResNets, which signals itself on demand.

python tiny_fedhelp.py SIGNAL after-row|before-sums|after-rounds ROUND[@PART OF FOLDER]  train ...
python tiny_fedhelp.py SIGNAL after-program -  sweep ...
python tiny_fedhelp.py FOLDER pool -  train ...

The last form writes the part of the pool that this process's devices hold.
With several processes, only the first writes rows and sums; all of them make rounds.
"""

import os
import signal
import sys

import jax
import numpy as np
import pytest
from helpers import use_tiny_networks

from fedhelp_jax.cli import main as cli
from fedhelp_jax.experiments import checkpoint, sweep
from fedhelp_jax.report import run_files
from fedhelp_jax.simulation.compiled import CompiledRounds


def main() -> int:
    name, where, when, *arguments = sys.argv[1:]
    number = signal.Signals[name] if where != "pool" else None
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_networks(patch)
        if where == "pool":
            init = CompiledRounds.__init__

            def init_then_write(self, *arguments, **options):
                init(self, *arguments, **options)
                shards = self.federation.pool.images.addressable_shards
                file = f"{name}/pool{jax.process_index()}.npz"
                np.savez(file, *(shard.data for shard in shards))

            patch.setattr(CompiledRounds, "__init__", init_then_write)
        elif where == "after-row":
            append = run_files.append_metrics

            def append_then_stop(path, row):
                append(path, row)
                round, _, folder = when.partition("@")
                if row["round"] == int(round) and folder in str(path):
                    os.kill(os.getpid(), number)

            patch.setattr(run_files, "append_metrics", append_then_stop)
        elif where == "after-rounds":
            rounds = CompiledRounds.rounds

            def make_then_stop(self, state, first, last):
                made = rounds(self, state, first, last)
                if last == int(when):
                    os.kill(os.getpid(), number)
                return made

            patch.setattr(CompiledRounds, "rounds", make_then_stop)
        elif where == "after-program":
            results = sweep.Program.results

            def give_then_stop(self):
                yield from results(self)
                os.kill(os.getpid(), number)

            patch.setattr(sweep.Program, "results", give_then_stop)
        else:
            write_sums = checkpoint._write_sums

            def stop_then_write(folder):
                if folder.name == when:
                    os.kill(os.getpid(), number)
                write_sums(folder)

            patch.setattr(checkpoint, "_write_sums", stop_then_write)
        return cli.main(["fedhelp", *arguments])


if __name__ == "__main__":
    sys.exit(main())
