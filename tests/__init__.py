"""Tests of bnfx; helpers are imported as `tests.models`, `tests.zoo`."""
