"""Files of a run: folder, metrics, checkpoints, ledger, report and verification."""
