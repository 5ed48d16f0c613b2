"""Importance, initialisers, the anchored adapter and its export."""
