"""Cluster side: the command line, launching, placement."""
