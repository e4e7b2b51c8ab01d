"""Thick-restart block Krylov."""
