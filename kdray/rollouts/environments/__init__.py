"""Environments of a rollout: what answers the model between its turns, and the sampler that lets it."""

from kdray.rollouts.environments.episode import Environment, Episode, Reply
from kdray.rollouts.environments.sampler import EnvironmentSampler, check_environment, in_environment
from kdray.rollouts.environments.turn_text import TurnText

__all__ = ["Environment", "EnvironmentSampler", "Episode", "Reply", "TurnText", "check_environment", "in_environment"]
