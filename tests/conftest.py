"""What every test shares: a Hypothesis that is as steady in CI as anywhere."""

from hypothesis import settings

settings.register_profile("project", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("project")
