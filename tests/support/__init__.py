"""What tests of several folders share, and the programs that tests start; `tests` is on the tests' import path."""
