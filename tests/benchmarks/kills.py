"""Kill runs at random moments, go on, and compare losses and bytes with an unbroken run.

    python -m tests.benchmarks.kills 200
"""
import shutil
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    from tests.runs_apart import kill_at_random

    home, began = Path(tempfile.mkdtemp()), time.time()
    tally = kill_at_random(int(sys.argv[1]), home, seed=int(began))
    failed = [n for n, (same, *_) in enumerate(tally) if not same]
    print(f"{len(tally) - len(failed)} of {len(tally)} runs ended as the unbroken one, in {time.time() - began:.0f} s; "
          f"{sum(kept and not done for _, kept, done in tally)} went on from a checkpoint, "
          f"{sum(not kept and not done for _, kept, done in tally)} began anew, "
          f"{sum(done for *_, done in tally)} had finished before the kill")
    print(f"these differed, and lie in {home}: {failed}" if failed else "none differed")
    if not failed:
        shutil.rmtree(home)
    sys.exit(bool(failed))
