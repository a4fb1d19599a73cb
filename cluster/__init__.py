"""Where it runs: the command line, launching, placement."""
