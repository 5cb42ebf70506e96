"""A server that OpenAI's clients speak to, and a chat page: `python -m nanovlm.serve`."""
