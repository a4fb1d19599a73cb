"""Parts of a run that train the student without a teacher."""
