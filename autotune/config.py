"""Launch configurations of the kernels: one frozen dataclass and one choosing function for each kernel family.

A configuration is chosen from plain numbers (head size, dtype width, group size ...) and never from device data, so the
choice costs a dictionary look-up and is the same on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass  # noqa: F401
