"""What a user could take in the place of this package: one file a family of peers.

Each makes of a dense output layer another one of the same shape, with the exact bytes that it takes
in a file. `catalogue.py` says which settings are measured.
"""
