"""What people need who test against lmcache-trio, or write a plugin for it. Public, and kept as stable as the rest.

- `memory_contract`, `tier_contract`, `device_contract`: the suites that backends pass; subclass one to test yours.
- `faults`, `faulty_tier`: any tier, failing in the ways that tiers fail.
- `fake_device`: a device whose copies move when the test says so.

A small real engine to test against is `lmcache_trio.demo.engine`. Nothing is imported here, because half of it needs
torch and half must not: import the module that you want.
"""
