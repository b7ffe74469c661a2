"""Every operator beside its peers: ``python -m bench --help``. Never installed: run from the repository."""

import os

# Before the import of torch: its profiler, which counts memory on a CPU, would log every start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
