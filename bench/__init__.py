"""Every operator beside its peers: ``python -m bench --help``. Never installed: run from the repository."""
