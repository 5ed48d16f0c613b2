"""Forget and retain losses: pure functions of logits and labels."""
