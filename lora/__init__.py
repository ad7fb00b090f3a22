"""Low-rank adapters on any nn.Module, and the rule that chooses their ranks."""
