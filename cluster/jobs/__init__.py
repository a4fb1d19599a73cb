"""Runs as Ray jobs: packaging, submission, status."""

PLUGINS = "plugins.json"
"""In the job's folder: the plugins that its config uses, as `kdray.config.registry.Plugin` has them."""
