"""Student weights on their way from the ranks to the replicas."""
