"""The low-rank preconditioner and its refreshes."""
