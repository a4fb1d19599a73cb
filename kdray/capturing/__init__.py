"""Recorded teacher answers: collection, storage format and replay."""
