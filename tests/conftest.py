"""What every test shares: a Hypothesis that is as steady in CI as anywhere."""

import signal

from hypothesis import settings

settings.register_profile("project", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("project")

# A shell that starts the tests in the background has them ignore SIGINT, and every process that they start with them.
signal.signal(signal.SIGINT, signal.default_int_handler)
