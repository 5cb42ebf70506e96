"""From and to folders on disk: safetensors, name tables, configs of each family, whole models."""
