"""`make gpu-check`: what only a GPU can show, in one command and one file of results (docs/gpu-check.md)."""
