"""The device transfer worker: `worker` owns the copies, `attachments` the engines' memory, `events` the waits."""
