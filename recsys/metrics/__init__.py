"""Maths of click metrics: exact over the ranks of a job, in bounded memory. Imports torch and numpy alone."""
