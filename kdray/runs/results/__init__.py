"""Results of a run: held-out numbers by response, their uncertainty, and the verdict that follows."""
