"""How the second derivatives of C̃1 are multiplied."""
