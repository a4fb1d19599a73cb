"""Transfer of student weights from the ranks to the replicas."""
