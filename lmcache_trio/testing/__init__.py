"""What people need who test against lmcache-trio, or write a plugin for it. Public, and kept as stable as the rest.

- `lmcache_trio.testing.engine`: a small real engine (transformer, paged KV cache, scheduler) for a job without vLLM.
- `lmcache_trio.testing.demo`: the job behind `lmcache-trio demo`.

Nothing is imported here, because half of it needs torch and half must not: import the module that you want.
"""
