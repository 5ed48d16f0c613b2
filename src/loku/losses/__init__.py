"""Forget and retain losses: pure functions of scores, logits or hidden states; and how their gradients meet."""
