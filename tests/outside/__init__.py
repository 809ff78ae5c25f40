"""Tests that take minutes, a network or a browser: `make notebooks`, `make installs`, `make page`."""
