"""The scenes of the soak, its engines and its figures."""
