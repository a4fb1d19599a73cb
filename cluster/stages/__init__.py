"""Phases of a run, and the parts of it that train the student without a teacher."""
