"""``python -m bench quality``: what compressed caches still know, policy by policy, on a real model and offline.

``tasks`` makes the contexts and what is asked about them, :mod:`kvops.generation.evaluate` asks, ``run`` goes through
policies and ratios, ``kept`` turns rows into shares of the full cache's quality, ``pictures`` and ``study`` show them.
"""
