"""Kernel configurations: what each kernel family can be launched with, and what it is launched with by default."""
