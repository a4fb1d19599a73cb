"""Diagnosis: of this machine and of a pair of models, apart from any run."""
