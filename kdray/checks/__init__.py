"""Checks of a run before it starts, and of a teacher's signal once its replicas are up."""
