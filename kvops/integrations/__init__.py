"""Adapters to other libraries. Each module imports its library, and is itself imported on request only."""
