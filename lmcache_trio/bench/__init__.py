"""`lmcache-trio bench`: what the cache costs an engine, beside what a memcpy and a bare round trip cost just then.

- `settings`, `rows`, `report`: what to measure, what came of it, how it is told. They import no torch.
- `run`: the processes and the rounds. `machine`: whose CPU time it was.
- `host`: an engine's process. `site`: one engine at one server. `phases`, `lookup_phases`, `lookups`, `tiers`: what it
  does, row by row. `lookup_host`: an engine without KV, where there is no torch.
- `files`: the disk tier's files, dropped from the page cache and read directly.
- `grow`, `light`, `watched`, `plots`: the same by prompt length, index size and clients.
- `parked`: what others notice of lookups that wait for a disk that hangs. `records`: how a server with many starts.

It measures through the adapters and the protocol that engines use, and has no way in of its own but the echo that tells
what a round trip costs. It refuses to guess: a copy that was dropped or a lookup that missed ends the run.
"""
