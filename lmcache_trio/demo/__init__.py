"""`lmcache-trio demo`: the main job on a small engine of its own, without vLLM.

- `command`: runs the server and three engine processes, compares what they answered, and prints the table.
- `engine_process`: one engine process; it serves the demo's prompts.
- `engine`: the engine: requests, chunked prefill, decoding. A complete example of an engine that uses the adapters.
- `connected_engine`: that engine joined to a server by both adapters.
- `model`, `model_kv`: the transformer, and its paged KV cache.

`command` imports no torch; everything else here does.
"""
