"""The vLLM side of a replica: mixture model, recorder, worker extension."""
