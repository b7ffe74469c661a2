"""The commands behind ``python -m kvops``."""
