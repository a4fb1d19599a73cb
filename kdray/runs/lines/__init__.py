"""Files with a line for every step or event: read as streams, cut at a step, sent to a storage in segments."""
