"""Videoshop (arXiv 2403.14617): EDM inversion with noise extrapolation, and what goes round it."""
