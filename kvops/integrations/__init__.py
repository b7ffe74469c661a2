"""Thin adapters to other libraries. Each module is imported on request only, and brings its own library in."""
