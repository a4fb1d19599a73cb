"""Rollouts, from a request to a training batch."""
