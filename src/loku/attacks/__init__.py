"""Attacks: attempts to bring back what was unlearned. They know nothing of the command line or of files."""
