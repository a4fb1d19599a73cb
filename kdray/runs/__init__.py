"""A run on disk: folder, metrics, checkpoints, ledger, report and verification."""
