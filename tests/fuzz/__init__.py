"""Random sweeps over everything that kvops computes, each against an oracle of its own: see :mod:`fuzz.__main__`."""
