"""Path of rollouts from a request to a training batch."""
