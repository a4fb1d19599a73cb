"""Commands of `kdray`, apart from those of jobs; registered in `cluster.cli`."""
