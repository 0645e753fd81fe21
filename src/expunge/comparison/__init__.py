"""Objectives × functions × seeds: the matrix, its tests, its verdict, computed from run records."""
