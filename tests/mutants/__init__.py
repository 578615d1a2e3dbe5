"""How many mutants of the library its tests kill: ``python -m tests.mutants`` (see README.md here)."""
