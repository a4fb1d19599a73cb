"""Training: the student's engine, its ranks and their group."""
