"""What people need who test against lmcache-trio, or write a plugin for it. Public, and kept as stable as the rest.

- `engine`, `connected`: a small real engine (transformer, paged KV cache, scheduler), alone and connected to a server.
- `demo`: the job behind `lmcache-trio demo`.
- `memory_contract`, `tier_contract`, `device_contract`: the suites that backends pass; subclass one to test yours.
- `faults`, `faulty_tier`: any tier, failing in the ways that tiers fail.
- `fake_device`: a device whose copies move when the test says so.

Nothing is imported here, because half of it needs torch and half must not: import the module that you want.
"""
