"""Trackers: destinations of a run's numbers and events besides the run folder's own files."""
