"""The LLQR optimizer."""
