"""The survey's claims, one file a section; `harness reproduce` decides them."""
