"""Teachers: teams, routing, combined targets, and the kinds that need no replicas."""
