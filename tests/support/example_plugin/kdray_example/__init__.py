"""Kinds for kdray: one a module."""
