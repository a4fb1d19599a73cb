"""Runs as Ray jobs: packaging, submission, status."""

PLUGINS = "plugins.json"
"""File in the job's folder that lists the plugins of its config, as `kdray.config.registry.Plugin`."""
