"""Rollouts on their way from a request to a training batch."""
