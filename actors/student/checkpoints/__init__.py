"""Checkpoints of the student: written and read by its ranks, and turned into a model by a single process."""
