"""Code that meets one neighbouring library each."""
