"""Every operator beside its peers: ``python -m bench --help``. Never installed: run from the repository."""

import os

# Before torch comes in: its profiler, which counts memory on a CPU, announces every start and stop otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
