"""Roles, bundles, memory and rates of a run on a cluster."""
