"""The tiers of a server: `tiers` has them all, `runner` one tier's life, the others one kind of call each."""
