"""hypergrad beside other libraries, on the same problems and numbers."""
