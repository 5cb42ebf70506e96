"""Several processes train one model: replicated (ddp) or sharded (fsdp)."""
