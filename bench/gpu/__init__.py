"""Everything that needs a GPU, in one command: ``python -m bench.gpu --help``."""
