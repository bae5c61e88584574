"""One training iteration, ours and two public recipes written plainly in PyTorch, on the same model and conditions."""
