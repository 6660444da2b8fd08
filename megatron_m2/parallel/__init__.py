"""Meshes, collectives and the ways to split work over ranks. Knows nothing of M2."""
