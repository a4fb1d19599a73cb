"""Execution: serving and training engines, and the thin Ray actors around them."""
