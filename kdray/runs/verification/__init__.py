"""Parts of `kdray.runs.verify`: the result, the lines of a ledger as columns, and the checks of a line."""
