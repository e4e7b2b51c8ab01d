"""Files that are whole or not there, and vectors too many for memory."""
