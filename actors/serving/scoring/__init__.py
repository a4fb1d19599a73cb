"""Scoring of sequences by a teacher's engine: by vLLM's own prompt logprobs, and of the engine's own draws, many at once."""
