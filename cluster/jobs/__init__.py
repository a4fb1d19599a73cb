"""Runs as Ray jobs: packaging, submission, status."""
