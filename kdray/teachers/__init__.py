"""Teachers: teams, routing, targets, and the kinds that need no replicas."""
